"""A small job of real videos whose processes are killed; a reader that watches it all along; and the final account.

Drivers are processes of the real command. Nobody is found by name alone: actors are children of a raylet, or of a
driver with a Ray of its own, that the test has started.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import duckdb
import psutil
import pyarrow.parquet as pq

import longtake
from cluster.object_store import open_store
from jobs.journal import read_entries
from jobs.prompts import read_prompts
from jobs.shards import PlannedTask, plan_tasks
from jobs.spec_text import build_spec
from tests.processes import children_of, title_of
from workers.actor import RenderActor
from workers.task import RenderResult, RenderSetup

ROOT = Path(__file__).parents[1]
MODEL, WIDTH, HEIGHT, NUM_FRAMES, NUM_ITEMS = "tiny-test", 64, 32, 60, 8
ACTOR_TITLE = "ray::WorkerHost"
LOOK_S = 0.05


class KilledJob:
    """The same command again and again, into one folder. No driver outlives the block."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.root = folder / "night"
        self._log = folder / "drivers.log"
        self._drivers: list[subprocess.Popen[bytes]] = []
        prompts = write_prompts(folder / "p.jsonl")
        self._command = [
            *(sys.executable, "-m", "jobs.render", str(prompts), "--out", str(folder), "--job-id", "night"),
            *("--model", MODEL, "--width", str(WIDTH), "--height", str(HEIGHT), "--frames", str(NUM_FRAMES)),
            *("--actors", "2", "--no-sheet", "--limits-flush-interval-s", "0.5", *arguments),
        ]

    def __enter__(self) -> KilledJob:
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self._drivers:
            driver.kill()
            driver.wait()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*self._command, *arguments]
        with self._log.open("ab") as log:
            self._drivers.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment))
        return self._drivers[-1]

    def finish(self, driver: subprocess.Popen[bytes], code: int = 0) -> None:
        """Wait for its end: a driver that nobody has killed never fails because others were."""
        found = driver.wait(900)
        assert found == code, f"exit {found}\n{self._log.read_text(errors='replace')[-6000:]}"

    def keys_of_epoch(self, epoch: int) -> set[str]:
        """Videos and segments that attempts of this epoch have written."""
        store = open_store(self.root)
        keys = (info.key for prefix in ("videos/", "_state/segments/") for info in store.list(prefix))
        return {key for key in keys if f"-e{epoch}a" in key}


class Watcher(threading.Thread):
    """A reader beside the job: parts as they stand, and `longtake.follow`. Its first finding ends it."""

    def __init__(self, root: Path) -> None:
        super().__init__(name="watcher")
        self.root = root
        self.followed: set[str] = set()
        self.published: set[str] = set()
        self._parts: dict[Path, bytes] = {}
        self._cursor: str | None = None
        self._is_over = threading.Event()
        self._finding: BaseException | None = None

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()

    def run(self) -> None:
        try:
            while not self._is_over.wait(LOOK_S):
                self._look()
        except BaseException as finding:
            self._finding = finding

    @property
    def num_committed(self) -> int:
        self.check()
        return len(self.followed)

    def check(self) -> None:
        """Raise what the reader has found."""
        if self._finding is not None:
            raise self._finding

    def close(self) -> None:
        """One last look; everything that was ever seen is still there, byte for byte."""
        self._is_over.set()
        self.join()
        self.check()
        self._look()
        for path, digest in self._parts.items():
            assert hashlib.sha256(path.read_bytes()).digest() == digest, f"{path} was changed"

    def _look(self) -> None:
        for path in sorted(self.root.glob("manifest/part-*.parquet")):
            if path not in self._parts:
                self._parts[path] = hashlib.sha256(path.read_bytes()).digest()
                self._see(pq.read_table(path).to_pylist(), self.published)
        for new in longtake.follow(self.root, self._cursor, until_done=False):
            self._see(new.table.to_pylist(), self.followed)
            self._cursor = new.cursor

    def _see(self, rows: Iterable[dict[str, Any]], seen: set[str]) -> None:
        for row in rows:
            task_id = f"{row['item_id']}-{row['sample_index']}"
            assert task_id not in seen, f"{task_id} was seen twice"
            seen.add(task_id)
            assert (self.root / row["file_name"]).stat().st_size == row["bytes"]


def write_prompts(path: Path) -> Path:
    rows = [{"id": f"take-{n}", "prompt": f"a meadow number {n}"} for n in range(NUM_ITEMS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def undisturbed(folder: Path, look: dict[tuple[str, ...], Any] | None = None) -> dict[str, str]:
    """Hash of the frames of each task, rendered by one actor in this process: no Ray, no driver, no journal.

    Args:
        folder: For videos that nobody needs.
        look: Further fields of the spec.
    """
    flags = {("prompts", "url"): str(write_prompts(folder / "p.jsonl")), ("out",): str(folder), ("job_id",): "night"}
    video = {"width": WIDTH, "height": HEIGHT, "num_frames": NUM_FRAMES}
    pixels: dict[tuple[str, ...], Any] = {("render", "video", name): value for name, value in video.items()}
    spec = build_spec(flags=flags | pixels | {("render", "backbone", "name"): MODEL} | (look or {}))
    tasks = plan_tasks(read_prompts(spec.source), spec.task_defaults)
    setup = RenderSetup(job_id="night", config=spec.render, store_url=str(folder / "reference"), num_threads=1)
    actor = RenderActor(setup)
    try:
        actor.load()
        results = actor.run([task.attempt("e0a1") for task in tasks if isinstance(task, PlannedTask)])
    finally:
        actor.close()
    assert all(isinstance(result, RenderResult) for result in results)
    hashes = {result.task_id: result.frames_sha256 for result in results if isinstance(result, RenderResult)}
    assert len(set(hashes.values())) == NUM_ITEMS
    return hashes


def check_account(job: KilledJob, watcher: Watcher, expected: dict[str, str]) -> None:
    """Everything that was promised holds of a job that has ended with exit code 0."""
    watcher.close()
    assert watcher.followed == watcher.published == set(expected)
    glob = f"{job.root}/manifest/part-*.parquet"
    query = f"select count(*), count(distinct (item_id, sample_index)) from '{glob}'"  # noqa: S608
    assert duckdb.sql(query).fetchall() == [(NUM_ITEMS, NUM_ITEMS)]
    check_journal(job)
    rows = longtake.open_manifest(job.root).to_table().to_pylist()
    assert {f"{row['item_id']}-{row['sample_index']}": row["frames_sha256"] for row in rows} == expected
    for row in rows:
        path = job.root / row["file_name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        assert count_frames(path) == row["num_frames"] == NUM_FRAMES
    report = longtake.verify(job.root, sweep=True)
    assert report.is_good, report.problems
    again = longtake.verify(job.root)
    assert (again.num_decoded, again.num_orphans, again.num_in_progress) == (NUM_ITEMS, 0, 0)
    store = open_store(job.root)
    assert {info.key for info in store.list("videos/")} == {row["file_name"] for row in rows}
    assert not list(store.list("_state/segments/"))
    assert longtake.read_status(job.root).state == "finished"


def count_frames(path: Path) -> int:
    """Decodes the whole video."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def check_journal(job: KilledJob) -> None:
    """Each task succeeded once, none failed, and nobody wrote after the begin of a later epoch."""
    begun = 0
    outcomes: Counter[tuple[str, str]] = Counter()
    for entry in read_entries(open_store(job.root), 0):
        begun = entry.epoch if entry.kind == "begin" else begun
        assert entry.epoch == begun, f"entry {entry.seq} of epoch {entry.epoch} stands behind the begin of {begun}"
        outcomes.update((row["status"], f"{row['item_id']}-{row['sample_index']}") for row in entry.rows)
    assert {status for status, _ in outcomes} == {"succeeded"}, outcomes
    assert set(outcomes.values()) == {1}, outcomes
    assert len(outcomes) == NUM_ITEMS


def actors_of(pids: Iterable[int], *, doing: str = "") -> list[psutil.Process]:
    """Actor processes below these; Ray writes into their title what they do, such as `run`."""
    return [child for child in children_of(pids) if title_of(child).startswith(ACTOR_TITLE + doing)]

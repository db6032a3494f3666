"""Does the store hold what the manifest says? Hashes, frame counts, videos that nobody names, and a second rendering.

Reads only, unless `sweep` is asked for. Needs no cluster; rendering again needs the model and happens in this process.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.errors import NotFound
from cluster.object_store import ObjectStore, open_store
from jobs.consume import committed_rows
from jobs.id_set import IdSet
from jobs.job_record import read_spec
from jobs.lease import Owner, read_holder
from workers.actor import RenderActor
from workers.errors import EncodeFailed
from workers.task import FULL_PRECISION, RenderFailure, RenderSetup, RenderTask, segments_of
from workers.video.decode import probe, sha256_of_file

logger = logging.getLogger(__name__)

ProblemKind = Literal["missing", "size", "hash", "frames", "damaged", "duplicate", "pixels", "rerender"]
MAX_LISTED = 1000
COLUMNS = (
    *("item_id", "sample_index", "file_name", "bytes", "sha256", "frames_sha256", "num_frames"),
    *("prompt", "negative_prompt", "seed", "ladder", "model_revision"),
    "control",  # the user's own column: there where a prompt list has it
)
_ATTEMPT = re.compile(r"-e(\d+)a\d+(?:\.mp4|/)")


@dataclass(frozen=True)
class Problem:
    """One thing that is not as the manifest says."""

    kind: ProblemKind
    task_id: str
    key: str
    detail: str


@dataclass
class VerifyReport:
    """What was looked at and what was found. Nothing is wrong when `problems` is empty; orphans are only litter."""

    num_videos: int = 0
    num_bytes: int = 0
    num_decoded: int = 0
    num_rerendered: int = 0
    problems: list[Problem] = field(default_factory=list)
    num_orphans: int = 0
    orphan_bytes: int = 0
    orphans: list[str] = field(default_factory=list)
    num_in_progress: int = 0
    num_swept: int = 0

    @property
    def is_good(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_good": self.is_good}

    def add(self, problem: Problem) -> None:
        logger.warning("%s: %s: %s", problem.kind, problem.key, problem.detail)
        self.problems.append(problem)


def verify(
    url: str | Path,
    *,
    deep: bool = True,
    sweep: bool = False,
    rerender: float = 0.0,
    on_video: Callable[[], None] | None = None,
) -> VerifyReport:
    """Check a job's output.

    Args:
        url: Root of the job.
        deep: Download and decode every video; False looks at existence and size only.
        sweep: Remove videos and segments that nobody names and no living driver may still be writing.
        rerender: Share of the videos to render again, in [0, 1]; their frames must hash to the same.
        on_video: Called after each video, for a progress display.
    """
    store = open_store(url)
    report, seen = VerifyReport(), IdSet()
    live_epoch = _live_epoch(store)  # before the rows: a driver that ends meanwhile stays protected
    named: set[bytes] = set()
    again: list[dict[str, Any]] = []
    for row in committed_rows(store, COLUMNS):
        task_id = f"{row['item_id']}-{row['sample_index']}"
        report.num_videos += 1
        report.num_bytes += row["bytes"]
        if not seen.add(task_id):
            report.add(Problem("duplicate", task_id, row["file_name"], "a second row of the same item and sample"))
        named.add(_digest(row["file_name"]))
        _check_video(store, task_id, row, report, deep=deep)
        if is_sampled(task_id, rerender):
            again.append(row)
        if on_video is not None:
            on_video()
    _look_for_orphans(store, named, live_epoch, report, sweep=sweep)
    if again:
        _render_again(store, again, report)
    return report


def is_sampled(task_id: str, share: float) -> bool:
    """Does this task belong to a sample of that share? Always the same tasks; a larger share holds a smaller one."""
    return int.from_bytes(hashlib.sha256(f"verify\0{task_id}".encode()).digest()[:6], "big") < share * 2**48


def _check_video(store: ObjectStore, task_id: str, row: dict[str, Any], report: VerifyReport, *, deep: bool) -> None:
    key = row["file_name"]
    size = store.size(key)
    if size is None:
        report.add(Problem("missing", task_id, key, "no such object"))
        return
    if size != row["bytes"]:
        report.add(Problem("size", task_id, key, f"{size} bytes, manifest says {row['bytes']}"))
        return
    if not deep:
        return
    with tempfile.TemporaryDirectory(prefix="longtake-verify-") as folder:
        path = Path(folder) / "video.mp4"
        try:
            store.get_file(key, path)
        except NotFound:
            report.add(Problem("missing", task_id, key, "vanished while it was being checked"))
            return
        found = sha256_of_file(path)
        if found != row["sha256"]:
            report.add(Problem("hash", task_id, key, f"SHA-256 is {found}, manifest says {row['sha256']}"))
        try:
            num_frames = probe(path).num_frames
        except EncodeFailed as error:
            report.add(Problem("damaged", task_id, key, str(error)))
            return
        report.num_decoded += 1
        if num_frames != row["num_frames"]:
            report.add(Problem("frames", task_id, key, f"{num_frames} frames, manifest says {row['num_frames']}"))


def _look_for_orphans(
    store: ObjectStore, named: set[bytes], live_epoch: int, report: VerifyReport, *, sweep: bool
) -> None:
    """Videos that no row names, and segments: litter of attempts that lost, once their epoch is over."""
    litter: list[str] = []
    for info in _candidates(store):
        if _digest(info.key) in named:
            continue
        attempt = _ATTEMPT.search(info.key)
        if attempt is None or int(attempt.group(1)) >= live_epoch:
            report.num_in_progress += 1
            continue
        report.num_orphans += 1
        report.orphan_bytes += info.num_bytes
        if len(report.orphans) < MAX_LISTED:
            report.orphans.append(info.key)
        if sweep:
            litter.append(info.key)
            if len(litter) >= MAX_LISTED:
                store.delete(litter)
                report.num_swept += len(litter)
                litter = []
    if litter:
        store.delete(litter)
        report.num_swept += len(litter)


def _candidates(store: ObjectStore) -> Iterator[Any]:
    yield from store.list("videos/")
    yield from store.list("_state/segments/")


def _live_epoch(store: ObjectStore) -> int:
    """Attempts of this epoch and later ones may still be at work; one past the last if its driver has ended."""
    holder = read_holder(store)
    if holder is None:
        return 2**31  # no driver is known: `_state/` was removed long ago, or none ever ran
    epoch = int(str(holder["epoch"]))
    owner = Owner(**{name: holder[name] for name in Owner.__dataclass_fields__})  # type: ignore[arg-type]
    is_over = holder["released"] or owner.is_dead(Owner.current())
    return epoch + 1 if is_over else epoch


def _render_again(store: ObjectStore, rows: list[dict[str, Any]], report: VerifyReport) -> None:
    spec = read_spec(store)
    with tempfile.TemporaryDirectory(prefix="longtake-rerender-") as folder:
        setup = RenderSetup(job_id=spec.job_id, config=spec.render, store_url=folder, num_threads=spec.actors.threads)
        actor = RenderActor(setup)
        try:
            actor.load()
            for row in rows:
                _compare(actor, row, report)
        finally:
            actor.close()


def _compare(actor: RenderActor, row: dict[str, Any], report: VerifyReport) -> None:
    ladder = set(row["ladder"] or ())
    task = RenderTask(
        task_id=f"{row['item_id']}-{row['sample_index']}",
        item_id=row["item_id"],
        sample_index=row["sample_index"],
        attempt="e0a1",
        segments=segments_of(row["prompt"]),
        negative_prompt=row["negative_prompt"] or "",
        seed=row["seed"],
        num_frames=row["num_frames"],
        control=row.get("control") or None,
        ladder_rung=len(ladder - {FULL_PRECISION}),
        full_precision=FULL_PRECISION in ladder,
    )
    (outcome,) = actor.run([task])
    report.num_rerendered += 1
    if isinstance(outcome, RenderFailure):
        report.add(Problem("rerender", task.task_id, row["file_name"], f"{outcome.kind}: {outcome.message}"))
    elif outcome.frames_sha256 != row["frames_sha256"]:
        detail = f"rendered again the frames hash to {outcome.frames_sha256}, manifest says {row['frames_sha256']}"
        if outcome.model_revision != row["model_revision"]:
            detail += "; the weights here are others"
        report.add(Problem("pixels", task.task_id, row["file_name"], detail))


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=16).digest()

"""One run of one prompt list through the real command, with its own driver and its own actors, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pyarrow.parquet as pq

from longtake import open_manifest
from tests.bench.busy_times import (
    Hold,
    Losses,
    idle_shares,
    losses,
    read_holds,
    second_half_frames_per_s,
    steady_takes_per_s,
    steady_window,
)
from tests.bench.gpu_watch import GpuWatch, by_card
from tests.bench.overhead import prompt

STAGES = ("text", "denoise", "cache", "vae", "check", "encode", "upload")
COLUMNS = [
    *("item_id", "sample_index", "frames_sha256", "started_at", "finished_at", "committed_at"),
    *("gpu_seconds", "upload_wait_s", "stage_s", "peak_gpu_bytes", "gpu_name", "backend", "kv_policy"),
]


@dataclass(frozen=True)
class Part:
    """A prompt list and how it is rendered."""

    name: str
    num_items: int
    num_frames: int
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One run; seconds unless said otherwise."""

    part: Part
    num_actors: int
    gpus_per_actor: float
    command_s: float
    """From the command to its end, with start, loading and the closing records."""
    first_begin: float
    last_commit: float
    rows: list[dict[str, Any]]
    holds: list[Hold]
    by_cause: dict[str, float]
    held_s: float
    cards: list[dict[str, float]]
    used_at_changes: list[float]
    """Of one actor: the share of the time in which its card worked where one take followed another; or nothing."""
    chunk_seconds: list[list[float]]
    """Of each take, from pictures to pictures; empty if the job lost its chunk metrics."""

    @property
    def window_s(self) -> float:
        return self.last_commit - self.first_begin

    @property
    def per_hour(self) -> float:
        return 3600 * len(self.rows) / self.window_s

    @property
    def steady_per_hour(self) -> float | None:
        rate = steady_takes_per_s(self.holds)
        return None if rate is None else 3600 * rate

    @property
    def lost(self) -> Losses:
        """Seconds without a take on the GPU, from first start to last commit."""
        return losses(self.holds, self.last_commit)

    @property
    def idle_share(self) -> float:
        """Of all actors' time from first start to last commit."""
        return self.lost.all_s / (self.num_actors * self.window_s)

    @property
    def explained(self) -> float:
        """GPU seconds by cause over those that were held."""
        return sum(self.by_cause.values()) / self.held_s

    @property
    def gpu_s(self) -> float:
        """A take's mean time with the GPU."""
        return fmean(hold.seconds for hold in self.holds)

    @property
    def hashes(self) -> frozenset[tuple[str, int, str]]:
        return frozenset((row["item_id"], row["sample_index"], row["frames_sha256"]) for row in self.rows)

    @property
    def label(self) -> str:
        """Heads the run's column."""
        return f"{self.part.name}, {self.num_actors} x {self.gpus_per_actor:g} GPU"

    def figures(self, one: Run | None) -> dict[str, object]:
        """All that is shown of it; `one` is the same part with one actor."""
        stages = {name: fmean(row["stage_s"][name] for row in self.rows) for name in STAGES}
        return {
            "videos": len(self.rows),
            "frames each": self.part.num_frames,
            **self._speed(one),
            **self._frames_per_s(),
            **self._losses(),
            **self._ends(),
            **{f"GPU s {cause}": seconds for cause, seconds in self.by_cause.items()},
            "GPU s by cause, sum / held": self.explained,
            "GPU s by cause, of those held": ", ".join(
                f"{cause} {percents([seconds / self.held_s])}" for cause, seconds in self.by_cause.items()
            ),
            "idle share of what was held after loading": self.by_cause["idle"] / (self.held_s - self.by_cause["load"]),
            "GPU s a video": self.gpu_s,
            **{f"{name} s a video": seconds for name, seconds in stages.items()},
            "GPU s a video beyond denoise, cache": self.gpu_s - stages["denoise"] - stages["cache"],
            "peak GB": max(row["peak_gpu_bytes"] for row in self.rows) / 1e9,
            **self._cards(),
            "kernel": self.rows[0]["backend"],
            "cache": self.rows[0]["kv_policy"],
        }

    def _speed(self, one: Run | None) -> dict[str, object]:
        """Videos an hour by three clocks, and ratios to one actor."""
        steady = self.steady_per_hour
        command_per_hour = 3600 * len(self.rows) / self.command_s
        speed: dict[str, object] = {
            "s first start to last commit": self.window_s,
            "videos/h": self.per_hour,
            "videos/h steady": steady,
            "command s": self.command_s,
            "videos/h whole command": command_per_hour,
        }
        if one is not None:
            steady_one = one.steady_per_hour
            speed |= {
                "ratio": self.per_hour / one.per_hour,
                "ratio steady": steady / steady_one if steady and steady_one else None,
                "ratio whole command": command_per_hour * one.command_s / (3600 * len(one.rows)),
                "same frame hashes": self.hashes == one.hashes,
            }
        return speed

    def _frames_per_s(self) -> dict[str, object]:
        """Of all videos, by the clocks of `_speed` and by those of chunks, which come with their pictures.

        A GPU decodes beside the next chunk: the first pictures come with the second chunk, the last ones alone.
        """
        frames, steady, takes = self.part.num_frames, self.steady_per_hour, self.chunk_seconds
        return {
            "frames/s first start to last commit": frames * len(self.rows) / self.window_s,
            "frames/s steady": frames * steady / 3600 if steady else None,
            "frames/s, second half of a take": second_half_frames_per_s(takes, frames) if takes else None,
            "s until a take's first pictures": fmean(take[0] for take in takes) if takes else None,
            "s a chunk, median": median(second for take in takes for second in take) if takes else None,
            "s of a take's last pictures": fmean(take[-1] for take in takes) if takes else None,
        }

    def _losses(self) -> dict[str, object]:
        """Idle shares: of each actor in its own time, and of all their capacity from first start to last commit."""
        lost, capacity_s = self.lost, self.num_actors * self.window_s
        return {
            "idle share of each actor": percents(idle_shares(self.holds).values()),
            "lost before": lost.before_s / capacity_s,
            "lost between": lost.between_s / capacity_s,
            "lost after": lost.after_s / capacity_s,
            "idle share, first start to last commit": self.idle_share,
            "s idle between takes": lost.between_s,
            "s idle after the last take": lost.after_s,
        }

    def _ends(self) -> dict[str, object]:
        """What follows a take's time with the GPU, which the next take has meanwhile."""
        left = {hold.task: hold.end for hold in self.holds}
        finished = {f"{row['item_id']}-{row['sample_index']}": row["finished_at"].timestamp() for row in self.rows}
        commits = [row["committed_at"].timestamp() - row["finished_at"].timestamp() for row in self.rows]
        return {
            "s from leaving the GPU to the video": fmean(finished[task] - end for task, end in left.items()),
            "s from the video to its commit": fmean(commits),
        }

    def _cards(self) -> dict[str, object]:
        """What nvidia-smi says of the cards in the steady window."""
        return {
            "cards used": percents(card["used_percent"] / 100 for card in self.cards) or None,
            "cards used within 1 s of a change of takes": percents(self.used_at_changes) or None,
            "SM MHz": ", ".join(f"{card['clock_mhz']:.0f}" for card in self.cards) or None,
            "W": ", ".join(f"{card['power_w']:.0f}" for card in self.cards) or None,
            "GB by nvidia-smi": ", ".join(f"{card['memory_mib'] * 2**20 / 1e9:.1f}" for card in self.cards) or None,
        }


def table_of(runs: Sequence[tuple[Run, Run | None]]) -> list[dict[str, object]]:
    """One row for each figure, one column for each run (given with the run that it is compared with)."""
    columns = {run.label: run.figures(one) for run, one in runs}
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    return [{"figure": name} | {label: figures.get(name) for label, figures in columns.items()} for name in names]


def percents(shares: Any) -> str:
    return ", ".join(f"{100 * share:.1f}%" for share in shares)


def run_part(
    part: Part,
    *,
    address: str,
    ray_folder: Path,
    watch: GpuWatch,
    num_actors: int,
    gpus_per_actor: float,
    limit_s: float,
) -> Run:
    """Render the list of a part.

    Raises:
        RuntimeError: The command failed, with its last lines; or took longer than `limit_s`.
    """
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("".join(prompt(index) + "\n" for index in range(part.num_items)))
        job_id = f"{part.name}-{num_actors}x{gpus_per_actor:g}".replace(".", "-")
        command = [sys.executable, "-m", "jobs.render", str(prompts), "--out", folder, "--job-id", job_id]
        command += ["--frames", str(part.num_frames), "--no-sheet", "--address", address]
        command += ["--actors", str(num_actors), "--actors-gpus-per-actor", str(gpus_per_actor), *part.flags]
        begun = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not finished after {limit_s:.0f} s") from None
        command_s = time.monotonic() - begun
        logs = sorted(ray_folder.glob("session_2*/logs/worker-*.err"))
        if done.returncode:
            raise RuntimeError(
                f"exit code {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}{_errors(logs, job_id)}"
            )
        job = Path(folder) / job_id
        rows = open_manifest(str(job)).to_table(columns=COLUMNS).to_pylist()
        result = json.loads((job / "_result.json").read_text())
        chunk_seconds = read_chunk_seconds(job / "metrics")
    holds = read_holds(logs, job_id)
    if len(rows) != part.num_items or len(holds) != part.num_items:
        raise RuntimeError(f"{len(rows)} videos and {len(holds)} lines of the actors, expected {part.num_items}")
    begin, end = steady_window(holds)
    return Run(
        part=part,
        num_actors=num_actors,
        gpus_per_actor=gpus_per_actor,
        command_s=command_s,
        first_begin=min(hold.begin for hold in holds),
        last_commit=max(row["committed_at"].timestamp() for row in rows),
        rows=rows,
        holds=holds,
        by_cause=result["gpu_seconds"],
        held_s=result["held_s"],
        cards=by_card(watch.samples(begin, end)),
        used_at_changes=used_around(watch, [hold.end for hold in holds[:-1]]) if num_actors == 1 else [],
        chunk_seconds=chunk_seconds,
    )


def used_around(watch: GpuWatch, times: Sequence[float]) -> list[float]:
    """Mean share in which cards worked within a second of some times; nothing where nobody watches."""
    samples = [sample.used_percent for time in times for sample in watch.samples(time - 1, time + 1)]
    return [fmean(samples) / 100] if samples else []


def read_chunk_seconds(folder: Path) -> list[list[float]]:
    """Seconds of each chunk of each take, in order, from a job's chunk metrics."""
    if not folder.is_dir():
        return []
    takes: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for row in pq.read_table(folder, columns=["task_id", "chunk_index", "seconds"]).to_pylist():
        takes[row["task_id"]][row["chunk_index"]] = row["seconds"]
    return [[seconds[index] for index in sorted(seconds)] for _, seconds in sorted(takes.items())]


def _errors(logs: list[Path], job_id: str) -> str:
    """The last things that actors of a job complained of."""
    lines = [text for file in logs for text in file.read_text(errors="replace").splitlines() if f'"{job_id}"' in text]
    bad = [text for text in lines if '"error"' in text or '"warning"' in text]
    return "\nactors: " + "\n".join(text[-1500:] for text in bad[-2:]) if bad else ""

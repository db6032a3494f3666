"""Time per chunk of policies that take turns, chunk by chunk, so that they share the moods of the machine.

`python -m tests.bench.quality_turns --policies dense window fastar-quant --frames 3000`: free rollouts of one world
without the pictures, each in a process of its own, so that none meets what another has left of the memory; each row has
the seconds of its chunks at several lengths and its speed-up over the first policy.
`kv_bytes` is what the cache says that it takes, `held_bytes` what its tensors are seen to take. Is a chunk at the end
as fast as one at frame 600? A machine is not the same a quarter of an hour later, so with `--behind` a second rollout
of each policy begins so late that its chunks up to frame 600 take turns with the last ones of the first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from tests.bench.quality_lab import QualityLab, Runner
from tests.bench.quality_places import CHUNK_FRAMES
from tests.bench.quality_policies import ALL
from tests.bench.record import load_text, report

_AROUND = 20
"""Chunks before a mark whose median or mean is taken."""


_BEHIND = 50
"""Chunks that a rollout which begins late makes: up to frame 600."""


@dataclass(frozen=True)
class Timed:
    """Of each chunk of a rollout; see `Runner`."""

    seconds: list[float]
    cpu_seconds: list[float]
    density: list[float]
    kv_bytes: list[float]
    held_bytes: list[int]
    revision: str
    """Of the weights."""

    @classmethod
    def of(cls, runner: Runner, revision: str) -> Self:
        return cls(runner.seconds, runner.cpu_seconds, runner.density, runner.kv_bytes, runner.held_bytes, revision)


class Apart:
    """A rollout in another process, which makes a chunk when it is told to.

    Args:
        policy: Its name.
        options: Of the command line.
    """

    def __init__(self, policy: str, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, policy, options), daemon=True)
        self._process.start()
        theirs.close()
        self.num_chunks: int = self._ours.recv()
        self.seconds = 0.0

    def step(self) -> None:
        """One chunk; until it is made."""
        self._ours.send(True)
        self.seconds += self._ours.recv()

    def end(self) -> Timed:
        """What was measured; the process ends."""
        self._ours.send(False)
        found: Timed = self._ours.recv()
        self._process.join()
        return found


def _serve(connection: Connection, policy: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    lab = QualityLab(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "float32", options.weights)
    walks = lab.walks("still", [options.world], options.frames)
    runner = Runner(lab, walks, lab.model(ALL[policy], as_served=True))
    connection.send(walks.num_chunks)
    while connection.recv():
        runner.step()
        connection.send(runner.seconds[-1])
    connection.send(Timed.of(runner, lab.revision))


def paired(runner: Timed, behind: Timed) -> dict[str, float]:
    """Time of the last chunks of a rollout, over that of the chunks before frame 600 of one that took turns with them:
    by the clock, which a median reads, and of the CPU on average, chunks that make room included."""
    clock = statistics.median(runner.seconds[-_AROUND:]) / statistics.median(behind.seconds[-_AROUND:])
    cpu = statistics.mean(runner.cpu_seconds[-_AROUND:]) / statistics.mean(behind.cpu_seconds[-_AROUND:])
    return {"paired_time_end_to_600": clock, "paired_mean_cpu_time_end_to_600": cpu}


def make_row(name: str, runner: Timed, first: Timed, frames: int) -> dict[str, Any]:
    """Figures of one rollout."""
    chunks = len(runner.seconds)
    marks = sorted({mark for mark in (50, 100, 125, 200, chunks) if mark <= chunks})
    at = {CHUNK_FRAMES * m: round(statistics.median(runner.seconds[max(0, m - _AROUND) : m]), 4) for m in marks}
    # A median does not see the chunks in which a full table makes room; a mean does.
    cpu_at = {CHUNK_FRAMES * m: round(statistics.mean(runner.cpu_seconds[max(0, m - _AROUND) : m]), 4) for m in marks}
    return {
        "part": "turns",
        "policy": name,
        "frames": frames,
        "n": 1,
        "seconds": sum(runner.seconds),
        "speedup": sum(first.seconds) / sum(runner.seconds),
        "seconds_per_chunk_at": at,
        "time_end_to_600": at[CHUNK_FRAMES * marks[-1]] / at[CHUNK_FRAMES * marks[0]],
        "cpu_seconds": sum(runner.cpu_seconds),
        "cpu_speedup": sum(first.cpu_seconds) / sum(runner.cpu_seconds),
        "mean_cpu_seconds_per_chunk_at": cpu_at,
        "mean_cpu_time_end_to_600": cpu_at[CHUNK_FRAMES * marks[-1]] / cpu_at[CHUNK_FRAMES * marks[0]],
        "density": runner.density[-1],
        "kv_bytes": int(runner.kv_bytes[-1]),
        "peak_kv_bytes_end_to_600": max(runner.kv_bytes) / max(runner.kv_bytes[: marks[0]]),
        "held_bytes": max(runner.held_bytes),
        "held_bytes_end_to_600": max(runner.held_bytes) / max(runner.held_bytes[: marks[0]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policies", nargs="*", default=["dense", "window", "fastar-quant"], choices=list(ALL))
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--world", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="folder of weights; without it the bundled ones")
    parser.add_argument("--behind", action="store_true", help="compare the end with frame 600, chunk by chunk")
    parser.add_argument("--name", default="quality_turns")
    options = parser.parse_args()
    runners = {name: Apart(name, options) for name in options.policies}
    behind: dict[str, Apart] = {}
    num_chunks = max(runner.num_chunks for runner in runners.values())
    for chunk in range(num_chunks):
        if options.behind and chunk == num_chunks - _BEHIND:
            behind = {name: Apart(name, options) for name in options.policies}
        for runner in (*runners.values(), *behind.values()):
            runner.step()
        if chunk % 25 == 24:
            seconds = {name: f"{runner.seconds:.1f} s" for name, runner in runners.items()}
            print(f"chunk {chunk + 1} of {num_chunks}: {seconds}", flush=True)
    timed = {name: runner.end() for name, runner in runners.items()}
    late = {name: runner.end() for name, runner in behind.items()}
    first = next(iter(timed.values()))
    rows = [
        make_row(name, found, first, options.frames) | (paired(found, late[name]) if name in late else {})
        for name, found in timed.items()
    ]
    report(options.name, rows, f"weights {first.revision[:16]}; {options.threads} threads. {load_text()}")


if __name__ == "__main__":
    main()

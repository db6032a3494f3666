"""What the service costs around a render: the bare rollout loop against the whole way into a committed manifest row.

`python -m tests.bench.overhead --takes 3 --frames 192 --rounds 3`

Both sides render the same takes with one actor and one torch thread. "Plain" is model loading apart, then rollout and
decode alone: no Ray, no driver, no checks, no encoder, no store. "Service" is the time in which the driver's actor had
work, from the first take's start to the last one's end; start-up is shown beside it. Within a round the two take
short turns (tests/bench/turns.py), with all their processes, because the speed of a shared machine changes by more than
what is measured here. CPU time of the generating threads compares their work without what others do on the machine (the
service's also checks each video). The last rows are shares within a run of the service that nobody stops: time for
which takes held the GPU beyond their rollout and decode, in which none held it, and in which the generating threads
held it but did not run: with no CPU free (on a quiet machine taken by the service itself), or blocked.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.bench.record import load_text, median_and_spread, report
from tests.bench.turns import Side, take_turns

PLAIN = "--plain-child"
IN_FLIGHT = 2  # threads of an actor that take turns at generating: the default of actors.in_flight


def main() -> None:
    """Alternate plain and service, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--takes", type=int, default=3)
    parser.add_argument("--frames", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="longtake-world")
    parser.add_argument(PLAIN, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain_child:
        render_plainly(args.model, args.takes, args.frames)
        return
    rounds = [run_round(args) for _ in range(args.rounds)]
    alone = run_alone(args)
    frames = args.takes * args.frames
    rows: list[dict[str, object]] = []
    for name, values in (
        ("plain rollout loop", [r.plain_s for r in rounds]),
        ("service", [r.service_s for r in rounds]),
    ):
        median, spread = median_and_spread(values)
        rows.append({"side": name, "seconds": median, "+-": spread, "frames_per_s": frames / median})
    for name, values in (
        ("service / plain", [r.service_s / r.plain_s for r in rounds]),
        ("the same, CPU time of the generating threads", [r.service_cpu_s / r.plain_cpu_s for r in rounds]),
    ):
        ratio, spread = median_and_spread(values)
        rows.append({"side": name, "ratio": ratio, "+-": spread})
    rows.append({"side": "held beyond rollout and decode", "ratio": alone.beyond_share})
    rows.append({"side": "no take held the GPU", "ratio": alone.idle_share})
    rows.append({"side": "generating threads had no CPU", "ratio": alone.no_cpu_share})
    rows.append({"side": "generating threads were blocked (GIL, queues), at least", "ratio": alone.blocked_share})
    own = statistics.median(r.service_cpu_s / r.plain_cpu_s for r in rounds)
    own += alone.beyond_share + alone.idle_share + alone.blocked_share
    rows.append({"side": "sum without the wait for a CPU (checks counted twice)", "ratio": own})
    per_round = ", ".join(f"{100 * (r.service_s / r.plain_s - 1):+.1f}%" for r in rounds)
    startup = f"From the command to the first take's start: {alone.startup_s:.1f} s."
    notes = f"{load_text()}Overhead per round: {per_round}. {startup}"
    report("overhead", rows, notes)


@dataclass(frozen=True)
class Round:
    """Both sides of one round, in seconds: while they had their turns, and CPU of the threads that generate."""

    plain_s: float
    service_s: float
    plain_cpu_s: float
    service_cpu_s: float


def run_round(args: argparse.Namespace) -> Round:
    """Both sides in turns."""
    plain = start_plain(args)
    service: Side | None = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            service = start_service(args, Path(folder))
            wait_for_first_segment(service, Path(folder))
            take_turns([plain, service])
            if service.process.returncode or plain.process.returncode:
                raise SystemExit(f"exit codes: service {service.process.returncode}, plain {plain.process.returncode}")
            busy_s = service.seconds_between(*busy_between(read_rows(folder)))
        assert plain.process.stdout is not None
        first, last, cpu_s = json.loads(plain.process.stdout.read().splitlines()[-1])
        return Round(
            plain_s=plain.seconds_between(first, last),
            service_s=busy_s,
            plain_cpu_s=cpu_s,
            service_cpu_s=sum(thread.cpu_s for thread in service.busiest(IN_FLIGHT)),
        )
    finally:
        for side in (plain, service):
            if side is not None:
                side.end()


def start_plain(args: argparse.Namespace) -> Side:
    """The bare loop in its own process, as an actor would be; stopped with its model loaded."""
    command = [sys.executable, "-m", "tests.bench.overhead", PLAIN, "--model", args.model]
    command += ["--takes", str(args.takes), "--frames", str(args.frames)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return Side(process)


def start_service(args: argparse.Namespace, folder: Path) -> Side:
    """The command, as a user gives it."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(prompt(index) + "\n" for index in range(args.takes)))
    command = [sys.executable, "-m", "jobs.render", str(prompts), "--out", str(folder), "--job-id", "bench"]
    command += ["--model", args.model, "--frames", str(args.frames), "--actors", "1", "--no-sheet"]
    side = Side(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True))
    side.run()
    return side


def wait_for_first_segment(service: Side, folder: Path) -> None:
    """Return, with the service stopped, when its actor has begun to generate."""
    while not any(folder.glob("bench/_state/segments/*/*.mp4")) and not service.is_done():
        time.sleep(0.01)
    service.stop()


def render_plainly(model_name: str, num_takes: int, num_frames: int) -> None:
    """Say that the model is loaded, roll out and decode all takes, say when this began and ended."""
    import torch

    from workers.assemble import load_model, prepare_take
    from workers.config import BackboneConfig, RenderConfig, VideoConfig
    from workers.metrics import Stopwatch
    from workers.model.attend import RolloutAttention
    from workers.pipeline import TakeRecord, decode, plan_rollout, utc_now
    from workers.rollout import Rollout
    from workers.task import PromptSegment, RenderTask

    torch.set_num_threads(1)
    config = RenderConfig(backbone=BackboneConfig(name=model_name), video=VideoConfig(num_frames=num_frames))
    model = load_model(config)
    print("loaded", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)  # until its first turn
    begun, cpu_begun = time.time(), time.thread_time()
    for index in range(num_takes):
        task = RenderTask(
            task_id=f"take-{index}",
            item_id="take",
            sample_index=index,
            attempt="e1a1",
            segments=(PromptSegment(frame=0, prompt=prompt(index)),),
            seed=index,
            num_frames=num_frames,
        )
        record = TakeRecord(utc_now(), time.perf_counter(), Stopwatch(model.device))
        parts = prepare_take(model, 0)
        attention = RolloutAttention(model.backbone, parts.cache, parts.policy, model.kernel)
        decoder = model.vae.stream()
        with torch.inference_mode():
            for chunk in Rollout(model.dit, attention, record.stopwatch).run(plan_rollout(task, model, record)):
                decode(chunk, decoder, parts, model.device)
    print(json.dumps([begun, time.time(), time.thread_time() - cpu_begun]), flush=True)


@dataclass(frozen=True)
class ServiceRun:
    """One run of the service with nothing beside it: start-up, and shares of the rollout's own time."""

    startup_s: float
    beyond_share: float
    no_cpu_share: float
    blocked_share: float
    idle_share: float


def run_alone(args: argparse.Namespace) -> ServiceRun:
    """What the service says of itself when nobody stops it."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.time()
        service = start_service(args, Path(folder))
        while not service.is_done():
            time.sleep(0.1)
            service.look()
        rows = read_rows(folder)
        by_cause = json.loads((Path(folder) / "bench/_result.json").read_text())["gpu_seconds"]
    pure_s = sum(row["stage_s"][stage] for row in rows for stage in ("text", "denoise", "cache", "vae"))
    held_s = sum(row["gpu_seconds"] for row in rows)
    generating = service.busiest(IN_FLIGHT)
    no_cpu_s = sum(thread.no_cpu_s for thread in generating)
    return ServiceRun(
        startup_s=busy_between(rows)[0] - begun,
        beyond_share=held_s / pure_s - 1,
        no_cpu_share=no_cpu_s / pure_s,
        blocked_share=max(0.0, held_s - no_cpu_s - sum(thread.cpu_s for thread in generating)) / pure_s,
        idle_share=(by_cause["idle"] + by_cause["upload_wait"]) / pure_s,
    )


def read_rows(folder: str) -> list[dict[str, Any]]:
    """What the manifest says of each take."""
    from longtake import open_manifest

    columns = ["started_at", "finished_at", "gpu_seconds", "stage_s"]
    rows: list[dict[str, Any]] = open_manifest(f"{folder}/bench").to_table(columns=columns).to_pylist()
    return rows


def busy_between(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Start of the first take and end of the last one, in seconds since the epoch."""
    first: datetime = min(row["started_at"] for row in rows)
    last: datetime = max(row["finished_at"] for row in rows)
    return first.timestamp(), last.timestamp()


def prompt(index: int) -> str:
    """Prompts that differ, so that nothing is shared between takes."""
    return f"a green meadow with {index + 2} red houses, the camera pans right slowly"


if __name__ == "__main__":
    main()

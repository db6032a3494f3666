"""What the service costs around a render: the bare rollout loop against the whole way into a committed manifest row.

`python -m tests.bench.overhead --takes 3 --frames 192 --rounds 3`

Both sides render the same takes with one actor and one torch thread. "Plain" is model loading apart, then rollout and
decode alone: no Ray, no driver, no checks, no encoder, no store. "Service" is the time in which the driver's actor had
work, from the first take's start to the last one's end; start-up is shown beside it. Rounds alternate, so that a
machine that slows down slows both. The last two rows are shares within the service's own runs, free of that noise: time
for which takes held the GPU beyond their rollout and decode, and time in which no take held it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests.bench.record import median_and_spread, report

PLAIN = "--plain-child"


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
        print(json.dumps({"seconds": plain_seconds(args.model, args.takes, args.frames)}))
        return
    plain, runs = [], []
    for _ in range(args.rounds):
        plain.append(run_plain(args))
        runs.append(run_service(args))
    service, startup = [run.busy_s for run in runs], [run.startup_s for run in runs]
    frames = args.takes * args.frames
    rows = []
    for name, values in (("plain rollout loop", plain), ("service", service)):
        median, spread = median_and_spread(values)
        rows.append(
            {
                "side": name,
                "seconds": median,
                "+-": spread,
                "frames_per_s": frames / median,
                "ratio": median / median_and_spread(plain)[0],
            }
        )
    for name, values in (
        ("held beyond rollout and decode", [run.beyond_share for run in runs]),
        ("no take held the GPU", [run.idle_share for run in runs]),
    ):
        median, spread = median_and_spread(values)
        rows.append({"side": name, "ratio": median, "+-": spread})
    ratios = sorted(s / p for s, p in zip(service, plain, strict=True))
    notes = (
        f"Overhead per round: {', '.join(f'{100 * (r - 1):+.1f}%' for r in ratios)}. "
        f"From the command to the first take's start: {median_and_spread(startup)[0]:.1f} s."
    )
    report("overhead", rows, notes)


def run_plain(args: argparse.Namespace) -> float:
    """The bare loop in its own process, as an actor would be."""
    command = [sys.executable, "-m", "tests.bench.overhead", PLAIN, "--model", args.model]
    command += ["--takes", str(args.takes), "--frames", str(args.frames)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def plain_seconds(model_name: str, num_takes: int, num_frames: int) -> float:
    """Seconds of rollout and decode of all takes, model loaded before."""
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
    begun = time.perf_counter()
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
    return time.perf_counter() - begun


@dataclass(frozen=True)
class ServiceRun:
    """One run of the service, seconds and shares of the rollout's own time."""

    busy_s: float
    startup_s: float
    beyond_share: float
    idle_share: float


def run_service(args: argparse.Namespace) -> ServiceRun:
    """Render the takes through the command, then read its manifest and result."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("".join(prompt(index) + "\n" for index in range(args.takes)))
        command = [sys.executable, "-m", "jobs.render", str(prompts), "--out", folder, "--job-id", "bench"]
        command += ["--model", args.model, "--frames", str(args.frames), "--actors", "1", "--no-sheet"]
        begun = time.time()
        subprocess.run(command, check=True, capture_output=True)
        from longtake import open_manifest

        columns = ["started_at", "finished_at", "gpu_seconds", "stage_s"]
        rows = open_manifest(f"{folder}/bench").to_table(columns=columns).to_pylist()
        by_cause = json.loads((Path(folder) / "bench/_result.json").read_text())["gpu_seconds"]
    first: datetime = min(row["started_at"] for row in rows)
    last: datetime = max(row["finished_at"] for row in rows)
    pure_s = sum(row["stage_s"][stage] for row in rows for stage in ("text", "denoise", "cache", "vae"))
    return ServiceRun(
        busy_s=(last - first).total_seconds(),
        startup_s=first.timestamp() - begun,
        beyond_share=sum(row["gpu_seconds"] for row in rows) / pure_s - 1,
        idle_share=(by_cause["idle"] + by_cause["upload_wait"]) / pure_s,
    )


def prompt(index: int) -> str:
    """Prompts that differ, so that nothing is shared between takes."""
    return f"a green meadow with {index + 2} red houses, the camera pans right slowly"


if __name__ == "__main__":
    main()

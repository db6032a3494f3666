"""Videos per hour with one and with two actors, through the real command on Ray, from the same prompt list.

`python -m tests.bench.scaling --items 24 --frames 192` on a machine with two GPUs: one GPU for each actor.
`python -m tests.bench.scaling --share` two actors on one GPU (0.5 each) against one that has it alone.
`python -m tests.bench.scaling --logical --items 6 --frames 48` on a machine without: GPUs are then only Ray's numbers.
More flags of `longtake render` stand after `--`, such as `-- --width 832 --height 480`.

Throughput counts from the start of the first take to the end of the last one; loading is shown apart. Every video must
have the same frame hash with one actor and with two. What is missing to the ideal is told by cause: takes that became
slower (actors in each other's way: memory, CPU, power), actors without a take (the list ends unevenly, the driver, the
last upload), and waiting for encoder or store.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.start import LocalSize, RayCluster, connect
from longtake import open_manifest
from tests.bench.overhead import prompt
from tests.bench.record import report

COLUMNS = ["item_id", "sample_index", "frames_sha256", "started_at", "finished_at", "gpu_seconds", "upload_wait_s"]


@dataclass(frozen=True)
class Run:
    """One run of the list: seconds, hashes and shares of the time in which actors were up."""

    num_actors: int
    num_videos: int
    command_s: float
    window_s: float
    gpu_s: float
    upload_wait_s: float
    load_s: float
    idle_by_actor: dict[str, float]
    hashes: frozenset[tuple[str, str]]

    @property
    def videos_per_hour(self) -> float:
        return 3600 * self.num_videos / self.window_s

    @property
    def busy_share(self) -> float:
        """Part of the actors' time in which a take held the GPU."""
        return self.gpu_s / (self.num_actors * self.window_s)


def main() -> None:
    """Run the list with each number of actors, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--frames", type=int, default=192)
    parser.add_argument("--actors", type=int, default=2, help="how many are compared with one")
    parser.add_argument("--model", default="longtake-world")
    parser.add_argument("--share", action="store_true", help="all actors on one GPU")
    parser.add_argument("--logical", action="store_true", help="let Ray believe in GPUs that are not there")
    parser.add_argument("flags", nargs="*", help="more flags of `longtake render` for both sides, after --")
    parser.add_argument("--name", default="scaling", help="of the record")
    args = parser.parse_args()
    num_gpus = (1 if args.share else args.actors) if args.logical else None
    part = 1 / args.actors if args.share else 1.0
    with connect("local", local=LocalSize(num_cpus=max(args.actors, os.cpu_count() or 1), num_gpus=num_gpus)) as ray:
        needed = 1 if args.share else args.actors
        if ray.resources().get("GPU", 0) < needed:
            raise SystemExit(f"{needed} GPUs are needed; without them try --share or --logical")
        one = run_list(args, ray, 1, 1.0)
        many = run_list(args, ray, args.actors, part)
    report(args.name, [row_of(one, one, 1.0), row_of(many, one, part)], notes_on(args, one, many))


def run_list(args: argparse.Namespace, ray: RayCluster, num_actors: int, gpus_per_actor: float) -> Run:
    """The whole list through the command, with its own driver and its own actors."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("".join(prompt(index) + "\n" for index in range(args.items)))
        job_id = f"bench-{num_actors}"
        command = [sys.executable, "-m", "jobs.render", str(prompts), "--out", folder, "--job-id", job_id]
        command += ["--model", args.model, "--frames", str(args.frames), "--no-sheet", "--address", ray.address]
        command += ["--actors", str(num_actors), "--actors-gpus-per-actor", str(gpus_per_actor), *args.flags]
        begun = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        command_s = time.monotonic() - begun
        if done.returncode:
            raise SystemExit(f"exit code {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        job = Path(folder) / job_id
        rows = open_manifest(str(job)).to_table(columns=COLUMNS).to_pylist()
        result = json.loads((job / "_result.json").read_text())
    assert len(rows) == args.items
    first, last = min(row["started_at"] for row in rows), max(row["finished_at"] for row in rows)
    window_s = (last - first).total_seconds()
    assert ray.temp_folder is not None
    return Run(
        num_actors=num_actors,
        num_videos=len(rows),
        command_s=command_s,
        window_s=window_s,
        gpu_s=sum(row["gpu_seconds"] for row in rows),
        upload_wait_s=sum(row["upload_wait_s"] for row in rows),
        load_s=result["gpu_seconds"]["load"] / num_actors,
        idle_by_actor=idle_by_actor(rows, who_made_what(ray.temp_folder, job_id), window_s),
        hashes=frozenset((row["item_id"], row["frames_sha256"]) for row in rows),
    )


def who_made_what(ray_folder: Path, job_id: str) -> dict[str, str]:
    """Actor of each task, from the lines that the actors of a job logged."""
    makers = {}
    for file in ray_folder.glob("session_2*/logs/worker-*.err"):
        for text in file.read_text(errors="replace").splitlines():
            line: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
            if line.get("job") == job_id and line.get("message") == "video finished":
                makers[line["task"]] = line["actor"]
    return makers


def idle_by_actor(rows: list[dict[str, Any]], makers: dict[str, str], window_s: float) -> dict[str, float]:
    """Share of the window in which each actor had no take on its GPU."""
    busy_s: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        busy_s[makers[f"{row['item_id']}-{row['sample_index']}"]] += row["gpu_seconds"]
    return {actor: 1 - seconds / window_s for actor, seconds in sorted(busy_s.items())}


def row_of(run: Run, one: Run, gpus_per_actor: float) -> dict[str, object]:
    """One line of the table."""
    return {
        "actors": run.num_actors,
        "GPUs each": gpus_per_actor,
        "seconds": run.window_s,
        "videos/h": run.videos_per_hour,
        "ratio": run.videos_per_hour / one.videos_per_hour,
        "idle share of each actor": ", ".join(f"{100 * share:.1f}%" for share in run.idle_by_actor.values()),
        "GPU s a video": run.gpu_s / run.num_videos,
        "of it waiting for encoder or store": run.upload_wait_s / run.gpu_s,
        "load s an actor": run.load_s,
        "command s": run.command_s,
    }


def notes_on(args: argparse.Namespace, one: Run, many: Run) -> str:
    """Equal frames or not, and what is missing to the ideal."""
    equal = "identical" if one.hashes == many.hashes else "DIFFERENT"
    reached = many.videos_per_hour / one.videos_per_hour / many.num_actors
    slower = (many.gpu_s / many.num_videos) / (one.gpu_s / one.num_videos)
    emptier = many.busy_share / one.busy_share
    text = (
        f"Sets of frame hashes: {equal} ({len(many.hashes)} videos). Reached {100 * reached:.1f}% of "
        f"{many.num_actors} times as many = {100 * emptier:.1f}% (time with a take on the GPU, against one actor) x "
        f"{100 / slower:.1f}% (speed of a take, against one actor)."
    )
    if args.logical:
        text += (
            f" GPUs are logical here: the actors share {os.cpu_count()} CPU cores with driver, encoder and Ray. This "
            "shows that the bench works and that frames agree; it says nothing about GPUs."
        )
    return text


if __name__ == "__main__":
    main()

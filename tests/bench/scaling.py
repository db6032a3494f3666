"""Videos per hour with one and with several actors, through the real command on Ray, from the same prompt lists.

`python -m tests.bench.scaling` on a machine with two GPUs: parts `world` (the bundled model, many short takes) and
`wan` (Wan2.1-1.3B's geometry with random weights from tests.bench.random_wan, two takes of 600 frames);
`--parts memory` is the bundled model with TempCache, for the frame hashes above all.
`python -m tests.bench.scaling --actors 1 --parts world-tiles tiles` on a machine with one GPU: the service alone, with
`--policy fastar-tiles`; `world-tiles` is the bundled model, `tiles` Wan2.1-1.3B's geometry with random weights, two
takes of 1197 frames, whose table merges from frame 552 on. The record is then called service-..., not scaling-...
`python -m tests.bench.scaling --share` two actors on one GPU (0.5 each) against one that has it alone.
`python -m tests.bench.scaling --logical --tiny` on a machine without: GPUs are then only Ray's numbers.
More flags of `longtake render` stand after `--` and go to all runs.

Three clocks, because each answers another question. **First start to last commit** is the job as its owner sees it
once actors are up; it holds what is lost while the second actor still loads, and at the end. **Steady** counts takes
(parts as parts) from the moment at which all actors have a take to that at which the first one has none left.
**Whole command** holds the start of the driver and loading besides, which a job pays once, however many actors load.
Every video must have the same frame hash with one actor and with more. What is missing to the ideal is told by cause.

The record is written anew after each run, so a bench that is cut off leaves what it has measured.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.start import LocalSize, RayCluster, connect
from tests.bench.gpu_watch import GpuWatch
from tests.bench.record import load_text, report
from tests.bench.scaling_run import Part, Run, percents, run_part, table_of

WAN, WHOLE_WAN = "wan-1.3b-test", "wan2.1-t2v-1.3b"
SAMPLED = ("--steps", "4", "--sampling-shift", "5", "--backbone-dtype", "bfloat16")  # as Self-Forcing is
TILES = ("--policy", "fastar-tiles")
WORLD_PARTS: dict[str, tuple[str, ...]] = {
    "world": (),
    "memory": ("--cache", "temporal"),
    "world-tiles": (*TILES, "--backbone-dtype", "bfloat16"),
}
WAN_PARTS: dict[str, tuple[str, ...]] = {"wan": (*SAMPLED, "--cache", "native"), "tiles": (*SAMPLED, *TILES)}
TINY_WAN_PARTS: dict[str, tuple[str, ...]] = {
    "wan": ("--steps", "4", "--cache", "window", "--backbone-dtype", "bfloat16"),
    "tiles": ("--steps", "2", *TILES),
}
MIN_RUN_S = 15.0  # a run is not begun with less time left


@dataclass
class Bench:
    """What is measured, and what has been."""

    args: argparse.Namespace
    until: float
    """time.monotonic() at which the last run must have ended."""
    runs: list[Run] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    num_gpus: float = 0.0

    @property
    def compares(self) -> bool:
        """Are there runs with more actors than one?"""
        return bool(self.args.actors > 1)

    def one(self, part: Part) -> Run | None:
        """The run of this part with one actor."""
        return next((run for run in self.runs if run.part == part and run.num_actors == 1), None)

    def write(self) -> None:
        """Table and record of what there is."""
        if not self.runs:
            return
        table = table_of([(run, self.one(run.part) if self.compares else None) for run in self.runs])
        path = report(self.args.name, table, self.notes())
        if self.args.copy_to is not None:
            self.args.copy_to.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, self.args.copy_to / path.name)
        sys.stdout.flush()

    def notes(self) -> str:
        """What the numbers mean, run by run; and what is not there, with the reason."""
        parts = [note_on(run, self.one(run.part)) if self.compares else idle_note(run) for run in self.runs]
        parts += [f"{name}: not measured: {why.splitlines()[0]}." for name, why in self.failed.items()]
        parts.append(f"GPUs that Ray found: {self.num_gpus:g}.")
        parts.append(f"Flags for all: {' '.join(self.args.flags)}." if self.args.flags else "")
        if self.args.logical:
            parts.append(
                f"GPUs are logical here: the actors share {os.cpu_count()} CPU cores with driver, encoder and Ray. "
                f"This shows that the bench works and that frames agree; it says nothing about GPUs. {load_text()}"
            )
        return " ".join(filter(None, parts))


def main() -> None:
    """Each part with one actor and with several, on one Ray."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # who is told to end leaves no Ray behind
    print(f"begun, {args.limit_s:.0f} s at most", flush=True)
    bench = Bench(args, time.monotonic() + args.limit_s)
    per_card = args.actors if args.share else 1
    with weights_being_written(args) as checkpoint, GpuWatch() as watch, open_ray(args) as ray:
        if not args.logical:
            importlib.import_module("torch")  # the record names the GPU if torch is there to ask
        bench.num_gpus = ray.resources()["GPU"]
        say(f"Ray is up: {ray.resources()}")
        for name in args.parts:
            for num_actors in sorted({1, args.actors}):
                label = f"{name} with {num_actors}"
                gpus = 1.0 if num_actors == 1 else 1.0 / per_card
                with recorded(bench, label):
                    part = make_part(name, args, checkpoint)
                    run = run_one(bench, part, ray, watch, num_actors, gpus)
                    bench.runs.append(run)
                    say(f"{label}: {run.window_s:.1f} s, {run.per_hour:.0f} videos/h, command {run.command_s:.1f} s")
                bench.write()
    for label, why in bench.failed.items():
        say(f"FAILED {label}: {why}")
    if bench.failed:
        raise SystemExit(1)


def parse() -> argparse.Namespace:
    """The command line, with what follows from `--tiny`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=2, help="how many are compared with one; 1: nothing is")
    parser.add_argument("--parts", nargs="+", choices=(*WORLD_PARTS, *WAN_PARTS), default=["world", "wan"])
    parser.add_argument("--world-items", type=int, default=96, help="of world and of world-tiles")
    parser.add_argument("--world-frames", type=int, default=192)
    parser.add_argument("--memory-items", type=int, default=16)
    parser.add_argument("--wan-items", type=int, default=2)
    parser.add_argument("--wan-frames", type=int, default=600)
    parser.add_argument("--tiles-items", type=int, default=2)
    parser.add_argument("--tiles-frames", type=int, default=1197, help="the first of 100 chunks has 9, the others 12")
    parser.add_argument("--wan-model", default=WAN, help=f"{WHOLE_WAN} has the true text encoder, too, of 11 GB")
    parser.add_argument(
        "--wan-checkpoint", type=Path, help="random weights; made there if missing, else in a temporary folder"
    )
    parser.add_argument("--no-compile", action="store_true", help="of the transformer in parts wan and tiles")
    parser.add_argument("--share", action="store_true", help="all actors on one GPU")
    parser.add_argument("--logical", action="store_true", help="let Ray believe in GPUs that are not there")
    parser.add_argument("--tiny", action="store_true", help="small models and pictures, to try the bench")
    parser.add_argument("--limit-s", type=float, default=420.0, help="no run goes on for longer than this in all")
    parser.add_argument("--copy-to", type=Path, help="folder that gets a copy of the record each time it is written")
    parser.add_argument("--name", help="of the record")
    parser.add_argument("flags", nargs="*", help="more flags of `longtake render` for all runs, after --")
    args = parser.parse_args()
    args.name = args.name or record_name(args)
    return args


def record_name(args: argparse.Namespace) -> str:
    """What one actor does alone is another record than what several do beside it."""
    name = "service" if args.actors == 1 else "scaling"
    return (f"{name}_cpu" if args.logical else f"{name}-{card_name()}") + ("_shared" * args.share)


def card_name() -> str:
    """Short name of the first GPU, as it stands in names of records."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise SystemExit("no nvidia-smi, so no GPU: try --logical")
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    known = re.search(r"[A-Z]+\d+", names[0])
    return (known[0] if known else re.sub(r"\W+", "-", names[0]).strip("-")).lower()


def make_part(name: str, args: argparse.Namespace, checkpoint: Callable[[], Path]) -> Part:
    """The prompt list and the flags of a part."""
    flags = tuple(args.flags)
    if name in WORLD_PARTS:
        model = ("--model", "tiny-test", "--width", "64", "--height", "32") if args.tiny else ()
        num_items = args.memory_items if name == "memory" else args.world_items
        return Part(name, num_items, args.world_frames, (*model, *WORLD_PARTS[name], *flags))
    size = ("64", "32") if args.tiny else ("832", "480")
    model = ("--model", wan_model(args), "--checkpoint", str(checkpoint()), "--width", size[0], "--height", size[1])
    settings = TINY_WAN_PARTS[name] if args.tiny else WAN_PARTS[name]
    compiled = () if args.tiny or args.no_compile else ("--backbone-compiled",)
    sizes = {"wan": (args.wan_items, args.wan_frames), "tiles": (args.tiles_items, args.tiles_frames)}
    return Part(name, *sizes[name], (*model, *settings, *compiled, *flags))


def wan_model(args: argparse.Namespace) -> str:
    return "tiny-wan-test" if args.tiny else str(args.wan_model)


def run_one(bench: Bench, part: Part, ray: RayCluster, watch: GpuWatch, num_actors: int, gpus: float) -> Run:
    """A run in the time that is left."""
    left_s = bench.until - time.monotonic()
    if left_s < MIN_RUN_S:
        raise RuntimeError(f"only {left_s:.0f} s were left")
    assert ray.temp_folder is not None
    return run_part(
        part,
        address=ray.address,
        ray_folder=ray.temp_folder,
        watch=watch,
        num_actors=num_actors,
        gpus_per_actor=gpus,
        limit_s=left_s,
    )


@contextmanager
def recorded(bench: Bench, label: str) -> Iterator[None]:
    """A part that fails takes no other along."""
    try:
        yield
    except Exception as error:
        bench.failed[label] = f"{type(error).__name__}: {error}"
        say(f"FAILED {label}: {bench.failed[label]}")


@contextmanager
def weights_being_written(args: argparse.Namespace) -> Iterator[Callable[[], Path]]:
    """Random weights, written by a process of their own while Ray starts; the yielded function waits for them."""
    with tempfile.TemporaryDirectory(prefix="wan-") as temporary:
        folder = args.wan_checkpoint or Path(temporary)
        writer: subprocess.Popen[bytes] | None = None
        if WAN_PARTS.keys() & set(args.parts) and not (folder / "tokenizer").exists():  # which is written last
            command = [sys.executable, "-m", "tests.bench.random_wan", "--out", str(folder), "--model", wan_model(args)]
            writer = subprocess.Popen(command)

        def wait() -> Path:
            if writer is not None and writer.wait() != 0:
                raise RuntimeError(f"tests.bench.random_wan ended with code {writer.returncode}")
            return folder

        try:
            yield wait
        finally:
            if writer is not None and writer.poll() is None:
                writer.kill()
                writer.wait()


@contextmanager
def open_ray(args: argparse.Namespace) -> Iterator[RayCluster]:
    """A local Ray with the GPUs that are asked for."""
    needed = 1 if args.share else args.actors
    size = LocalSize(num_cpus=max(args.actors, os.cpu_count() or 1), num_gpus=needed if args.logical else None)
    with connect("local", local=size) as ray:
        if ray.resources().get("GPU", 0) < needed:
            raise SystemExit(f"{needed} GPUs are needed, Ray found {ray.resources()}; try --share or --logical")
        yield ray


def note_on(run: Run, one: Run | None) -> str:
    """Where what is missing to the ideal went, as factors: lost capacity, and takes that became slower."""
    if one is None or one is run:
        return ""
    equal = "identical" if one.hashes == run.hashes else "DIFFERENT"
    reached = run.per_hour / one.per_hour / run.num_actors
    busy, busy_one = (r.gpu_s * len(r.rows) / (r.num_actors * r.window_s) for r in (run, one))
    return (
        f"{run.part.name}: sets of frame hashes {equal} ({len(run.hashes)} videos); {percents([reached])} of "
        f"{run.num_actors} times as many = {percents([busy / busy_one])} (share of the time with a take on the GPU, "
        f"against one actor) x {percents([one.gpu_s / run.gpu_s])} (speed of a take, against one actor)."
    )


def idle_note(run: Run) -> str:
    """Two numbers that a service is judged by, in words: what was idle, and whether all seconds have a cause."""
    lost = run.lost
    return (
        f"{run.part.name}: of the {run.window_s:.1f} s from first start to last commit the GPU was without a take for "
        f"{lost.all_s:.2f} s ({percents([run.idle_share])}), {lost.between_s:.3f} "
        f"of them between takes; GPU seconds by cause add up to {100 * run.explained:.2f}% of {run.held_s:.1f} held."
    )


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    main()

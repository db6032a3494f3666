"""How fast a video of 3000 frames is made: every policy, the native windows and the dense baseline, in one run.

`python -m tests.bench.rollout` on any CUDA GPU, at the true sizes of Wan2.1 at 480x832 with random weights, through the
product's own classes. `--rows` selects, `--minutes` bounds, `--list` names them. After each row the table is printed
and `results/rollout-<gpu>.json` is written anew. Rows are made by a process of their own: one that breaks its GPU or
hangs takes no other along. A ratio is printed only if the dense baseline was measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import torch

from tests.bench.record import report
from tests.bench.rollout_rows import BASELINE, ROWS, BrokenDevice, RowResult, Settings, as_table, make_row
from workers.kernels.select import Hardware, KernelNeed, Load, choose, load_kernel
from workers.model.backbones import find_backbone
from workers.model.wan_decode_weights import Route

FIRST = ("self-forcing native", "rolling-forcing native", BASELINE)
LAST = ("wan2.1-14b bounded", "radial", "flowcache", "flowcache + radial", "annca", "svg")
"""Around all others, which come in the order of their registration; rows that say eager come at the very end."""
ROWS_FILE, FLASHINFER_FILE = "rows.jsonl", "flashinfer"
_LOOK_S = 0.5


def load_rows() -> None:
    """Import every module that registers rows."""
    for path in sorted(Path(__file__).parent.glob("rollout_*.py")):
        importlib.import_module(f"tests.bench.{path.stem}")


def in_order(names: Sequence[str]) -> list[str]:
    """First the windows and the baseline, then the policies, then what is least missed."""

    def rank(name: str) -> int:
        if name.endswith("eager"):
            return 2000
        return FIRST.index(name) if name in FIRST else 1000 + LAST.index(name) if name in LAST else 500

    return sorted(names, key=rank)


def main(arguments: Sequence[str] | None = None) -> None:
    """Supervise the process that makes the rows, or be it."""
    load_rows()
    asked = parse(arguments)
    if asked.list:
        print("\n".join(in_order(list(ROWS))))
        return
    names = asked.rows.split(",") if asked.rows else in_order(list(ROWS))
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise SystemExit(f"no such rows: {', '.join(unknown)}; --list names them")
    if asked.child:
        sys.argv = sys.argv[: sys.argv.index("--child")]  # what the record shows is the user's command
        work(Path(asked.child), names, asked)
        return
    with tempfile.TemporaryDirectory(prefix="longtake-rollout-") as folder:
        supervise(Path(folder), names, asked)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rollout", description=__doc__)
    parser.add_argument("--rows", help="names, separated by commas, made in this order; all without")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--minutes", type=float, default=30.0, help="after these no row is begun")
    parser.add_argument(
        "--row-seconds", type=float, default=240.0, help="a row that takes longer is given up; fastar-quant takes 170"
    )
    parser.add_argument("--backbone", default="self-forcing-1.3b", help="model of the rows that name none")
    parser.add_argument("--flashinfer", action="store_true", help="build FlashInfer's dense kernel meanwhile (1-2 min)")
    parser.add_argument("--chunks", type=int, default=8, help="chunks of each figure")
    parser.add_argument("--vae", choices=get_args(Route), help="how the VAE decodes; without, as the product does here")
    parser.add_argument(
        "--apart", action="store_true", help="a process for each row, whose peak is then that of a render of its own"
    )
    parser.add_argument("--suffix", default="", help="of the result file, for a run of further rows")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def supervise(folder: Path, names: Sequence[str], asked: argparse.Namespace) -> None:
    """Have a process make the rows; where it dies or hangs, note it and have another one go on."""
    builder = build_flashinfer(folder) if asked.flashinfer else None
    given = asked.row_seconds
    ends_at = time.monotonic() + 60 * asked.minutes
    try:
        while len(done := read_rows(folder)) < len(names) and time.monotonic() < ends_at + given:
            left = max(0.0, ends_at - time.monotonic()) / 60
            code = run_child(folder, num_done=len(done), row_seconds=given, minutes=left)
            if code != 0 and len(read_rows(folder)) < len(names):
                lost = names[len(read_rows(folder))]
                reason = f"took more than {given:.0f} s" if code is None else f"its process ended with {code}"
                add_row(folder, RowResult(lost, notes=f"failed: {reason}"))
                print(f"{lost}: {reason}", flush=True)
        run_child(folder, num_done=len(names), row_seconds=given, minutes=0)  # writes what was noted last
    finally:
        if builder is not None:
            builder.terminate()


def build_flashinfer(folder: Path) -> subprocess.Popen[bytes]:
    """One small call has the library compile its dense kernel; a file appears when it has."""
    command = [sys.executable, "-m", "tests.bench.flashinfer_build", str(folder / FLASHINFER_FILE)]
    return subprocess.Popen(command, env=os.environ | {"MAX_JOBS": str(max(1, (os.cpu_count() or 1) // 2))})


def run_child(folder: Path, *, num_done: int, row_seconds: float, minutes: float) -> int | None:
    """Exit code of a process that makes the rows that are left, or None if one of them took too long."""
    command = [sys.executable, "-m", "tests.bench.rollout", *sys.argv[1:]]
    command += ["--child", str(folder), "--minutes", f"{minutes:.2f}"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    seen, since = num_done, time.monotonic()
    while process.poll() is None:
        time.sleep(_LOOK_S)
        if len(read_rows(folder)) > seen:
            seen, since = len(read_rows(folder)), time.monotonic()
        if time.monotonic() - since > row_seconds:
            process.kill()
            process.wait()
            return None
    return process.returncode


def work(folder: Path, names: Sequence[str], asked: argparse.Namespace) -> None:
    """The process that makes rows: those that are not there yet, one after the other."""
    settings = make_settings(asked, folder)
    hardware = Hardware.of(settings.device)
    describe(settings)
    write(folder, settings, asked.suffix)
    left = names[len(read_rows(folder)) :]
    for name in left[:1] if asked.apart else left:
        begun = time.monotonic()
        print(f"\n== {name}", flush=True)
        settings = replace(settings, has_flashinfer=(folder / FLASHINFER_FILE).exists())
        try:
            result = make_row(name, settings, hardware)
        except BrokenDevice as broken:
            add_row(folder, broken.args[0])
            raise SystemExit(3) from broken
        add_row(folder, result)
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
        write(folder, settings, asked.suffix)


def make_settings(asked: argparse.Namespace, folder: Path) -> Settings:
    """True sizes in bfloat16 on a GPU; on a CPU whatever model is named, as it is in tests."""
    is_cuda = torch.cuda.is_available()
    backbone = find_backbone(asked.backbone)
    settings = Settings(
        backbone=backbone,
        width=backbone.width,
        height=backbone.height,
        device=torch.device("cuda" if is_cuda else "cpu"),
        dtype=torch.bfloat16 if is_cuda else torch.float32,
        timed_chunks=asked.chunks,
        vae_route=asked.vae,
        compiled=is_cuda,
        ends_at=time.monotonic() + 60 * asked.minutes,
    )
    return settings


def describe(settings: Settings) -> None:
    """What the figures depend on; one line says which kernel runs and what this GPU lacks for the others."""
    print(machine(settings), flush=True)
    need = KernelNeed(settings.dtype, settings.backbone.head_dim)
    print(kernel_line(Hardware.of(settings.device), need, load_kernel), flush=True)


def kernel_line(hardware: Hardware, need: KernelNeed, load: Load) -> str:
    """The fastest kernel that can run here, and what keeps those before it from running."""
    choice = choose("auto", hardware, need, load)
    return f"attention: {choice.kernel.version}" + "".join(f"; not {name}: {why}" for name, why in choice.refused)


def machine(settings: Settings) -> str:
    """Device, clocks and versions."""
    text = f"torch {torch.__version__}"
    if settings.device.type != "cuda":
        return f"no GPU; {text}"
    fields = "name,driver_version,power.limit,clocks.sm,clocks.mem,clocks.max.sm"
    asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        told = torch.cuda.get_device_name()
    return (
        f"{told} (name, driver, power limit, SM clock, memory clock, highest SM clock); {text}, CUDA "
        f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    )


def write(folder: Path, settings: Settings, suffix: str = "") -> None:
    """The table so far."""
    results = read_rows(folder)
    if not results:
        return
    notes = (
        f"{machine(settings)}. {settings.backbone.name} at {settings.width}x{settings.height} unless a row names "
        f"another model, random weights and random keys; {settings.timed_chunks} chunks of "
        f"{settings.chunk_frames} video frames for each figure; seconds_3000_frames is integrated over the chunks. "
        "GB are 10^9 bytes."
    )
    if not any(result.policy == BASELINE and result.seconds_3000_frames for result in results):
        notes += " No speed-up is given: the dense baseline was not measured in this run."
    report(f"rollout-{slug(settings)}{suffix and '-'}{suffix}", as_table(results), notes)
    sys.stdout.flush()


def slug(settings: Settings) -> str:
    if settings.device.type != "cuda":
        return "cpu"
    return "-".join(torch.cuda.get_device_name().lower().removeprefix("nvidia ").split())


def read_rows(folder: Path) -> list[RowResult]:
    path = folder / ROWS_FILE
    if not path.exists():
        return []
    return [RowResult(**json.loads(line)) for line in path.read_text().splitlines() if line.endswith("}")]


def add_row(folder: Path, result: RowResult) -> None:
    with (folder / ROWS_FILE).open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


if __name__ == "__main__":
    main()

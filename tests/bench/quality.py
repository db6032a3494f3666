"""What compression and sparsity cost: every policy on the bundled world model, with known ground truth.

`python -m tests.bench.quality` measures with as many processes as asked for and writes results/quality.json:
`--gpus 2 --per-gpu 4 --minutes 9` on two GPUs (with `nvidia-cuda-mps-control -d` about
twice as many pieces fit into the time); on a CPU ask for less (`--worlds 2 --frames 720 --policies dense ...`).

Parts: `walk` (a long walk with the true history in the policy's own cache; at a fifth, a half and the end of it hard
cuts back to places seen before, recall, one-step error, bytes), `variants` (the same with single settings varied),
`groups` (the same at half the length, by kind of world), `adaptive` (fixed densities against recall targets), `rollout`
(free rollouts, the distance to dense with the same noise). `quality_turns.py` has the time per chunk; `--merge` puts
result files together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from tests.bench.quality_items import PARTS, Item, Part, list_items, release_claims, work
from tests.bench.quality_lab import QualityLab
from tests.bench.quality_policies import ALL
from tests.bench.quality_rows import add_times, failures, make_rows, read_pieces
from tests.bench.record import RESULTS, report

_ROW_NAME = ("part", "policy", "group", "frames")
"""What tells a row of one result file from others, and is the same in two files that measured the same."""
_TO_GATHER_S = 90.0
"""Kept for making the table when the minutes are short."""
_NOTES = (
    "Held-out worlds. recall: dense softmax mass on what was kept; strict_recall: sum of min(p, p') over the entries "
    "of the cache, mean over layers, heads and steps of the chunks that were made (docs/memory.md). density: pairs "
    "of query and key computed, over those of dense full history. kv_share_of_full: of a bfloat16 cache of the whole "
    "history. revisit: hard cuts back to places last seen 42 to 600 latent frames before. psnr_db, ssim, "
    "one_step_error (RMS of latents): against dense with the same true history and noise; psnr_db_at_frame of free "
    "rollouts. seconds_per_chunk_at: of quality_turns, by video frame; paired_time_end_to_600: a chunk at frame 3000 "
    "over one at 600 made beside it. ci95: half the width over worlds. LPIPS is null: its weights are not bundled."
)


def run_workers(options: argparse.Namespace, folder: Path) -> None:
    """Processes that share the pieces among them, until all are done or it is late."""
    started = time.time()
    until = started + 60 * options.minutes - _TO_GATHER_S
    command = [sys.executable, "-m", "tests.bench.quality", *sys.argv[1:], "--folder", str(folder)]
    workers = []
    release_claims(folder)
    for turn in range(max(1, options.gpus) * options.per_gpu):
        rank, gpu = divmod(turn, max(1, options.gpus))
        takes_heavy = rank < options.heavy
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        if options.gpus:
            environment |= {
                "CUDA_VISIBLE_DEVICES": _device(gpu),
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            }
        mine = [*command, "--work-until", str(until), *(["--takes-heavy"] if takes_heavy else [])]
        workers.append(subprocess.Popen(mine, env=environment))
    for worker in workers:
        try:
            worker.wait(max(1.0, until + _TO_GATHER_S / 3 - time.time()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    print(f"workers: {time.time() - started:.0f} s", flush=True)


def open_lab(options: argparse.Namespace) -> QualityLab:
    """The model as asked for; `auto` is bfloat16 on a GPU if a short walk succeeds in it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dtype != "auto":
        return QualityLab(device, options.dtype, options.weights)
    if device.type == "cpu":
        return QualityLab(device, "float32", options.weights)
    try:
        lab = QualityLab(device, "bfloat16", options.weights)
        lab.walk(lab.walks("still", [0, 1], 720), lab.model(ALL["fastar-quant"]), [59])
    except (RuntimeError, ValueError) as error:
        print(f"bfloat16 does not work here ({error}): float32", flush=True)
        return QualityLab(device, "float32", options.weights)
    return lab


def gather(folder: Path, lab: QualityLab, measured_on: str | None) -> tuple[list[dict[str, Any]], str]:
    """Rows of all pieces in the folder, and the notes, which name the machine of the pieces."""
    pieces = read_pieces(folder, lab.revision)
    rows = list(make_rows(pieces, lab))
    turns = RESULTS / "quality_turns.json"
    if turns.exists():
        add_times(rows, json.loads(turns.read_text()), lab.revision)
    dtypes = sorted({found.record["dtype"] for found in pieces.values()})
    failed = failures(folder)
    devices = sorted({found.record.get("device", measured_on or "unknown") for found in pieces.values()})
    notes = f"weights {lab.revision[:16]}; {', '.join(dtypes)}. Pieces measured on {'; '.join(devices)}. {_NOTES}"
    return rows, notes + (f" Failed: {'; '.join(failed)}" if failed else "")


def merge(names: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """Rows of result files that were measured apart, the later in the place of the earlier of the same name; each row
    keeps its device, commit and command."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    notes = []
    for name in names:
        record = json.loads((RESULTS / f"{name}.json").read_text())
        made_by = {key: record[key] for key in ("device", "commit", "command")}
        rows |= {tuple(row.get(key) for key in _ROW_NAME): made_by | row for row in record["rows"]}
        notes.append(record["notes"])
    return list(rows.values()), " ".join(dict.fromkeys(notes))


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--worlds", type=int, default=32, help="of walks; kinds of worlds and rollouts have half of them"
    )
    parser.add_argument("--batch", type=int, default=16, help="worlds side by side")
    parser.add_argument("--frames", type=int, default=3000, help="longest length, video frames")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=get_args(Part))
    parser.add_argument("--policies", nargs="*", default=list(ALL), choices=list(ALL), metavar="POLICY")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--weights", type=Path, help="folder of weights; without it the bundled ones")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--per-gpu", type=int, default=1, help="processes a GPU, or on the CPU")
    parser.add_argument("--heavy", type=int, default=2, help="of them, how many take policies with a growing cache")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a process")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop then, with what there is")
    parser.add_argument("--folder", type=Path, help="where pieces are kept; a run goes on from what it finds there")
    parser.add_argument("--name", default="quality", help="name of the result file")
    parser.add_argument("--gather", action="store_true", help="rows of what the folder holds; measures nothing")
    parser.add_argument("--measured-on", help="with --gather: machine of pieces that do not name theirs")
    parser.add_argument("--merge", nargs="*", default=[], help="put these result files together; measures nothing")
    parser.add_argument("--work-until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--takes-heavy", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = read_options()
    if options.merge:
        report(options.name, *merge(options.merge))
        return
    torch.set_num_threads(options.threads)
    folder: Path = options.folder or Path(tempfile.mkdtemp(prefix="quality-"))
    folder.mkdir(parents=True, exist_ok=True)
    if options.work_until is not None:
        items: list[Item] = list_items(options.parts, options.policies, options.worlds, options.batch, options.frames)
        work(items, open_lab(options), folder, takes_heavy=options.takes_heavy, until=options.work_until)
        return
    if not options.gather:
        run_workers(options, folder)
    options.dtype = "float32"
    report(options.name, *gather(folder, open_lab(options), options.measured_on))


def _device(index: int) -> str:
    """Of those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[index] if visible else str(index)


if __name__ == "__main__":
    main()

"""Takes over a tile table (policy fastar-tiles) through the worker, and a snapshot of one that goes on elsewhere.

`python -m tests.bench.table_takes` renders with the bundled model, then with Wan2.1-1.3B's sizes and random weights,
plain and compiled; each part says what it measured as soon as it has, and a part that fails takes no other along. On a
CPU the tiny models stand in for both: `--quick`.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.bench.random_wan import write_random_wan
from tests.bench.record import report
from workers import assemble_tiles
from workers.actor import RenderActor
from workers.assemble import LoadedModel, load_model
from workers.config import RenderConfig
from workers.metrics import Stopwatch
from workers.model.backbones import find_backbone
from workers.pipeline import TakeRecord, plan_rollout, utc_now
from workers.snapshot import RolloutId, read_snapshot, write_snapshot
from workers.task import PromptSegment, RenderResult, RenderSetup, RenderTask
from workers.video.decode import probe

Record = dict[str, Any]

SMALL: Record = {"budget_latent_frames": 24, "spare_latent_frames": 6}
"""Of the cache: its file is as large as the table, whatever is in it."""


def make_task(num_frames: int) -> RenderTask:
    segment = PromptSegment(frame=0, prompt="a red valley with a lake, the camera pans left")
    return RenderTask(
        task_id="take-0", item_id="take", sample_index=0, attempt="e1a1", segments=(segment,), seed=7,
        num_frames=num_frames,
    )  # fmt: skip


def render_takes(name: str, record: Record, num_frames: int, root: Path) -> Record:
    """Two takes of the same seed by one actor, decoded again; the second one is timed."""
    began = time.perf_counter()
    config = RenderConfig.model_validate({"policy": "fastar-tiles", **record})
    actor = RenderActor(RenderSetup(job_id="job", config=config, store_url=str(root)))
    actor.load()
    load_s, results = time.perf_counter() - began, []
    for _ in range(2):
        (result,) = actor.run([make_task(num_frames)])
        assert isinstance(result, RenderResult), result
        results.append(result)
    actor.close()
    first, last = results
    video = probe(root / last.video_key)
    assert video.num_frames == num_frames
    denoising_s = last.stage_s.denoise + last.stage_s.cache
    late = last.chunks[len(last.chunks) // 2 :]
    return {
        "take": name,
        "frames": num_frames,
        "fps_denoising": num_frames / denoising_s,
        "fps_with_pictures": num_frames / last.gpu_s,
        "fps_second_half": num_frames / len(last.chunks) * len(late) / sum(chunk.seconds for chunk in late),
        "cache_share": last.stage_s.cache / denoising_s,
        "vae_wait_s": last.stage_s.vae,
        "load_s": load_s,
        "kv_policy": last.kv_policy,
        "kv_gb": last.kv_bytes / 1e9,
        "density": last.chunks[-1].density,
        "peak_gb": last.peak_gpu_bytes / 1e9,
        "backend": last.backend,
        "same frames twice": first.frames_sha256 == last.frames_sha256,
        "file decoded again": video.num_frames == num_frames,
    }


@torch.inference_mode()
def latents_from(model: LoadedModel, task: RenderTask, snapshot: Path | None = None) -> Iterator[tuple[int, str]]:
    """(chunk, hash of its latents): from the start, or from where a snapshot stands."""
    assert model.seat is not None
    record = TakeRecord(utc_now(), time.perf_counter(), Stopwatch(model.device))
    rollout, first = model.seat.begin_take(), 0
    if snapshot is not None:
        first = read_snapshot(snapshot, rollout_id(model, task), model.seat.table)
    for chunk in rollout.run(plan_rollout(task, model, record), first):
        yield chunk.index, hashlib.sha256(chunk.latents_BTCHW.cpu().numpy().tobytes()).hexdigest()


def rollout_id(model: LoadedModel, task: RenderTask) -> RolloutId:
    return RolloutId(model.config.fingerprint, model.revision, task.task_id, task.seed)


def resume_elsewhere(name: str, record: Record, num_frames: int, root: Path) -> Record:
    """A snapshot in the middle of a rollout; another process takes it up and must make the same latents."""
    model, task = load_model(RenderConfig.model_validate({"policy": "fastar-tiles", **record})), make_task(num_frames)
    assert model.seat is not None
    hashes: dict[int, str] = {}
    middle, seconds, size = model.backbone.num_chunks(num_frames) // 2, 0.0, 0
    path = root / "rollout.safetensors"
    for index, digest in latents_from(model, task):
        hashes[index] = digest
        if index == middle:
            began = time.perf_counter()
            size = write_snapshot(path, rollout_id(model, task), index + 1, model.seat.table)
            seconds = time.perf_counter() - began
    model.seat.release()
    asked = json.dumps({"record": record, "frames": num_frames, "snapshot": str(path)})
    plain = ["--no-table-kernels"] if assemble_tiles.KERNELS_FROM == (99, 0) else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.table_takes", *plain, "--resume", asked],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    resumed = {int(k): v for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    after = {index: digest for index, digest in hashes.items() if index > middle}
    return {
        "take": f"{name}, resumed", "chunks after the snapshot": len(after), "snapshot_gb": size / 1e9,
        "snapshot_s": seconds, "same latents in another process": resumed == after,
    }  # fmt: skip


def resume(asked: str) -> None:
    """Body of the other process: hashes as one JSON line."""
    given = json.loads(asked)
    model = load_model(RenderConfig.model_validate({"policy": "fastar-tiles", **given["record"]}))
    print(json.dumps(dict(latents_from(model, make_task(given["frames"]), Path(given["snapshot"])))), flush=True)


def wan(folder: Path, *, compiled: bool, quick: bool) -> Record:
    """Wan2.1-1.3B's sizes, sampled as Self-Forcing is."""
    if quick:
        backbone: Record = {"name": "tiny-wan-test", "checkpoint": str(folder), "compiled": compiled}
        return {"backbone": backbone, "sampling": {"num_steps": 2, "shift": 5.0}, "video": {"width": 64, "height": 32}}
    return {
        "backbone": {"name": "wan-1.3b-test", "checkpoint": str(folder), "dtype": "bfloat16", "compiled": compiled},
        "sampling": {"num_steps": 4, "shift": 5.0},
        "video": {"width": 832, "height": 480},
    }


def release_memory() -> None:
    """What one part held of the GPU, for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def weights(*, quick: bool) -> Iterator[Path]:
    """A folder of random weights for as long as it is used."""
    with tempfile.TemporaryDirectory() as folder:
        write_random_wan(Path(folder), find_backbone("tiny-wan-test" if quick else "wan-1.3b-test"))
        yield Path(folder)


def parts(folder: Path, root: Path, frames: int, *, quick: bool) -> dict[str, Callable[[], Record]]:
    """What is measured, in this order."""
    world: Record = {"backbone": {"name": "tiny-test" if quick else "longtake-world"}}
    world |= (
        {"video": {"width": 64, "height": 32}} if quick else {"backbone": world["backbone"] | {"dtype": "bfloat16"}}
    )
    plain, compiled = (wan(folder, compiled=c, quick=quick) for c in (False, True))
    whole = frames + 9 - 12  # Wan's first chunk has 9 pictures
    return {
        "bundled": lambda: render_takes("bundled model", world, frames, root),
        "bundled-resumed": lambda: resume_elsewhere("bundled model", world, frames, root),
        "wan": lambda: render_takes("1.3B", plain, whole, root),
        "wan-compiled": lambda: render_takes("1.3B, compiled", compiled, whole, root),
        "wan-resumed": lambda: resume_elsewhere("1.3B, a small table", plain | {"cache": SMALL}, whole, root),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=252, help="of each take: whole chunks of 12")
    parser.add_argument(
        "--parts", nargs="*", default=None, help="bundled, bundled-resumed, wan, wan-compiled, wan-resumed"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--name", default="table-takes", help="of the result file")
    parser.add_argument("--no-table-kernels", action="store_true", help="as on a GPU that the table's kernels lack")
    parser.add_argument("--resume", default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)  # on a CPU the last bits depend on it
    if asked.no_table_kernels:
        assemble_tiles.KERNELS_FROM = (99, 0)
    if asked.resume is not None:
        resume(asked.resume)
        return
    rows: list[Record] = []
    with weights(quick=asked.quick) as folder, tempfile.TemporaryDirectory() as root:
        todo = parts(folder, Path(root), asked.frames, quick=asked.quick)
        for name in asked.parts or todo:
            began = time.perf_counter()
            try:
                rows.append(todo[name]())
            except Exception as error:  # the others are still measured
                traceback.print_exc()
                rows.append({"take": name, "failed": f"{type(error).__name__}: {str(error)[:300]}"})
            print(f"{name}: {time.perf_counter() - began:.1f} s {json.dumps(rows[-1])}", flush=True)
            release_memory()
            report(asked.name, rows, "Random weights for 1.3B; the second of two takes is timed.")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Frames per second of the bundled model without a GPU, as the service renders them.

`python -m tests.bench.world_model_cpu`: rollout and VAE decode with all cores of the machine; encoding and upload are
not in it. Chunks are timed when the cache has its final size: a window of 24 latent frames, and 180 latent frames of
full history. `world_model --collect` puts the rows beside what the same weights can do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch

from tests.bench.record import report
from workers.assemble import load_model, prepare_take
from workers.checkpoints.files import open_weights
from workers.config import (
    BUNDLED_WEIGHTS,
    BackboneConfig,
    CacheConfig,
    DenseCacheConfig,
    RenderConfig,
    VideoConfig,
    WindowCacheConfig,
)
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.pipeline import TakeRecord, decode, plan_rollout, utc_now
from workers.rollout import Rollout
from workers.task import PromptSegment, RenderTask

CHUNK_FRAMES = 12


def chunk_seconds(cache: CacheConfig, dtype: str, num_chunks: int, timed: int) -> list[float]:
    """Seconds of each of the last ``timed`` chunks of a take."""
    frames = num_chunks * CHUNK_FRAMES
    config = RenderConfig(
        backbone=BackboneConfig(dtype=dtype),  # type: ignore[arg-type]
        cache=cache,
        video=VideoConfig(num_frames=frames),
    )
    model = load_model(config)
    prompt = PromptSegment(frame=0, prompt="a grassy valley with red houses, the camera pans east")
    task = RenderTask(
        task_id="t", item_id="t", sample_index=0, attempt="e1a1", segments=(prompt,), seed=1, num_frames=frames
    )
    record = TakeRecord(utc_now(), time.perf_counter(), Stopwatch(model.device))
    parts = prepare_take(model, 0)
    attention, decoder = RolloutAttention(model.backbone, parts.cache, parts.policy, model.kernel), model.vae.stream()
    seconds, before = [], time.perf_counter()
    with torch.inference_mode():
        for chunk in Rollout(model.dit, attention, record.stopwatch).run(plan_rollout(task, model, record)):
            decode(chunk, decoder, parts, model.device)
            now = time.perf_counter()
            seconds.append(now - before)
            before = now
    return seconds[-timed - 1 : -1]  # the very last chunk has no clean pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timed", type=int, default=8, help="chunks timed")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    full: tuple[str, CacheConfig, int, float] = ("full 180", DenseCacheConfig(), 60 + options.timed, 12.0)
    window: tuple[str, CacheConfig, int, float] = ("window 3 + 21", WindowCacheConfig(), 9 + options.timed, 24.0)
    for form, cache, chunks, goal in (window, full):
        for dtype in ("float32", "bfloat16"):
            times = chunk_seconds(cache, dtype, chunks, options.timed)
            fps = [CHUNK_FRAMES / value for value in times]
            row = {"figure": "cpu_fps", "form": form, "dtype": dtype, "value": statistics.median(fps)}
            rows.append(
                row | {"least": min(fps), "greatest": max(fps), "goal": goal, "threads": torch.get_num_threads()}
            )
    load = os.getloadavg()[0]
    weights = f"weights {open_weights(BUNDLED_WEIGHTS).revision[:16]}"
    notes = f"{weights}; median of {options.timed} chunks of 12 video frames; load average {load:.1f}"
    report("world_model_cpu", rows, notes)


if __name__ == "__main__":
    main()

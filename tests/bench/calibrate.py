"""Which layers of the bundled model are sparse: `python -m tests.bench.calibrate` (some minutes on a CPU).

Rolls out a few prompts with AnnSA in every layer and step, measures the exact recall of each layer and head, and writes
the calibration file of the model (`--out`). The table is the recall by layer.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.bench.record import report
from workers.assemble import LoadedModel, load_model
from workers.attention.ann_self import AnnSelfAttention, AnnSettings
from workers.attention.calibrate import Calibration, choose_layers, write_calibration
from workers.attention.measure import Reading, RecallMeter
from workers.cache.dense import DenseCache
from workers.config import RenderConfig, SearchName, VideoConfig
from workers.contracts import KeyValues
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.pipeline import TakeRecord, plan_rollout, utc_now
from workers.rollout import Rollout
from workers.search.select import make_search
from workers.task import PromptSegment, RenderTask

PROMPTS = (
    "a grassy valley with red houses, the camera wanders",
    "a snowy field with blue tents and many green towers, the camera pans slowly to the north west",
    "a desert with white rocks and yellow trees, the camera pans east",
)
SEARCH: SearchName = "quant"


def readings(model: LoadedModel, settings: AnnSettings, prompt: str, seed: int) -> Iterator[Reading]:
    """Recall of the second half of one take, layer by layer and step by step."""
    frames = model.config.video.num_frames
    segment = PromptSegment(frame=0, prompt=prompt)
    task = RenderTask(
        task_id="t", item_id="t", sample_index=0, attempt="e1a1", segments=(segment,), seed=seed, num_frames=frames
    )
    cache, made = DenseCache(model.backbone.num_layers), list[RolloutAttention]()

    def rotate(keys: KeyValues) -> KeyValues:
        return made[0].rotate_cached(keys)

    chunks = model.backbone.num_chunks(frames)
    meter = RecallMeter(cache, every_chunks=max(1, chunks // 8), dtype=torch.float32, num_queries=24)
    policy = AnnSelfAttention(settings, make_search(SEARCH), rotate)
    made.append(RolloutAttention(model.backbone, cache, policy, model.kernel, probes=(meter,)))
    record = TakeRecord(utc_now(), time.perf_counter(), Stopwatch(model.device))
    with torch.inference_mode():
        for _ in Rollout(model.dit, made[0], record.stopwatch).run(plan_rollout(task, model, record)):
            pass
    return (reading for reading in meter.readings if reading.moment.chunk_index >= chunks // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--density", type=float, default=0.3, help="share of the history's tiles in each layer")
    parser.add_argument("--share", type=float, default=0.7, help="share of the layers that are to be sparse")
    parser.add_argument("--latent-frames", type=int, default=90)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--out", type=Path, help="calibration file; that of the bundled model is weights/annsa.json")
    options = parser.parse_args()
    model = load_model(RenderConfig(video=VideoConfig(num_frames=4 * options.latent_frames)))
    frame_tokens = model.backbone.tokens_per_latent_frame(128, 128)
    tile = min(128, frame_tokens)
    settings = AnnSettings(3 * frame_tokens, 6 * frame_tokens, options.density, query_tile=tile, key_tile=tile)
    found: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    for seed, prompt in enumerate(PROMPTS[: options.prompts]):
        for reading in readings(model, settings, prompt, seed):
            found[reading.layer_index].append(reading.recall_BN.mean(0).float())
    by_layer = {layer: torch.stack(found[layer]).mean(0) for layer in sorted(found)}
    sparse = choose_layers([heads.mean().item() for heads in by_layer.values()], options.share)
    rows: list[dict[str, Any]] = []
    for layer, heads in by_layer.items():
        row: dict[str, Any] = {"layer": layer, "recall": heads.mean().item()}
        rows.append(row | {"worst_head": heads.min().item(), "sparse": layer in sparse})
    calibration = Calibration(
        backbone=model.backbone.name,
        revision=model.revision,
        policy=f"annsa {SEARCH}",
        density=options.density,
        num_prompts=options.prompts,
        num_latent_frames=options.latent_frames,
        recall_by_layer=tuple(tuple(round(x, 4) for x in heads.tolist()) for heads in by_layer.values()),
        sparse_layers=sparse,
    )
    if options.out is not None:
        write_calibration(options.out, calibration)
    report("calibrate", rows, f"{options.prompts} prompts, {options.latent_frames} latent frames; {calibration.policy}")


if __name__ == "__main__":
    main()

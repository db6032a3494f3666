"""What a cache that persists between clips costs and changes (`workers/rollouts/clipwise.py`), on a tiny random model.

`python -m tests.bench.clip_cache`: clips of LongVie 2's length through a model of its build with random weights. Bytes
and calls are exact; how far the latents move says that the cache acts and how near a smaller one stays to full
history, not what a trained model would make of it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tests.bench.record import report
from tests.plain_rollouts import make_model
from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.cache.temporal_merge import MergeSettings, TemporalCache
from workers.cache.window import WindowCache
from workers.contracts import KVCache
from workers.denoise import make_flow_schedule
from workers.kernels.sdpa import SdpaKernel
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import ControlBranchSizes, find_backbone
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT
from workers.rollout import CleanChunk
from workers.rollouts.clip_inputs import ClipInputs, condition_of, control_of, project_clip_prompt
from workers.rollouts.clipwise import ClipPlan, ClipwiseRollout
from workers.search.select import make_search

LATENT, TOKENS, KEPT = (8, 12), 24, 18
TINY = replace(
    find_backbone("longvie2-14b"),
    name="longvie2-tiny",
    dim=160,
    num_layers=4,
    num_heads=4,
    ffn_dim=320,
    text_dim=32,
    image_dim=32,
    control_branch=ControlBranchSizes(dim=80, num_layers=2, num_heads=2, ffn_dim=160),
)


def make_clips(dit: CausalDiT, branch: ControlBranch, num_clips: int) -> list[ClipInputs]:
    """Inputs that change slowly from clip to clip, as those of one video do."""
    generator = torch.Generator().manual_seed(4)

    def draw(frames: int = TINY.chunk_latent_frames) -> Tensor:
        return torch.randn(1, frames, 16, *LATENT, generator=generator)

    scene, noise = [draw() for _ in range(5)], draw()
    prompt = project_clip_prompt(
        dit, branch, torch.randn(1, 12, 32, generator=generator), torch.randn(1, 17, 32, generator=generator)
    )
    clips = []
    for index in range(num_clips):
        first, depth, depth_first, track, track_first = (0.9 * x + 0.43 * draw() for x in scene)
        clips.append(
            ClipInputs(
                noise_BTCHW=noise,
                prompts=(prompt,),
                condition_BTCHW=condition_of(first, TINY),
                dense_BTCHW=control_of(depth, depth_first, TINY),
                sparse_BTCHW=control_of(track, track_first, TINY),
                history_BTCHW=draw(2) if index else None,
            )
        )
    return clips


def temporal(num_frames: int, storage: str) -> TemporalCache:
    """Three latent frames each as sink and as recent ones, the rest in groups."""
    settings = MergeSettings(
        sink_tokens=3 * TOKENS,
        recent_tokens=3 * TOKENS,
        num_groups=num_frames * TOKENS,
        min_cosine=0.9,
        storage=storage,  # type: ignore[arg-type]
    )
    return TemporalCache(TINY.num_layers, settings, make_search("exact").top1)


CACHES: dict[str, Callable[[], KVCache] | None] = {
    "native: none": None,
    "full history": lambda: DenseCache(TINY.num_layers),
    "window: one clip": lambda: WindowCache(TINY.num_layers, sink_tokens=0, recent_tokens=KEPT * TOKENS),
    "temporal, 24 frames": lambda: temporal(24, "model"),
    "temporal, 24 frames, int8": lambda: temporal(24, "int8"),
}


def roll(
    models: tuple[CausalDiT, ControlBranch], clips: list[ClipInputs], make_cache: Callable[[], KVCache] | None
) -> tuple[list[CleanChunk], float]:
    """All clips, and the seconds that they took."""
    cache = DenseCache(TINY.num_layers) if make_cache is None else make_cache()
    kernel = SdpaKernel()
    attention = RolloutAttention(TINY, cache, DenseAttention(), kernel)
    plan = ClipPlan(
        num_clips=len(clips),
        schedule=make_flow_schedule(6, 5.0),
        guidance=1.0,
        read=lambda index, before: clips[index],
        remembers=make_cache is not None,
    )
    started = time.perf_counter()
    chunks = list(ClipwiseRollout(*models, attention, kernel, Stopwatch(torch.device("cpu"))).run(plan))
    return chunks, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dit = make_model(TINY)
    torch.manual_seed(1)
    models = dit, ControlBranch(TINY).eval().requires_grad_(False)
    clips = make_clips(*models, args.clips)
    made = {name: roll(models, clips, make_cache) for name, make_cache in CACHES.items()}
    full = made["full history"][0]
    rows = []
    for name, (chunks, seconds) in made.items():
        last = chunks[-1]
        error = last.latents_BTCHW - full[-1].latents_BTCHW
        rows.append(
            {
                "cache": name,
                "calls per clip": 6 if CACHES[name] is None else 7,
                "KiB at the end": round(last.kv_bytes / 1024, 1),
                "of full history": round(last.kv_bytes / full[-1].kv_bytes, 3),
                "density": round(last.density, 3),
                "rms from full history": round(float(error.square().mean().sqrt()), 4),
                "seconds": round(seconds, 2),
            }
        )
    std = float(full[-1].latents_BTCHW.std())
    report("clip_cache", rows, f"{args.clips} clips, random weights; last clip, latents of std {std:.2f}")


if __name__ == "__main__":
    main()

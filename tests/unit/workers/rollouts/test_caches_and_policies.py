"""Every rollout with the temporal cache (equal to full history while nothing merges) and with every sparse policy."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.plain_rollouts import COLUMNS, FRAMES, ROWS, TINY, TOKENS, make_model
from workers.assemble_policies import make_policy, make_prompt_attention
from workers.attention.ann_cross import AnnPromptAttention
from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.cache.temporal_merge import MergeSettings, TemporalCache
from workers.config import (
    AnnPromptConfig,
    AnnSelfAttentionConfig,
    AttentionConfig,
    RadialAttentionConfig,
    StreamingAttentionConfig,
    Svg2AttentionConfig,
    SvgAttentionConfig,
)
from workers.contracts import AttentionPolicy, KVCache
from workers.denoise import draw_noise, make_flow_schedule, make_schedule
from workers.kernels.sdpa import SdpaKernel
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import Backbone, ControlBranchSizes
from workers.model.control_branch import ControlBranch
from workers.model.dit import AttendPrompt, attend_prompt_dense
from workers.rollout import CleanChunk, Rollout, RolloutPlan
from workers.rollouts.clip_inputs import ClipInputs, condition_of, control_of, project_clip_prompt
from workers.rollouts.clipwise import ClipPlan, ClipwiseRollout
from workers.rollouts.rolling_window import RollingWindowRollout
from workers.search.select import make_search

LATENT = (2 * ROWS, 2 * COLUMNS)
CPU = torch.device("cpu")
CLIP_FRAMES = 7
LONGVIE = replace(
    TINY,
    in_channels=36,
    image_dim=32,
    sampler="euler",
    chunk_latent_frames=CLIP_FRAMES,
    control_branch=ControlBranchSizes(dim=40, num_layers=2, num_heads=1, ffn_dim=48),
)
Roll = Callable[..., list[CleanChunk]]


def attention_over(cache: KVCache, backbone: Backbone, policy: AttentionPolicy | None) -> RolloutAttention:
    return RolloutAttention(backbone, cache, policy or DenseAttention(), SdpaKernel())


def chunk_roll(rolling: bool) -> Roll:
    model = make_model(TINY)
    torch.manual_seed(2)
    prompt = model.project_prompt(torch.randn(1, 7, TINY.text_dim))
    plan = RolloutPlan(
        num_chunks=8,
        latent_size=LATENT,
        schedule=make_schedule(3, 5.0),
        guidance=1.0,
        noise=lambda chunk, step: draw_noise(5, chunk, step, (1, FRAMES, 16, *LATENT)),
        prompt=lambda index: [prompt],
        control=lambda index: None,
    )

    def roll(
        cache: KVCache, policy: AttentionPolicy | None = None, attend_prompt: AttendPrompt = attend_prompt_dense
    ) -> list[CleanChunk]:
        kind, attention = RollingWindowRollout if rolling else Rollout, attention_over(cache, TINY, policy)
        return list(kind(model, attention, Stopwatch(CPU), attend_prompt=attend_prompt).run(plan))

    return roll


def clip_roll() -> Roll:
    model, branch = make_model(LONGVIE), ControlBranch(LONGVIE).eval().requires_grad_(False)
    torch.manual_seed(3)

    def draw(frames: int = CLIP_FRAMES) -> Tensor:
        return torch.randn(1, frames, 16, *LATENT)

    prompt = project_clip_prompt(model, branch, torch.randn(1, 7, TINY.text_dim), torch.randn(1, 5, 32))
    clips = [
        ClipInputs(
            noise_BTCHW=draw(),
            prompts=(prompt,),
            condition_BTCHW=condition_of(draw(), LONGVIE),
            dense_BTCHW=control_of(draw(), draw(), LONGVIE),
            sparse_BTCHW=control_of(draw(), draw(), LONGVIE),
            history_BTCHW=draw(2) if index else None,
        )
        for index in range(5)
    ]
    plan = ClipPlan(5, make_flow_schedule(3, 5.0), 1.0, lambda index, before: clips[index], remembers=True)

    def roll(
        cache: KVCache, policy: AttentionPolicy | None = None, attend_prompt: AttendPrompt = attend_prompt_dense
    ) -> list[CleanChunk]:
        attention = attention_over(cache, LONGVIE, policy)
        rollout = ClipwiseRollout(model, branch, attention, SdpaKernel(), Stopwatch(CPU), attend_prompt)
        return list(rollout.run(plan))

    return roll


@pytest.fixture(params=["chunkwise", "rolling", "clipwise"])
def roll(request: pytest.FixtureRequest) -> Roll:
    return clip_roll() if request.param == "clipwise" else chunk_roll(request.param == "rolling")


def temporal(num_groups: int, min_cosine: float) -> TemporalCache:
    settings = MergeSettings(
        sink_tokens=3 * TOKENS,
        recent_tokens=3 * TOKENS,
        num_groups=num_groups,
        min_cosine=min_cosine,
        storage="model",
    )
    return TemporalCache(TINY.num_layers, settings, make_search("exact").top1)


def worst(a: list[CleanChunk], b: list[CleanChunk]) -> float:
    return max(float((x.latents_BTCHW - y.latents_BTCHW).abs().max()) for x, y in zip(a, b, strict=True))


def test_where_nothing_merges_it_is_full_history(roll: Roll) -> None:
    full, kept = roll(DenseCache(TINY.num_layers)), roll(temporal(40 * TOKENS, 2.0))
    assert worst(kept, full) <= 1e-4
    assert [c.density for c in kept] == pytest.approx([c.density for c in full])


def test_where_keys_merge_memory_stays_bounded_and_the_result_finite(roll: Roll) -> None:
    full, merged = roll(DenseCache(TINY.num_layers)), roll(temporal(6 * TOKENS, 0.9))
    assert all(bool(torch.isfinite(c.latents_BTCHW).all()) for c in merged)
    assert merged[-1].kv_bytes < full[-1].kv_bytes
    assert 1e-6 < worst(merged, full) < 5


SPARSE = {"sink_latent_frames": 1, "recent_latent_frames": 1, "dense_step_share": 0.0, "dense_layers": 0, "tile": 4}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(StreamingAttentionConfig(sink_latent_frames=1, recent_latent_frames=1), id="streaming"),
        pytest.param(AnnSelfAttentionConfig(density=0.3, dense_step_share=0.0, tile=8), id="annsa"),
        pytest.param(RadialAttentionConfig(**SPARSE, decay=0.2), id="radial", marks=pytest.mark.slow),
        pytest.param(SvgAttentionConfig(**SPARSE, density=0.3, num_samples=4), id="svg", marks=pytest.mark.slow),
        pytest.param(
            Svg2AttentionConfig(**SPARSE, top_p=0.5, queries_per_cluster=4, keys_per_cluster=4),
            id="svg2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sparse_policies_see_less_and_stay_finite(roll: Roll, config: AttentionConfig) -> None:
    full = roll(DenseCache(TINY.num_layers))
    sparse = roll(DenseCache(TINY.num_layers), make_policy(config, TOKENS, TINY.num_layers))
    assert all(bool(torch.isfinite(c.latents_BTCHW).all()) for c in sparse)
    assert sparse[-1].density < full[-1].density
    assert sparse[-1].kv_bytes == full[-1].kv_bytes
    assert 1e-6 < worst(sparse, full) < 5


def test_sparse_prompt_attention_goes_with_every_rollout(roll: Roll) -> None:
    full = roll(DenseCache(TINY.num_layers))
    sparse = roll(DenseCache(TINY.num_layers), None, AnnPromptAttention(make_search("exact"), num_buckets=3))
    assert all(bool(torch.isfinite(c.latents_BTCHW).all()) for c in sparse)
    assert 1e-6 < worst(sparse, full) < 5


@pytest.mark.parametrize(
    ("fields", "is_dense"), [({"dense_step_share": 1.0}, True), ({"layers": []}, True), ({"layers": [1]}, False)]
)
def test_prompt_rows_are_left_out_in_the_configured_steps_and_layers_of_every_rollout(
    roll: Roll, fields: dict[str, Any], is_dense: bool
) -> None:
    dense = roll(DenseCache(TINY.num_layers))
    config = AnnPromptConfig.model_validate({"num_buckets": 64} | fields)
    found = roll(DenseCache(TINY.num_layers), attend_prompt=make_prompt_attention(config))
    assert (worst(found, dense) == 0.0) is is_dense

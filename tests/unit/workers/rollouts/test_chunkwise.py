"""Chunk by chunk as Self-Forcing does it, against the whole sequence under a mask and its buffer written plainly."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.plain_rollouts import COLUMNS, FRAMES, ROWS, TINY, make_model, roll_chunks, roll_masked
from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.contracts import PromptKeys
from workers.denoise import draw_noise, make_schedule
from workers.kernels.sdpa import SdpaKernel
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import Backbone, Native
from workers.model.dit import CausalDiT
from workers.rollout import CleanChunk, Rollout, RolloutPlan
from workers.rollouts.native import native_parts

CHUNKS = 9  # two more than the native window holds
LATENT = (2 * ROWS, 2 * COLUMNS)
SHAPE = (1, FRAMES, 16, *LATENT)
NATIVE = replace(TINY, native=Native(num_steps=4, shift=5.0))


def noise(chunk: int, step: int) -> Tensor:
    return draw_noise(3, chunk, step, SHAPE)


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    return make_model(NATIVE)


@pytest.fixture(scope="module")
def prompt(model: CausalDiT) -> list[PromptKeys]:
    torch.manual_seed(6)
    return model.project_prompt(torch.randn(1, 7, NATIVE.text_dim))


def make_plan(prompt: list[PromptKeys], num_chunks: int = CHUNKS) -> RolloutPlan:
    return RolloutPlan(
        num_chunks=num_chunks,
        latent_size=LATENT,
        schedule=make_schedule(4, 5.0),
        guidance=1.0,
        noise=noise,
        prompt=lambda index: [prompt],
        control=lambda index: None,
    )


def native_attention(backbone: Backbone) -> RolloutAttention:
    parts = native_parts(backbone, LATENT)
    return RolloutAttention(backbone, parts.cache, parts.policy, SdpaKernel(), reindex=parts.reindex)


def full_attention() -> RolloutAttention:
    return RolloutAttention(NATIVE, DenseCache(NATIVE.num_layers), DenseAttention(), SdpaKernel())


def roll(model: CausalDiT, attention: RolloutAttention, plan: RolloutPlan) -> Iterator[CleanChunk]:
    return Rollout(model, attention, Stopwatch(torch.device("cpu"))).run(plan)


def worst(chunks: Iterator[CleanChunk], expected: list[Tensor]) -> float:
    return max(float((c.latents_BTCHW - e).abs().max()) for c, e in zip(chunks, expected, strict=True))


def test_full_history_equals_the_whole_sequence_under_a_chunk_causal_mask(model, prompt) -> None:
    expected = roll_masked(model, 6, noise, prompt)
    assert expected[0].std() > 0.5
    assert worst(roll(model, full_attention(), make_plan(prompt, 6)), expected) <= 1e-4


@pytest.mark.parametrize(("window", "sink"), [(21, 0), (9, 3)])
def test_native_window_equals_the_published_buffer(model, prompt, window: int, sink: int) -> None:
    backbone = replace(
        NATIVE,
        native=Native(num_steps=4, shift=5.0, attended_latent_frames=window, sink_latent_frames=sink),
    )
    expected = roll_chunks(model, CHUNKS, noise, prompt, window, sink)
    assert worst(roll(model, native_attention(backbone), make_plan(prompt)), expected) <= 1e-4


def test_the_native_window_holds_the_released_length_whole(model, prompt) -> None:
    plan = make_plan(prompt, 7)  # 21 latent frames: nothing is forgotten yet
    chunks = list(roll(model, native_attention(NATIVE), plan))
    assert [c.density for c in chunks] == [1.0] * 7
    assert worst(roll(model, full_attention(), plan), [c.latents_BTCHW for c in chunks]) <= 1e-5


def test_a_video_goes_on_from_given_latents_as_from_its_own(model, prompt) -> None:
    plan = make_plan(prompt, 5)
    whole = list(roll(model, full_attention(), plan))
    rollout = Rollout(model, full_attention(), Stopwatch(torch.device("cpu")))
    for chunk in whole[:2]:
        rollout.remember(plan, chunk.index, chunk.latents_BTCHW)
    rest = list(rollout.run(plan, first_chunk=2))
    assert [c.index for c in rest] == [2, 3, 4]
    assert all(torch.equal(a.latents_BTCHW, b.latents_BTCHW) for a, b in zip(rest, whole[2:], strict=True))
    assert [c.density for c in rest] == [1.0] * 3

"""The rolling window against the published schedule written plainly, and what single mistakes in it would cost."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.plain_rollouts import COLUMNS, FRAMES, ROWS, SIGMAS, TINY, TOKENS, full_past, make_model, roll_windows
from workers.attention.dense import DenseAttention
from workers.attention.native_window import NativeWindow, NativeWindowAttention
from workers.cache.dense import DenseCache
from workers.cache.window import WindowCache
from workers.contracts import KVCache, PromptKeys
from workers.denoise import draw_noise, make_schedule
from workers.errors import NonFiniteLatents
from workers.kernels.reference import ReferenceKernel
from workers.kernels.sdpa import SdpaKernel
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import Native
from workers.model.dit import CausalDiT
from workers.rollout import CleanChunk, RolloutPlan
from workers.rollouts.native import follow_recent, native_parts
from workers.rollouts.rolling_window import RollingWindowRollout, plan_windows

CHUNKS = 12  # the first chunk after the sink is forgotten from the ninth on
ROLLING = replace(TINY, rollout="rolling", native=Native(num_steps=5, shift=5.0, window_chunks=5, sink_latent_frames=3))
LATENT = (2 * ROWS, 2 * COLUMNS)
SHAPE = (1, FRAMES, 16, *LATENT)


def noise(chunk: int, step: int) -> Tensor:
    return draw_noise(5, chunk, step, SHAPE)


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    return make_model(ROLLING)


@pytest.fixture(scope="module")
def prompts(model: CausalDiT) -> list[list[PromptKeys]]:
    torch.manual_seed(6)
    return [model.project_prompt(torch.randn(1, 7, ROLLING.text_dim)) for _ in range(2)]


@pytest.fixture(scope="module")
def native(model: CausalDiT, prompts: list[list[PromptKeys]]) -> list[Tensor]:
    return roll_windows(model, CHUNKS, noise, prompts[0])


def make_plan(prompts: list[list[PromptKeys]], switch_at: int = CHUNKS, num_chunks: int = CHUNKS) -> RolloutPlan:
    return RolloutPlan(
        num_chunks=num_chunks,
        latent_size=LATENT,
        schedule=make_schedule(5, 5.0),
        guidance=1.0,
        noise=noise,
        prompt=lambda index: [prompts[0] if index < switch_at else prompts[1]],
        control=lambda index: None,
    )


def native_attention(kernel=None) -> RolloutAttention:
    parts = native_parts(ROLLING, LATENT)
    return RolloutAttention(ROLLING, parts.cache, parts.policy, kernel or SdpaKernel(), reindex=parts.reindex)


def full_attention(cache: KVCache | None = None) -> RolloutAttention:
    return RolloutAttention(ROLLING, cache or DenseCache(ROLLING.num_layers), DenseAttention(), SdpaKernel())


def roll(model: CausalDiT, plan: RolloutPlan, attention: RolloutAttention) -> list[CleanChunk]:
    return list(RollingWindowRollout(model, attention, Stopwatch(torch.device("cpu"))).run(plan))


def worst(chunks: list[CleanChunk], expected: list[Tensor]) -> float:
    assert [c.index for c in chunks] == list(range(len(expected)))
    return max(float((c.latents_BTCHW - e).abs().max()) for c, e in zip(chunks, expected, strict=True))


def test_windows_are_the_published_ones() -> None:
    windows = list(plan_windows(7, 5))
    assert [(w.chunks.start, len(w.chunks)) for w in windows] == [
        *[(0, 1), (0, 2), (0, 3), (0, 4)],
        *[(0, 5), (1, 5), (2, 5)],
        *[(3, 4), (4, 3), (5, 2), (6, 1)],
    ]
    assert [w.level(c) for w in windows[:1] + windows[5:6] + windows[-1:] for c in w.chunks] == [0, 4, 3, 2, 1, 0, 4]


@pytest.mark.parametrize("kernel", [ReferenceKernel(), SdpaKernel()])
def test_native_rollout_equals_the_published_schedule(model, prompts, native, kernel) -> None:
    chunks = roll(model, make_plan(prompts), native_attention(kernel))
    assert native[0].std() > 0.5
    assert worst(chunks, native) <= 1e-4
    bytes_per_frame = 2 * 4 * ROLLING.dim * ROLLING.num_layers * TOKENS
    assert max(c.kv_bytes for c in chunks) == 21 * bytes_per_frame  # sink and the 18 that a clean pass sees
    assert chunks[0].density == 1.0
    assert chunks[-1].density < 0.7


def test_rollout_with_full_history_equals_the_schedule_without_a_limit(model, prompts) -> None:
    chunks = roll(model, make_plan(prompts), full_attention())
    assert worst(chunks, roll_windows(model, CHUNKS, noise, prompts[0], full_past)) <= 1e-4
    assert all(c.density == pytest.approx(1.0) for c in chunks)


def test_fewer_chunks_than_levels_roll_out_too(model, prompts) -> None:
    chunks = roll(model, make_plan(prompts, num_chunks=2), native_attention())
    assert worst(chunks, roll_windows(model, 2, noise, prompts[0])) <= 1e-4


class _NeverClean(RollingWindowRollout):
    """A mistake: what is remembered was computed at the timestep of the last level."""

    def _remember(self, plan, index, clean, chunk):
        original = self._calls.flow
        last = plan.schedule.timesteps[-1]
        self._calls.flow = lambda x, t, *rest: original(x, torch.full_like(t, last), *rest)
        super()._remember(plan, index, clean, chunk)
        self._calls.flow = original


class _KeepsFirstNoise(RollingWindowRollout):
    """A mistake: every level gets the noise that the chunk began with."""

    def _draw_noise(self, plan, index, level):
        return noise(index, 0)


def mistaken_attention(mistake: str) -> RolloutAttention:
    attended, sink = 21 * TOKENS, 3 * TOKENS
    policy = NativeWindowAttention(NativeWindow(attended, sink, clean_pass_sees_sink=mistake == "sink in clean pass"))
    if mistake == "recent frames not capped":
        policy = NativeWindowAttention(NativeWindow(attended * 2, sink, clean_pass_sees_sink=False))
    if mistake == "no sink":
        policy = NativeWindowAttention(NativeWindow(attended, 0, clean_pass_sees_sink=False))
    reindex = None if mistake == "sink stays at frame 0" else follow_recent(3, 21)
    cache = WindowCache(ROLLING.num_layers, sink_tokens=sink, recent_tokens=18 * TOKENS)
    return RolloutAttention(ROLLING, cache, policy, SdpaKernel(), reindex=reindex)


@pytest.mark.parametrize(
    "mistake", ["sink stays at frame 0", "sink in clean pass", "recent frames not capped", "no sink"]
)
def test_a_mistake_in_what_is_seen_shows_far_above_the_tolerance(model, prompts, native, mistake: str) -> None:
    assert worst(roll(model, make_plan(prompts), mistaken_attention(mistake)), native) > 1e-3


@pytest.mark.parametrize("mistaken", [_NeverClean, _KeepsFirstNoise])
def test_a_mistake_in_the_schedule_shows_far_above_the_tolerance(model, prompts, native, mistaken) -> None:
    rollout = mistaken(model, native_attention(), Stopwatch(torch.device("cpu")))
    assert worst(list(rollout.run(make_plan(prompts))), native) > 1e-2


def test_a_new_prompt_holds_for_its_own_chunks_inside_a_mixed_window(model, prompts) -> None:
    before = roll(model, make_plan(prompts), native_attention())
    after = roll(model, make_plan(prompts, switch_at=6), native_attention())
    same = [torch.equal(a.latents_BTCHW, b.latents_BTCHW) for a, b in zip(before, after, strict=True)]
    # Chunk 6 enters the window while chunk 2 is at its last level: from there on all feel it, under their own prompts.
    assert same == [True] * 2 + [False] * 10
    change = [float((a.latents_BTCHW - b.latents_BTCHW).std()) for a, b in zip(before, after, strict=True)]
    assert max(change[2:5]) < min(change[6:9])


def test_a_rollout_resumed_in_mid_window_equals_the_unbroken_one(model, prompts) -> None:
    plan = make_plan(prompts)
    unbroken = roll(model, plan, native_attention())
    attention = native_attention()
    rollout = RollingWindowRollout(model, attention, Stopwatch(torch.device("cpu")))
    broken = rollout.run(plan)
    for _ in range(7):
        last = next(broken)
    state = {name: tensor.clone() for name, tensor in rollout.state().items()}
    assert sorted(state) == ["10", "7", "8", "9"]
    cache = {name: tensor.clone() for name, tensor in attention.cache.state().items()}
    broken.close()
    attention = native_attention()
    attention.cache.restore(cache)
    resumed = RollingWindowRollout(model, attention, Stopwatch(torch.device("cpu")))
    resumed.restore(state)
    rest = list(resumed.run(plan, first_chunk=last.index + 1))
    assert [c.index for c in rest] == list(range(7, CHUNKS))
    for a, b in zip(rest, unbroken[7:], strict=True):
        assert torch.equal(a.latents_BTCHW, b.latents_BTCHW)


def test_latents_that_are_not_finite_end_the_rollout(model, prompts) -> None:
    plan = make_plan(prompts)
    spoilt = replace(plan, noise=lambda chunk, step: noise(chunk, step) / (0 if chunk == 8 else 1))
    rollout = RollingWindowRollout(model, native_attention(), Stopwatch(torch.device("cpu"))).run(spoilt)
    assert [next(rollout).index for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(NonFiniteLatents, match="chunk 4"):
        next(rollout)


def test_schedule_of_the_plain_rollout_is_that_of_the_real_one() -> None:
    assert make_schedule(5, 5.0).sigmas == pytest.approx(SIGMAS, abs=5e-8)

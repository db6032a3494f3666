"""Clip by clip against LongVie 2's loop written plainly, and what a cache that persists between clips means."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.plain_rollouts import COLUMNS, ROWS, TOKENS, PlainClip, make_model, roll_clips
from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.cache.window import WindowCache
from workers.contracts import KVCache
from workers.denoise import Schedule, make_flow_schedule
from workers.errors import NonFiniteLatents
from workers.kernels.sdpa import SdpaKernel
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import ControlBranchSizes, find_backbone
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT
from workers.rollout import CleanChunk
from workers.rollouts.clip_inputs import (
    ClipInputs,
    condition_of,
    control_of,
    history_of,
    history_pictures,
    keep_first,
    project_clip_prompt,
)
from workers.rollouts.clipwise import ClipPlan, ClipwiseRollout

FRAMES, CLIPS, STEPS, GUIDANCE = 7, 3, 4, 2.5
KEPT = FRAMES - 1 - 2
TINY = replace(
    find_backbone("tiny-test"),
    in_channels=36,
    image_dim=32,
    control_octaves=0,
    sampler="euler",
    rollout="clipwise",
    chunk_latent_frames=FRAMES,
    control_branch=ControlBranchSizes(dim=40, num_layers=2, num_heads=1, ffn_dim=48),
)
SIGMAS = list(make_flow_schedule(STEPS, 5.0).sigmas)
Models = tuple[CausalDiT, ControlBranch]


@pytest.fixture(scope="module")
def models() -> Models:
    dit = make_model(TINY)
    branch = ControlBranch(TINY)
    with torch.no_grad():
        for p in branch.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return dit, branch.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clips() -> list[PlainClip]:
    """History is given, not decoded: then both sides can be compared clip by clip."""
    torch.manual_seed(13)
    noise = torch.randn(1, FRAMES, 16, 2 * ROWS, 2 * COLUMNS)

    def draw(frames: int = FRAMES) -> Tensor:
        return torch.randn(1, frames, 16, 2 * ROWS, 2 * COLUMNS)

    return [
        PlainClip(
            noise=noise,
            condition=condition_of(draw(), TINY),
            dense=control_of(draw(), draw(), TINY),
            sparse=control_of(draw(), draw(), TINY),
            text=[torch.randn(1, 9, TINY.text_dim), torch.randn(1, 9, TINY.text_dim)],
            image=torch.randn(1, 7, TINY.image_dim),
            history=None if j == 0 else draw(2),
        )
        for j in range(CLIPS)
    ]


def read_clip(models: Models, clip: PlainClip) -> ClipInputs:
    prompts = tuple(project_clip_prompt(*models, text, clip.image) for text in clip.text)
    return ClipInputs(clip.noise, prompts, clip.condition, clip.dense, clip.sparse, clip.history)


def make_plan(models: Models, clips: list[PlainClip], *, remembers: bool = False) -> ClipPlan:
    return ClipPlan(
        num_clips=len(clips),
        schedule=make_flow_schedule(STEPS, 5.0),
        guidance=GUIDANCE,
        read=lambda index, before: read_clip(models, clips[index]),
        remembers=remembers,
    )


def make_rollout(models: Models, cache: KVCache | None = None) -> ClipwiseRollout:
    attention = RolloutAttention(TINY, cache or DenseCache(TINY.num_layers), DenseAttention(), SdpaKernel())
    return ClipwiseRollout(*models, attention, SdpaKernel(), Stopwatch(torch.device("cpu")))


def worst(chunks: list[CleanChunk], expected: list[Tensor]) -> float:
    assert [c.index for c in chunks] == list(range(len(expected)))
    return max(float((c.latents_BTCHW - e).abs().max()) for c, e in zip(chunks, expected, strict=True))


def test_native_rollout_equals_the_published_loop_and_remembers_nothing(models, clips) -> None:
    expected = roll_clips(*models, clips, SIGMAS, GUIDANCE, 0)
    chunks = list(make_rollout(models).run(make_plan(models, clips)))
    assert expected[0].std() > 0.5
    assert worst(chunks, expected) <= 1e-4
    assert [c.kv_bytes for c in chunks] == [0, 0, 0]
    assert chunks[0].density == 1.0
    assert chunks[2].density == pytest.approx((FRAMES + 2) / (FRAMES + 2 + 2 * KEPT))


def test_a_persistent_cache_equals_clips_that_stay_visible(models, clips) -> None:
    chunks = list(make_rollout(models).run(make_plan(models, clips, remembers=True)))
    assert worst(chunks, roll_clips(*models, clips, SIGMAS, GUIDANCE, KEPT)) <= 1e-4
    bytes_per_frame = 2 * 4 * TINY.dim * TINY.num_layers * TOKENS
    assert [c.kv_bytes for c in chunks] == [n * KEPT * bytes_per_frame for n in (1, 2, 2)]  # nobody follows the last
    assert [c.density for c in chunks] == pytest.approx([1.0, 1.0, 1.0])
    native = list(make_rollout(models).run(make_plan(models, clips)))
    change = [float((a.latents_BTCHW - b.latents_BTCHW).abs().max()) for a, b in zip(chunks, native, strict=True)]
    assert change[0] <= 1e-4  # times count from elsewhere, so the last bits differ
    assert min(change[1:]) > 1e-2


def test_a_persistent_cache_may_be_a_window(models, clips) -> None:
    cache = WindowCache(TINY.num_layers, sink_tokens=0, recent_tokens=KEPT * TOKENS)
    chunks = list(make_rollout(models, cache).run(make_plan(models, clips, remembers=True)))
    assert len({c.kv_bytes for c in chunks}) == 1
    full = list(make_rollout(models).run(make_plan(models, clips, remembers=True)))
    same = [torch.equal(a.latents_BTCHW, b.latents_BTCHW) for a, b in zip(chunks, full, strict=True)]
    assert same == [True, True, False]


def test_a_rollout_goes_on_from_a_finished_clip(models, clips) -> None:
    plan = make_plan(models, clips, remembers=True)
    whole = list(make_rollout(models).run(plan))
    asked: list[int | None] = []

    def read(index: int, before: CleanChunk | None) -> ClipInputs:
        asked.append(None if before is None else before.index)
        return plan.read(index, before)

    attention = RolloutAttention(TINY, DenseCache(TINY.num_layers), DenseAttention(), SdpaKernel())
    first = ClipwiseRollout(*models, attention, SdpaKernel(), Stopwatch(torch.device("cpu")))
    begun = first.run(replace(plan, read=read))
    done = [next(begun), next(begun)]
    begun.close()
    rest = list(make_rollout(models, attention.cache).run(replace(plan, read=read), first_clip=2, before=done[-1]))
    assert torch.equal(rest[0].latents_BTCHW, whole[2].latents_BTCHW)
    assert asked == [None, 0, 1]


def without_control(models: Models, clips: list[PlainClip]) -> list[PlainClip]:
    return [replace(clip, dense=clip.dense * 0, sparse=clip.sparse * 0) for clip in clips]


def first_frame_not_mixed(models: Models, clips: list[PlainClip]) -> list[PlainClip]:
    mixed = []
    for clip in clips:
        noise = clip.noise.clone()
        if clip.history is not None:  # undoes the mix that follows
            noise[:, 0] = (noise[:, 0] - (1 - 0.925926) * clip.history[:, -1]) / 0.925926
        mixed.append(replace(clip, noise=noise))
    return mixed


class _BothFromZero(ClipwiseRollout):
    """A mistake: the times of history and clip both begin at 0."""

    def _positions(self, plan, index, call):
        alone = super()._positions(plan, index, replace(call, history_BTCHW=None))
        return alone if call.history_BTCHW is None else torch.cat((alone[: 2 * TOKENS], alone))


def test_history_and_clip_that_begin_at_the_same_time_show_far_above_the_tolerance(models, clips) -> None:
    plan = make_plan(models, clips[:2])
    attention = RolloutAttention(TINY, DenseCache(TINY.num_layers), DenseAttention(), SdpaKernel())
    wrong = list(_BothFromZero(*models, attention, SdpaKernel(), Stopwatch(torch.device("cpu"))).run(plan))
    right = list(make_rollout(models).run(plan))
    assert torch.equal(wrong[0].latents_BTCHW, right[0].latents_BTCHW)
    assert (wrong[1].latents_BTCHW - right[1].latents_BTCHW).abs().max() > 1e-2


@pytest.mark.parametrize("mistake", [without_control, first_frame_not_mixed])
def test_a_mistake_shows_far_above_the_tolerance(models, clips, mistake) -> None:
    right = list(make_rollout(models).run(make_plan(models, clips[:2])))
    wrong = list(make_rollout(models).run(make_plan(models, mistake(models, clips[:2]))))
    assert max(float((a.latents_BTCHW - b.latents_BTCHW).abs().max()) for a, b in zip(right, wrong, strict=True)) > 1e-2


def test_bfloat16_models_get_their_timesteps_in_bfloat16(models, clips) -> None:
    dit = make_model(TINY).bfloat16()
    seen: list[float] = []
    dit.register_forward_pre_hook(lambda module, args: seen.append(float(args[1][0, 0])))
    attention = RolloutAttention(TINY, DenseCache(TINY.num_layers), DenseAttention(), SdpaKernel())
    half = (dit, ControlBranch(TINY).bfloat16().eval().requires_grad_(False))
    rollout = ClipwiseRollout(*half, attention, SdpaKernel(), Stopwatch(torch.device("cpu")))
    plan = make_plan(half, clips[:1])
    fifty = make_flow_schedule(50, 5.0)
    assert fifty.timesteps[1] == pytest.approx(995.935, abs=1e-3)
    list(rollout.run(replace(plan, schedule=Schedule(fifty.sigmas[:2], fifty.timesteps[:2]))))
    assert seen == [1000.0, 1000.0, 996.0, 996.0]  # two prompts each


def test_latents_that_are_not_finite_end_the_rollout_with_their_clip(models, clips) -> None:
    spoilt = [clips[0], replace(clips[1], noise=clips[1].noise / 0)]
    rollout = make_rollout(models).run(make_plan(models, spoilt))
    assert next(rollout).index == 0
    with pytest.raises(NonFiniteLatents, match="clip 1"):
        next(rollout)


def test_inputs_are_laid_out_as_published() -> None:
    first, video, history = torch.randn(3, 1, 5, 16, 4, 6).unbind(0)
    condition = condition_of(first, TINY)
    assert condition.shape[2] == 20
    assert condition[:, 0, :4].eq(1).all()
    assert condition[:, 1:, :4].eq(0).all()
    assert torch.equal(condition[:, :, 4:], first)
    control = control_of(video, first, TINY)
    assert torch.equal(control, torch.cat((video, condition), 2))
    tokens = history_of(history[:, :2], TINY)
    assert tokens.shape == (1, 2, 36, 4, 6)
    assert tokens[:, :, :20].eq(1).all()
    assert torch.equal(tokens[:, :, 20:], history[:, :2])


def test_history_is_the_first_five_of_the_last_eight_pictures_in_eight_bits() -> None:
    pictures = torch.linspace(-1.2, 1.2, 81)[None, :, None, None, None].expand(1, 81, 3, 2, 2)
    seen = history_pictures(pictures)
    assert seen.shape[1] == 5
    levels = (seen + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    expected = ((pictures[:, 73:78] + 1) * 127.5).clamp(0, 255)
    assert ((expected - levels) > -1e-4).all()
    assert ((expected - levels) < 1).all()
    alone = keep_first(pictures)
    assert torch.equal(alone[:, 0], pictures[:, 0])
    assert alone[:, 1:].eq(0).all()

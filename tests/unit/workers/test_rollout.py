"""The rollout loop against a plain one without cache, and its promises: keyed noise, prompt switch, no silent NaN."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.cache.window import WindowCache
from workers.contracts import KVCache, PromptKeys
from workers.denoise import draw_noise, make_schedule
from workers.errors import NonFiniteLatents
from workers.kernels.reference import ReferenceKernel
from workers.kernels.sdpa import SdpaKernel
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import find_backbone
from workers.model.dit import CausalDiT
from workers.model.rope import grid_positions, make_rotation, rotate
from workers.rollout import CleanChunk, Rollout, RolloutPlan

BACKBONE = find_backbone("tiny-test")
ROWS, COLUMNS, CHUNKS, SEED = 2, 3, 5, 11
SHAPE = (1, 3, 16, 2 * ROWS, 2 * COLUMNS)


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    torch.manual_seed(4)
    dit = CausalDiT(BACKBONE)
    dit.reset_parameters(zero_output=False)
    return dit.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(model: CausalDiT) -> list[list[PromptKeys]]:
    torch.manual_seed(5)
    return [model.project_prompt(torch.randn(1, 7, BACKBONE.text_dim)) for _ in range(2)]


def make_control(index: int) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randn((1, 3, BACKBONE.control_channels, 2 * ROWS, 2 * COLUMNS), generator=generator)


def make_plan(prompts: list[list[PromptKeys]], *, switch_at: int = CHUNKS, guidance: float = 1.0) -> RolloutPlan:
    def read_prompt(index: int) -> list[list[PromptKeys]]:
        chosen = prompts[0] if index < switch_at else prompts[1]
        return [chosen] if guidance == 1.0 else [chosen, prompts[1]]

    return RolloutPlan(
        num_chunks=CHUNKS,
        latent_size=(2 * ROWS, 2 * COLUMNS),
        schedule=make_schedule(3, 3.0),
        guidance=guidance,
        noise=lambda chunk, step: draw_noise(SEED, chunk, step, SHAPE),
        prompt=read_prompt,
        control=make_control,
    )


def roll(model: CausalDiT, plan: RolloutPlan, cache: KVCache | None = None) -> list[CleanChunk]:
    cache = cache or DenseCache(BACKBONE.num_layers)
    attention = RolloutAttention(BACKBONE, cache, DenseAttention(), SdpaKernel())
    return list(Rollout(model, attention, Stopwatch(torch.device("cpu"))).run(plan))


def roll_plainly(model: CausalDiT, plan: RolloutPlan, kept: int = 99) -> Iterator[Tensor]:
    """No cache: each call runs over all clean chunks so far and the noisy one, under a chunk-causal mask.

    With `kept`, a chunk sees only so many chunks before itself.
    """
    clean: list[Tensor] = []
    tokens = 3 * ROWS * COLUMNS
    for index in range(plan.num_chunks):
        first = 0
        position = grid_positions(torch.arange(3 * (index + 1)), ROWS, COLUMNS)
        chunk_of = torch.arange(len(position)) // tokens
        distance = chunk_of[:, None] - chunk_of[None]
        mask = (distance >= 0) & (distance <= kept)
        rotation = make_rotation(position, BACKBONE.head_dim, BACKBONE.rope_theta)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, mask=mask, rotation=rotation) -> Tensor:
            heads = (x.transpose(1, 2) for x in (rotate(q, rotation), rotate(k, rotation), v))
            return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

        control = model.embed_control(torch.cat([make_control(i) for i in range(first, index + 1)], 1))
        latents = plan.noise(index, 0)
        for step, sigma in enumerate(plan.schedule.sigmas):
            x = torch.cat((*clean, latents), 1)
            t = torch.zeros(1, x.shape[1])
            t[:, -3:] = 1000 * sigma
            flows = [model(x, t, keys, attend, control_BQE=control)[:, -3:] for keys in plan.prompt(index)]
            flow = flows[0] if len(flows) == 1 else flows[1] + plan.guidance * (flows[0] - flows[1])
            latents = latents + (plan.schedule.next_sigma(step) - sigma) * flow
        clean.append(latents)
        yield latents


@pytest.mark.parametrize("kernel", [ReferenceKernel(), SdpaKernel()])
def test_cached_rollout_equals_the_whole_sequence_recomputed_at_every_step(model, prompts, kernel) -> None:
    plan = make_plan(prompts)
    attention = RolloutAttention(BACKBONE, DenseCache(BACKBONE.num_layers), DenseAttention(), kernel)
    chunks = list(Rollout(model, attention, Stopwatch(torch.device("cpu"))).run(plan))
    assert [c.index for c in chunks] == list(range(CHUNKS))
    for chunk, expected in zip(chunks, roll_plainly(model, plan), strict=True):
        torch.testing.assert_close(chunk.latents_BTCHW, expected, atol=1e-4, rtol=0)
        assert chunk.density == 1.0


def test_windowed_rollout_equals_a_mask_over_the_newest_chunks(model, prompts) -> None:
    plan = make_plan(prompts)
    recent = 2 * 3 * ROWS * COLUMNS
    cache = WindowCache(BACKBONE.num_layers, sink_tokens=0, recent_tokens=recent)
    chunks = roll(model, plan, cache)
    for chunk, expected in zip(chunks, roll_plainly(model, plan, kept=2), strict=True):
        torch.testing.assert_close(chunk.latents_BTCHW, expected, atol=1e-4, rtol=0)
    assert [round(c.density, 3) for c in chunks] == [1.0, 1.0, 1.0, 0.75, 0.6]
    assert len({c.kv_bytes for c in chunks[1:]}) == 1


def test_guided_rollout_goes_from_the_negative_prompt_through_the_prompt(model, prompts) -> None:
    plan = make_plan(prompts, guidance=2.5)
    # The keys that history leaves behind are those of the prompt alone, in both.
    for chunk, expected in list(zip(roll(model, plan), roll_plainly(model, plan), strict=True))[:1]:
        torch.testing.assert_close(chunk.latents_BTCHW, expected, atol=1e-4, rtol=0)
    unguided = roll(model, make_plan(prompts))
    assert (roll(model, plan)[0].latents_BTCHW - unguided[0].latents_BTCHW).abs().max() > 0.01


def test_a_new_prompt_changes_its_own_chunk_and_later_ones_only(model, prompts) -> None:
    before, after = roll(model, make_plan(prompts)), roll(model, make_plan(prompts, switch_at=3))
    same = [torch.equal(a.latents_BTCHW, b.latents_BTCHW) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, True, False, False]


def test_a_rollout_resumed_from_the_cache_equals_the_unbroken_one(model, prompts) -> None:
    plan = make_plan(prompts)
    unbroken = roll(model, plan)
    attention = RolloutAttention(BACKBONE, DenseCache(BACKBONE.num_layers), DenseAttention(), SdpaKernel())
    broken = Rollout(model, attention, Stopwatch(torch.device("cpu"))).run(plan)
    for _ in range(3):
        last = next(broken)
    broken.close()
    cache = DenseCache(BACKBONE.num_layers)
    cache.restore({name: tensor.clone() for name, tensor in attention.cache.state().items()})
    attention = RolloutAttention(BACKBONE, cache, DenseAttention(), SdpaKernel())
    rest = list(Rollout(model, attention, Stopwatch(torch.device("cpu"))).run(plan, first_chunk=last.index + 1))
    assert [c.index for c in rest] == [3, 4]
    for a, b in zip(rest, unbroken[3:], strict=True):
        assert torch.equal(a.latents_BTCHW, b.latents_BTCHW)


def test_latents_that_are_not_finite_end_the_rollout_with_their_chunk(model, prompts) -> None:
    plan = make_plan(prompts)

    def noise(chunk: int, step: int) -> Tensor:
        drawn = plan.noise(chunk, step)
        return drawn / 0 if chunk == 2 else drawn

    attention = RolloutAttention(BACKBONE, DenseCache(BACKBONE.num_layers), DenseAttention(), SdpaKernel())
    chunks = Rollout(model, attention, Stopwatch(torch.device("cpu"))).run(replace(plan, noise=noise))
    assert [next(chunks).index, next(chunks).index] == [0, 1]
    with pytest.raises(NonFiniteLatents, match="chunk 2"):
        next(chunks)

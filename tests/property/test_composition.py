"""Attention over any partition of the keys, composed by log-sum-exp, is attention over all of them; and what RoPE does
to a key when it is read is what it would have done when it was written. Float64 where the arithmetic is ours alone.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.assemble_policies import make_reindex
from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.config import PositionsConfig
from workers.contracts import (
    Attended,
    Attending,
    AttentionPlan,
    Kernel,
    KernelPart,
    KeyValues,
    Moment,
    PlanPart,
    PromptKeys,
    TiledKeys,
    Tiles,
)
from workers.kernels.reference import ReferenceKernel
from workers.kernels.sdpa import SdpaKernel
from workers.model.attend import RolloutAttention
from workers.model.backbones import find_backbone
from workers.model.dit import attend_prompt_dense
from workers.model.rope import make_rotation, rotate
from workers.model.text_encoder import EncodedText, fold_padding

BATCH, HEADS, HEAD_DIM = 2, 3, 16
KERNELS: dict[str, Kernel] = {"reference": ReferenceKernel(), "sdpa": SdpaKernel()}


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_keys(generator: torch.Generator, num: int, *, merged: bool) -> KeyValues:
    """Random keys; merged ones stand for up to 40, and some for none."""
    shape = (BATCH, num, HEADS, HEAD_DIM)
    mass = torch.randint(0, 41, (BATCH, HEADS, num), generator=generator).double()
    mass[..., 0] = 1  # somebody is seen
    return KeyValues(
        draw(generator, *shape), draw(generator, *shape), torch.zeros(num, 3), mass.log() if merged else None
    )


def pick(keys: KeyValues, where: Tensor) -> KeyValues:
    mass = None if keys.log_mass_BNK is None else keys.log_mass_BNK[..., where]
    return KeyValues(keys.k_BKND[:, where], keys.v_BKND[:, where], keys.position_K3[where], mass)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(1, 60), parts=st.integers(1, 7), merged=st.booleans())
def test_any_partition_composes_to_attention_over_the_union(
    kernel: Kernel, seed: int, num: int, parts: int, merged: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, keys = draw(generator, BATCH, 5, HEADS, HEAD_DIM), draw_keys(generator, num, merged=merged)
    part_of = torch.randint(parts, (num,), generator=generator)
    split = tuple(pick(keys, (part_of == index).nonzero().flatten()) for index in part_of.unique().tolist())
    logit = torch.einsum("bqnd,bknd->bnqk", q, keys.k_BKND) / math.sqrt(HEAD_DIM)
    if keys.log_mass_BNK is not None:
        logit = logit + keys.log_mass_BNK[:, :, None]
    expected = torch.einsum("bnqk,bknd->bqnd", logit.softmax(-1), keys.v_BKND)
    out, lse = kernel.attend(q, split)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(lse, logit.logsumexp(-1).transpose(1, 2), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(2, 40), cut=st.integers(1, 39), merged=st.booleans())
def test_what_was_attended_before_counts_like_its_keys(
    kernel: Kernel, seed: int, num: int, cut: int, merged: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, keys = draw(generator, BATCH, 5, HEADS, HEAD_DIM), draw_keys(generator, num, merged=merged)
    before, after = pick(keys, torch.arange(min(cut, num - 1))), pick(keys, torch.arange(min(cut, num - 1), num))
    expected = ReferenceKernel().attend(q, (keys,))
    known = Attended(*kernel.attend(q, (before,)))
    torch.testing.assert_close(kernel.attend(q, (after, known)), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(kernel.attend(q, (known, after)), expected, atol=1e-10, rtol=0)
    nothing = Attended(torch.zeros_like(q), torch.full(q.shape[:-1], -math.inf, dtype=q.dtype))
    torch.testing.assert_close(kernel.attend(q, (keys, nothing)), expected, atol=1e-10, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num_real=st.lists(st.integers(0, 9), min_size=BATCH, max_size=BATCH))
def test_prompt_with_folded_padding_equals_all_of_its_rows(seed: int, num_real: list[int]) -> None:
    """Every padded row has the key and the value of nothing; one of them with log m stands for all."""
    generator, text_tokens = torch.Generator().manual_seed(seed), 24
    text = draw(generator, BATCH, 9, 6)
    count = torch.tensor(num_real)
    text = text * (torch.arange(9)[None, :, None] < count[:, None, None])
    to_k, to_v = (torch.nn.Linear(6, HEADS * HEAD_DIM, dtype=torch.float64) for _ in range(2))

    def project(rows_BPE: Tensor, log_mass_BP: Tensor | None) -> PromptKeys:
        k, v = (to(rows_BPE).unflatten(-1, (HEADS, HEAD_DIM)) for to in (to_k, to_v))
        return PromptKeys(k, v, log_mass_BP)

    q = draw(generator, BATCH, 7, HEADS, HEAD_DIM)
    unmerged = torch.cat((text, text.new_zeros(BATCH, text_tokens - 9, 6)), 1)
    folded, log_mass = fold_padding(EncodedText(text, count), text_tokens)
    expected = attend_prompt_dense(0, q, project(unmerged, None))
    out = attend_prompt_dense(0, q, project(folded, log_mass.double()))
    # log m of the padding is counted in float32.
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    exact = torch.where(log_mass > 0.1, (text_tokens - count.double()).log()[:, None], log_mass.double())
    torch.testing.assert_close(attend_prompt_dense(0, q, project(folded, exact)), expected, atol=1e-10, rtol=0)


BACKBONE = find_backbone("tiny-test")


class Seen:
    """A kernel that keeps what it is given."""

    name = version = "seen"

    def __init__(self) -> None:
        self.q = torch.empty(0)
        self.parts: tuple[KernelPart, ...] = ()

    def attend(self, q_BQND: Tensor, parts: tuple[KernelPart, ...]) -> tuple[Tensor, Tensor]:
        self.q, self.parts = q_BQND, parts
        return ReferenceKernel().attend(q_BQND, parts)


def roll(positions: PositionsConfig, chunks: list[KeyValues]) -> tuple[Seen, Tensor]:
    """The last chunk after clean passes of the others: what the kernel was given, and its output."""
    seen = Seen()
    one_layer = replace(BACKBONE, num_layers=1)
    attention = RolloutAttention(one_layer, DenseCache(1), DenseAttention(), seen, reindex=make_reindex(positions))
    out = torch.empty(0)
    for index, chunk in enumerate(chunks):
        attention.begin_chunk(chunk.position_K3)
        attention.begin_call(Moment(index, is_clean_pass=True))
        out = attention(0, chunk.v_BKND, chunk.k_BKND, chunk.v_BKND)  # values serve as queries
    return seen, out


def draw_chunks(seed: int, first: int, num_chunks: int) -> list[KeyValues]:
    generator = torch.Generator().manual_seed(seed)
    chunks, tokens = [], 4
    for index in range(num_chunks):
        k, v = torch.randn(2, 1, 3 * tokens, BACKBONE.num_heads, BACKBONE.head_dim, generator=generator).unbind(0)
        time = torch.arange(3 * tokens) // tokens + first + 3 * index
        place = torch.randint(-80, 80, (3 * tokens, 2), generator=generator) / 8
        chunks.append(KeyValues(k, v, torch.cat((time[:, None].float(), place), 1)))
    return chunks


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), first=st.integers(0, 700), num_chunks=st.integers(2, 14))
def test_a_key_that_is_rotated_when_it_is_read_is_the_key_rotated_when_it_was_written(
    seed: int, first: int, num_chunks: int
) -> None:
    chunks = draw_chunks(seed, first, num_chunks)
    written = [rotate(c.k_BKND, make_rotation(c.position_K3, BACKBONE.head_dim, BACKBONE.rope_theta)) for c in chunks]
    far = PositionsConfig(time="capped", cap_latent_frames=10_000)  # no distance reaches it
    for positions in (PositionsConfig(), far):
        seen, _ = roll(positions, chunks)
        read = torch.cat([part.k_BKND for part in seen.parts if isinstance(part, KeyValues)], 1)
        torch.testing.assert_close(read, torch.cat(written, 1), atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), first=st.integers(0, 700), num_chunks=st.integers(2, 14), cap=st.integers(3, 20))
def test_times_counted_from_the_newest_query_change_nothing_and_a_cap_changes_only_what_is_beyond(
    seed: int, first: int, num_chunks: int, cap: int
) -> None:
    chunks = draw_chunks(seed, first, num_chunks)
    _, expected = roll(PositionsConfig(), chunks)
    _, relative = roll(PositionsConfig(time="relative"), chunks)
    torch.testing.assert_close(relative, expected, atol=2e-4, rtol=0)
    seen, _ = roll(PositionsConfig(time="capped", cap_latent_frames=cap), chunks)
    read = torch.cat([part.k_BKND for part in seen.parts if isinstance(part, KeyValues)], 1)
    position = torch.cat([c.position_K3 for c in chunks])
    newest = float(position[-1, 0])
    position[:, 0] = position[:, 0].clamp(min=newest - cap)
    key = torch.cat([c.k_BKND for c in chunks], 1)
    want = rotate(key, make_rotation(position, BACKBONE.head_dim, BACKBONE.rope_theta))
    torch.testing.assert_close(read, want, atol=1e-6, rtol=0)


class LooksOnce:
    """Sees two tiles of three of the cached keys and all own ones; of the cached ones only in some calls."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.tiles: Tiles | None = None

    def begin_chunk(self, position_Q3: Tensor) -> None:
        """Each call says for itself what it does."""

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        everything_own = PlanPart("own", 0, own.num_tokens)
        if cached is None:
            return AttentionPlan((everything_own,))
        visible = torch.tensor([True, False, True]).expand(1, BACKBONE.num_heads, 1, 3)
        self.tiles = Tiles(visible, own.num_tokens, -(-cached.num_tokens // 3))
        result = "fresh" if moment.is_clean_pass else "kept" if moment.step_index in self.steps else "taken"
        return AttentionPlan((PlanPart("cached", 0, cached.num_tokens, self.tiles, result), everything_own))


class Onlooker:
    """Keeps what a probe is shown."""

    def __init__(self) -> None:
        self.shown: list[Attending] = []

    def wants(self, layer_index: int, moment: Moment) -> bool:
        return moment.chunk_index == 1

    def observe(self, attending: Attending) -> None:
        self.shown.append(attending)


def one_call(attention: RolloutAttention, position: Tensor, moment: Moment, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = draw(generator, 3, 1, len(position), BACKBONE.num_heads, BACKBONE.head_dim).unbind(0)
    attention.begin_call(moment)
    return attention(0, q, k, v)


@pytest.mark.parametrize("steps", [(0,), (0, 2), (0, 1, 2, 3)], ids=str)
def test_steps_take_what_the_newest_looking_one_saw(steps: tuple[int, ...]) -> None:
    """One softmax over old logits of the history and new ones of the own keys: with each step's own where all look."""
    onlooker, policy = Onlooker(), LooksOnce(steps)
    cache = DenseCache(BACKBONE.num_layers)
    attention = RolloutAttention(BACKBONE, cache, policy, ReferenceKernel(), probes=(onlooker,))
    positions = [torch.stack([torch.full((9,), float(t)), torch.arange(9.0), torch.zeros(9)], -1) for t in range(2)]
    attention.begin_chunk(positions[0])
    one_call(attention, positions[0], Moment(0, is_clean_pass=True), 1)
    attention.begin_chunk(positions[1])
    asked: dict[int, Tensor] = {}
    for step in range(4):
        attention.take_mean_keys()
        out = one_call(attention, positions[1], Moment(1, step, 4), 10 + step)
        shown = onlooker.shown[-1]
        asked[step] = shown.q_BQND
        looked = max(at for at in steps if at <= step)
        assert shown.cached is not None
        assert policy.tiles is not None
        if looked < step:
            assert torch.equal(shown.kept_q_BQND, asked[looked])
        kept = Attended(*ReferenceKernel().attend(asked[looked], (TiledKeys(shown.cached, policy.tiles),)))
        expected, _ = ReferenceKernel().attend(shown.q_BQND, (shown.own, kept))
        torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
        seen = 9 + (6 if looked == step else 0)  # two tiles of three keys
        assert attention.take_mean_keys() * BACKBONE.num_layers == pytest.approx(seen)
    attention.begin_chunk(positions[1])
    policy.steps = ()
    with pytest.raises(KeyError):  # nothing is taken from the chunk before
        one_call(attention, positions[1], Moment(2, 1, 4), 5)

"""The recall meter and the guard's probe on real rollouts of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workers.attention.dense import DenseAttention, plan_dense
from workers.attention.estimate import RecallProbe
from workers.attention.measure import RecallMeter, sample_queries
from workers.cache.dense import DenseCache
from workers.cache.window import WindowCache
from workers.contracts import (
    Attending,
    AttentionPlan,
    AttentionPolicy,
    AuditKeys,
    KeyValues,
    KVCache,
    Moment,
    PlanPart,
    Tiles,
)
from workers.kernels.reference import ReferenceKernel
from workers.model.attend import Reindex, RolloutAttention
from workers.model.backbones import find_backbone
from workers.model.rope import grid_positions, make_rotation, rotate

BACKBONE = find_backbone("tiny-test")
FRAME, FRAMES = 4, 3  # tokens of a latent frame, latent frames of a chunk
TOKENS = FRAME * FRAMES
LAYERS, HEADS, DIM = BACKBONE.num_layers, BACKBONE.num_heads, BACKBONE.head_dim


class FirstTiles:
    """Of the cached keys each tile of queries sees every other tile of 5."""

    def begin_chunk(self, position_Q3: Tensor) -> None:
        """Nothing is shared."""

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        if cached is None:
            return plan_dense(cached, own)
        num = cached.num_tokens
        visible = torch.arange(-(-num // 5))[None, None, None] % 2 == torch.arange(3)[None, None, :, None] % 2
        order = torch.arange(num).flip(0).expand(1, HEADS, num)
        tiles = Tiles(visible.expand(1, HEADS, -1, -1), 4, 5, None, order)
        return AttentionPlan((PlanPart("cached", 0, num, tiles), PlanPart("own", 0, own.num_tokens)))


def draw(chunk: int, layer: int, call: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * chunk + 10 * layer + call)
    q, k, v = torch.randn(3, 1, TOKENS, HEADS, DIM, generator=generator).unbind(0)
    return 3 * q, k, v


def roll(attention: RolloutAttention, num_chunks: int = 6) -> None:
    """Two denoising steps and a clean pass of each chunk, without a model."""
    for chunk in range(num_chunks):
        attention.begin_chunk(grid_positions(torch.arange(chunk * FRAMES, (chunk + 1) * FRAMES), 2, 2))
        for call in range(3):
            attention.begin_call(Moment(chunk, call % 2, 2, is_clean_pass=call == 2))
            for layer in range(LAYERS):
                attention(layer, *draw(chunk, layer, call))
        attention.end_chunk()


def plain_recall(chunk: int, layer: int, call: int, seen: Callable[[int], Tensor], times: Reindex | None) -> Tensor:
    """Dense mass, over all keys ever made, on those that are seen; [N, Q]."""
    position = grid_positions(torch.arange((chunk + 1) * FRAMES), 2, 2)
    now = float(position[-1, 0])
    at = position.clone()
    if times is not None:
        at[: chunk * TOKENS, 0] = times(position[: chunk * TOKENS, 0], now)
    own_q, own_k, _ = draw(chunk, layer, call)
    k = torch.cat([draw(i, layer, 2)[1] for i in range(chunk)] + [own_k], 1)
    k = rotate(k, make_rotation(at, DIM, BACKBONE.rope_theta))
    q = rotate(own_q, make_rotation(position[-TOKENS:], DIM, BACKBONE.rope_theta))
    p = torch.softmax(torch.einsum("bqnd,bknd->nqk", q.double(), k.double()) / DIM**0.5, -1)
    return (p * seen(k.shape[1])).sum(-1)


def half(times: Tensor, now: float) -> Tensor:
    return now - (now - times) / 2


@pytest.mark.parametrize("times", [None, half], ids=["absolute", "reindexed"])
@pytest.mark.parametrize("name", ["dense", "window", "tiles"])
def test_the_meter_finds_the_dense_mass_of_what_is_kept_and_seen(name: str, times: Reindex | None) -> None:
    cache: KVCache = DenseCache(LAYERS)
    policy: AttentionPolicy = DenseAttention()
    if name == "window":
        cache = WindowCache(LAYERS, sink_tokens=FRAME, recent_tokens=2 * TOKENS)
    elif name == "tiles":
        policy = FirstTiles()
    meter = RecallMeter(cache, num_queries=5)
    roll(RolloutAttention(BACKBONE, cache, policy, ReferenceKernel(), reindex=times, probes=(meter,)))
    assert len(meter.readings) == 6 * 2 * LAYERS

    for reading in meter.readings:
        chunk, call = reading.moment.chunk_index, reading.moment.step_index

        def seen(num: int, chunk: int = chunk) -> Tensor:
            mask = torch.ones(TOKENS, num, dtype=torch.bool)
            if name == "window":
                mask[:, FRAME : max(FRAME, (chunk - 2) * TOKENS)] = False
            elif name == "tiles" and chunk > 0:
                past = num - TOKENS
                tile = torch.arange(past).flip(0) // 5
                mask[:, :past] = (tile[None] % 2) == (torch.arange(TOKENS)[:, None] // 4) % 2
            return mask

        queries = sample_queries(TOKENS, 5, 2 * chunk + call)
        want = plain_recall(chunk, reading.layer_index, call, seen, times)[:, queries].mean(-1)
        assert torch.allclose(reading.recall_BN[0], want, atol=1e-6)
        assert torch.allclose(reading.strict_BN[0], want, atol=1e-6)  # nothing is merged here
    assert (meter.mean() == pytest.approx(1.0)) == (name == "dense")


class TakesFirst(FirstTiles):
    """The second step takes what the first one saw of the cache."""

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        cached_part, *rest = super().plan(layer_index, moment, q_BQND, cached, own).parts
        if not rest or moment.is_clean_pass:
            return AttentionPlan((cached_part, *rest))
        return AttentionPlan((replace(cached_part, result="taken" if moment.step_index else "kept"), *rest))


def test_strict_recall_knows_with_which_queries_the_past_was_seen() -> None:
    """Recall asks what is kept and seen; strict recall what each key is given, here by the queries of another step."""
    cache, other = DenseCache(LAYERS), DenseCache(LAYERS)
    meter, fresh = RecallMeter(cache, num_queries=TOKENS), RecallMeter(other, num_queries=TOKENS)
    roll(RolloutAttention(BACKBONE, cache, TakesFirst(), ReferenceKernel(), probes=(meter,)))
    roll(RolloutAttention(BACKBONE, other, FirstTiles(), ReferenceKernel(), probes=(fresh,)))
    for found, want in zip(meter.readings, fresh.readings, strict=True):
        assert torch.equal(found.recall_BN, want.recall_BN)
        chunk, past = found.moment.chunk_index, found.moment.chunk_index * TOKENS
        if found.moment.step_index == 0 or chunk == 0:
            assert torch.equal(found.strict_BN, want.strict_BN)
            continue
        position = grid_positions(torch.arange((chunk + 1) * FRAMES), 2, 2)
        keys = [draw(i, found.layer_index, 2)[1] for i in range(chunk)] + [draw(chunk, found.layer_index, 1)[1]]
        k = rotate(torch.cat(keys, 1), make_rotation(position, DIM, BACKBONE.rope_theta)).double()

        def logits(call: int, k: Tensor = k, layer: int = found.layer_index, chunk: int = chunk) -> Tensor:
            at = grid_positions(torch.arange(chunk * FRAMES, (chunk + 1) * FRAMES), 2, 2)
            q = rotate(draw(chunk, layer, call)[0], make_rotation(at, DIM, BACKBONE.rope_theta))
            return torch.einsum("bqnd,bknd->nqk", q.double(), k) / DIM**0.5

        then, now = logits(0), logits(1)
        unseen = (torch.arange(past).flip(0) // 5)[None] % 2 != (torch.arange(TOKENS)[:, None] // 4) % 2
        given = torch.cat((then[..., :past].masked_fill(unseen, -torch.inf), now[..., past:]), -1).softmax(-1)
        strict = torch.minimum(given, now.softmax(-1)).sum(-1).mean(-1)
        torch.testing.assert_close(found.strict_BN[0], strict, atol=1e-6, rtol=0)
        assert bool((found.strict_BN < want.strict_BN).all())


def test_the_meter_can_be_asked_less_often() -> None:
    cache = DenseCache(LAYERS)
    meter = RecallMeter(cache, every_chunks=2, steps=(1,), storage=torch.bfloat16)
    roll(RolloutAttention(BACKBONE, cache, DenseAttention(), ReferenceKernel(), probes=(meter,)))
    assert {(r.moment.chunk_index, r.moment.step_index) for r in meter.readings} == {(0, 1), (2, 1), (4, 1)}
    assert meter.mean() == pytest.approx(1.0, abs=0.01)
    meter.forget_readings()
    assert meter.mean() != meter.mean()  # NaN


class MergedPairs(DenseCache):
    """Each pair of neighbouring keys of the history as one entry, the newer one; tracks and samples what it merged."""

    def __init__(self, num_layers: int, num_audit: int) -> None:
        super().__init__(num_layers)
        self.num_audit = num_audit

    def read(self, layer_index: int) -> KeyValues | None:
        full = super().read(layer_index)
        if full is None:
            return None
        mass = torch.full((1, HEADS, full.num_tokens // 2), 2.0).log()
        return KeyValues(full.k_BKND[:, 1::2], full.v_BKND[:, 1::2], full.position_K3[1::2], mass)

    def owners(self, layer_index: int) -> Tensor | None:
        full = super().read(layer_index)
        return None if full is None else (torch.arange(full.num_tokens) // 2).expand(1, HEADS, -1)

    def audit(self, layer_index: int) -> AuditKeys | None:
        full = super().read(layer_index)
        if full is None:
            return None
        num = full.num_tokens
        which = torch.randperm(num, generator=torch.Generator().manual_seed(layer_index))[: self.num_audit]
        owner = (which // 2).expand(1, HEADS, -1)
        members = torch.full_like(owner, 2)
        return AuditKeys(full.k_BKND[:, which], full.position_K3[which], owner, members, num, 0, num // 2)


class Listener:
    """Takes the probe's estimate after each last step."""

    def __init__(self, probe: RecallProbe) -> None:
        self.probe, self.estimates = probe, list[float]()

    def wants(self, layer_index: int, moment: Moment) -> bool:
        return moment.is_clean_pass and layer_index == 0

    def observe(self, attending: Attending) -> None:
        self.estimates.append(self.probe.take())


@pytest.mark.parametrize("times", [None, half], ids=["absolute", "reindexed"])
def test_the_probe_agrees_with_the_meter_on_a_merged_cache(times: Reindex | None) -> None:
    cache = MergedPairs(LAYERS, num_audit=1000)
    meter, probe = RecallMeter(cache, num_queries=TOKENS, steps=(1,)), RecallProbe(cache, TOKENS)
    listener = Listener(probe)
    roll(
        RolloutAttention(
            BACKBONE, cache, DenseAttention(), ReferenceKernel(), reindex=times, probes=(meter, probe, listener)
        )
    )
    for chunk, estimate in enumerate(listener.estimates):
        readings = [r.strict_BN.mean() for r in meter.readings if r.moment.chunk_index == chunk]
        exact = torch.stack(readings).mean().item()
        assert chunk == 0 or exact < 0.9
        assert estimate == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("name", ["dense", "tiles"])
def test_for_selections_the_probe_says_what_the_meter_says(name: str) -> None:
    cache = DenseCache(LAYERS)
    policy: AttentionPolicy = DenseAttention() if name == "dense" else FirstTiles()
    meter, probe = RecallMeter(cache, num_queries=TOKENS, steps=(1,)), RecallProbe(cache, TOKENS)
    roll(RolloutAttention(BACKBONE, cache, policy, ReferenceKernel(), probes=(meter, probe)))
    assert probe.take() == pytest.approx(meter.mean_strict(from_chunk=0), abs=1e-5)
    assert probe.take() != probe.take()  # NaN: nothing new was seen


def test_a_merging_cache_that_tracks_nothing_is_refused() -> None:
    class Untracked(MergedPairs):
        def owners(self, layer_index: int) -> Tensor | None:
            return None

    cache = Untracked(LAYERS, num_audit=10)
    attention = RolloutAttention(BACKBONE, cache, DenseAttention(), ReferenceKernel(), probes=(RecallMeter(cache),))
    with pytest.raises(ValueError, match="tracks its owners"):
        roll(attention)

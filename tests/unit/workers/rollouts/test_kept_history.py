"""Rollouts over a tile table in which some calls take what others saw of the history, against a slow twin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tables import draw_listed, make_captured
from tests.unit.workers.rollouts.test_captured import BACKBONE, CPU, SIZE, assert_same, make_plan, model
from workers.assemble_tiles import size_table, tile_runs
from workers.attention.dense import DenseAttention
from workers.attention.tile_choice import TileRuns
from workers.cache.table_layout import TableSettings
from workers.cache.tile_table import TileTable
from workers.contracts import KeyValues, KVCache
from workers.kernels.listed_parts import PartedAttention, make_parted
from workers.kernels.listed_tiles import attend_listed_plain
from workers.kernels.sdpa import SdpaKernel
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.dit import CausalDiT
from workers.rollout import CleanChunk, Rollout, RolloutPlan
from workers.rollouts.captured import CapturedSettings
from workers.rollouts.kept_history import FreshSlots, KeptHistory, Looked

__all__ = ["model"]
TOKENS = 18
EVERY_KEY = 999


class ComposingAttention(RolloutAttention):
    """In float64, as it is said: some calls look at the history, all attend afresh to the rest, weights add up."""

    def __init__(self, cache: KVCache, history_at: tuple[int, ...], *, sink: bool, recent: bool) -> None:
        super().__init__(BACKBONE, cache, DenseAttention(), SdpaKernel())
        self._history_at, self._is_always = history_at, (sink, recent)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}

    def begin_chunk(self, position_Q3: Tensor) -> None:
        super().begin_chunk(position_Q3)
        self._seen.clear()

    def __call__(self, layer_index: int, q_BQND: Tensor, k_BQND: Tensor, v_BQND: Tensor) -> Tensor:
        assert self._position_Q3 is not None
        own = KeyValues(k_BQND, v_BQND, self._position_Q3)
        q, rotated = self.rotate_cached(KeyValues(q_BQND, v_BQND, self._position_Q3)).k_BKND, self.rotate_cached(own)
        cached, parts = self.cache.read(layer_index), [rotated]
        if cached is not None:
            sink, recent = (TOKENS * is_always for is_always in self._is_always)
            whole = self.rotate_cached(cached)
            # The first chunk is the sink, and no other.
            first, last = sink, max(TOKENS, whole.num_tokens - recent)
            parts += [whole.narrow(0, first), whole.narrow(last, whole.num_tokens)]
            if self._moment.is_clean_pass or self._moment.step_index in self._history_at:
                self._seen[layer_index] = weigh(q, [whole.narrow(first, last)])
        sums, mass = weigh(q, parts)
        if layer_index in self._seen:
            sums, mass = sums + self._seen[layer_index][0], mass + self._seen[layer_index][1]
        if self._moment.is_clean_pass:
            self.cache.append(layer_index, own)
        return (sums / mass).float()


def weigh(q_BQND: Tensor, parts: list[KeyValues]) -> tuple[Tensor, Tensor]:
    """Sums of values and of their weights, which no softmax has divided."""
    sums, masses = [], []
    for keys in parts:
        logit = torch.einsum("bqnd,bknd->bnqk", q_BQND.double(), keys.k_BKND.double()) / math.sqrt(q_BQND.shape[-1])
        if keys.log_mass_BNK is not None:
            logit = logit + keys.log_mass_BNK.double()[:, :, None]
        weight = logit.exp()
        sums.append(torch.einsum("bnqk,bknd->bqnd", weight, keys.v_BKND.double()))
        masses.append(weight.sum(-1).transpose(1, 2)[..., None])
    return torch.stack(sums).sum(0), torch.stack(masses).sum(0)


def sizes_of() -> TableSettings:
    return size_table(BACKBONE, SIZE, kept_chunks=2, spare_chunks=2, tile=8, candidate_tiles=2, decay=0.2)


def roll(model: CausalDiT, plan: RolloutPlan, history_at: tuple[int, ...] | None, **fields: Any) -> list[CleanChunk]:
    """At the sizes of these tests; `choose_at`, or anything of `make_captured`."""
    settings = CapturedSettings(fields.pop("choose_at", (0,)), graphs=False, history_at=history_at)
    return list(
        make_captured(model, sizes_of(), SIZE, settings=settings, **{"num_chosen": EVERY_KEY} | fields).run(plan)
    )


@pytest.mark.parametrize("history_at", [(0,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(("sink", "recent"), [(False, False), (False, True), (True, True), (True, False)])
def test_it_is_the_slow_twin(model: CausalDiT, history_at: tuple[int, ...], sink: bool, recent: bool) -> None:
    plan = make_plan(model, 9)
    found = roll(model, plan, history_at, always_sink=sink, always_recent=recent)
    twin = ComposingAttention(TileTable(sizes_of(), torch.float32, CPU), history_at, sink=sink, recent=recent)
    assert_same(found, list(Rollout(model, twin, Stopwatch(CPU)).run(plan)))


def test_where_all_steps_look_it_is_one_attention(model: CausalDiT) -> None:
    plan, every = make_plan(model, 6), {"always_sink": True, "always_recent": True, "num_chosen": 4}
    assert_same(roll(model, plan, (0, 1, 2), **every), roll(model, plan, None, **every))


def test_taking_what_the_first_step_saw_changes_little_but_something(model: CausalDiT) -> None:
    plan = make_plan(model, 6)
    whole, once = roll(model, plan, None), roll(model, plan, (0,), always_recent=True)
    distance = (whole[-1].latents_BTCHW - once[-1].latents_BTCHW).square().mean().sqrt()
    assert 0 < float(distance) < 0.1 * float(whole[-1].latents_BTCHW.std())


def test_density_counts_the_steps_that_look(model: CausalDiT) -> None:
    plan = make_plan(model, 6)
    for history_at, looks in (((0,), 1), ((0, 2), 2)):
        chunk = roll(model, plan, history_at, num_chosen=5, always_recent=True)[-1]
        # A chunk of 18 keys takes three tiles of 8; the newest and the own one are always seen.
        assert chunk.density == pytest.approx((8 * 5 * looks / 3 + 2 * 24) / (6 * TOKENS))
    assert roll(model, plan, None, num_chosen=5)[-1].density == pytest.approx(8 * (5 + 3) / (6 * TOKENS))


@pytest.mark.parametrize("clean_share", [1.0, 0.5])
def test_another_number_of_tiles_is_seen_until_the_history_merges(model: CausalDiT, clean_share: float) -> None:
    plan, shared = make_plan(model, 9), {"clean_share": clean_share}
    settings = CapturedSettings(graphs=False, history_at=(0,))
    found = make_captured(model, sizes_of(), SIZE, settings=settings, num_chosen=2, num_early=6, **shared)
    many = make_captured(model, sizes_of(), SIZE, settings=settings, num_chosen=6, **shared)
    few = make_captured(model, sizes_of(), SIZE, settings=settings, num_chosen=2, **shared)
    # Sink and newest chunk, and the 3 after which the layer that begins one chunk ahead is full.
    merges_after = 1 + 1 + 3
    states, chunks = [], []
    for chunk in found.run(plan):
        chunks.append(chunk)
        assert found.table.has_merged == (chunk.index >= merges_after)  # it has been taken over
        states.append({name: x.clone() for name, x in found.table.state().items()})
    before = slice(0, merges_after + 1)
    assert_same(chunks[before], list(many.run(plan))[before])
    few.table.restore(states[merges_after])
    after = list(few.run(plan, merges_after + 1))
    assert_same(chunks[merges_after + 1 :], after)
    assert [chunk.density for chunk in chunks[merges_after + 1 :]] == [chunk.density for chunk in after]
    assert chunks[merges_after].density > chunks[merges_after + 1].density * 7 / 6


def test_a_video_after_another_takes_nothing_from_it(model: CausalDiT) -> None:
    plan = make_plan(model, 5)
    settings = CapturedSettings(graphs=False, history_at=(0,))
    rollout = make_captured(model, sizes_of(), SIZE, num_chosen=4, settings=settings)
    first = list(rollout.run(plan))
    rollout.table.clear()
    second = list(rollout.run(plan))
    assert all(torch.equal(a.latents_BTCHW, b.latents_BTCHW) for a, b in zip(first, second, strict=True))


def attend_run(q_QNW: Tensor, k_NKW: Tensor, v_NKD: Tensor) -> tuple[Tensor, Tensor]:
    logit = q_QNW.transpose(0, 1) @ k_NKW.mT / math.sqrt(v_NKD.shape[-1])
    return (logit.softmax(-1) @ v_NKD).transpose(0, 1), logit.logsumexp(-1).T


@pytest.mark.parametrize(("sink", "recent"), [(False, False), (False, True), (True, True), (True, False)])
def test_runs_of_slots_are_seen_by_a_dense_kernel_as_by_lists(model: CausalDiT, sink: bool, recent: bool) -> None:
    plan, dense = make_plan(model, 5), make_parted("torch", 8)._replace(run=attend_run)
    fields = {"always_sink": sink, "always_recent": recent, "num_chosen": 4}
    by_lists = roll(model, plan, (0,), **fields)
    assert_same(roll(model, plan, (0,), parted=dense, **fields), by_lists)
    assert_same(roll(model, plan, (0,), parted=make_parted("reference", 8), **fields), by_lists)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["torch", "reference"])
def test_parts_are_attention_over_both(dtype: torch.dtype, name: Any) -> None:
    tile, queries = 8, 37
    q, k, v, _ = draw_listed((queries, 3, 12), tile, 9, 4, most_mass=5.0, empty=slice(67, 72))
    index = draw_listed((queries, 3, 12), tile, 4, 2, most_mass=5.0, empty=slice(0, 0)).index_NIJ
    q, k, v = (x.to(dtype) for x in (q, k, v))
    layer = _Layer(k, v)
    fresh = FreshSlots.of(TileRuns(((0, 4),), ((4, 9),), 9), queries, tile)
    kept = KeptHistory(make_parted(name, tile), fresh, [layer])
    found = kept.attend(0, q, layer, Looked(layer, index))
    whole = torch.cat((index, torch.arange(4, 9).expand(3, 5, 5)), -1).int()
    expected = attend_listed_plain(q, k, v, whole, tile)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(kept.attend(0, q, layer, None), found, rtol=0, atol=0)


def test_parts_that_saw_nothing_count_for_nothing() -> None:
    compose = make_parted("torch", 8).compose
    a, b = torch.full((2, 1, 4), 3.0), torch.arange(8.0).view(2, 1, 4)
    nothing, some = torch.full((2, 1), -torch.inf), torch.zeros(2, 1)
    assert torch.equal(compose(a, nothing, b, some), b)
    assert torch.equal(compose(b, some, a, nothing), b)
    assert bool(compose(a, nothing, b, nothing).isfinite().all())


class _Layer:
    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k_NLW, self.v_NLD = k, v


@pytest.mark.parametrize(
    ("sink", "recent", "listed", "alone"),
    [
        (False, False, [18, 19, 20], True),
        (False, True, [15, 16, 17, 18, 19, 20], False),
        (True, False, [0, 1, 2, 18, 19, 20], False),
        (True, True, [0, 1, 2, 15, 16, 17, 18, 19, 20], False),
    ],
)
def test_what_is_always_seen_is_fresh(sink: bool, recent: bool, listed: list[int], alone: bool) -> None:
    sizes = size_table(BACKBONE, SIZE, kept_chunks=4, spare_chunks=1, tile=8)
    runs = tile_runs(sizes, always_sink=sink, always_recent=recent)
    fresh = FreshSlots.of(runs, TOKENS, 8)
    assert fresh.list_of(runs.num_tiles) == listed
    assert fresh.is_own_alone == alone


def test_what_is_kept_is_one_result_a_layer() -> None:
    table = TileTable(sizes_of(), torch.bfloat16, CPU)
    fresh = FreshSlots.of(tile_runs(sizes_of()), TOKENS, 8)
    kept = KeptHistory(PartedAttention(*make_parted("torch", 8)), fresh, table.layers)
    per_head = BACKBONE.head_dim * 2 + 4
    assert kept.num_bytes == BACKBONE.num_layers * BACKBONE.num_heads * TOKENS * per_head
    assert kept.num_slots_fresh == 24

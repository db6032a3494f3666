"""The exact recall against a plain count, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workers.attention.measure import (
    exact_recall,
    kept_mass,
    owners_by_position,
    sample_queries,
    scaled_logits,
    seen_keys,
)
from workers.contracts import AttentionPlan, KeyValues, PlanPart, Tiles

seeds = st.integers(0, 2**31)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand_bool(*shape: int, seed: int, share: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def identity(num: int, like_BNQK: Tensor) -> Tensor:
    return torch.arange(num).expand(*like_BNQK.shape[:2], num)


def plain_recall(
    original: Tensor, own: Tensor, own_seen: Tensor, entries: Tensor, seen: Tensor, owner: Tensor
) -> Tensor:
    """One query of one head, entry by entry."""
    p = torch.cat((original, own)).exp() / torch.cat((original, own)).exp().sum()
    total = entries[seen].exp().sum() + own[own_seen].exp().sum()
    recall = 0.0
    for entry in range(len(entries)):
        if seen[entry]:
            due = sum(float(p[key]) for key, held_by in enumerate(owner.tolist()) if held_by == entry)
            recall += min(due, float(entries[entry].exp() / total))
    for key in range(len(own)):
        if own_seen[key]:
            recall += min(float(p[len(original) + key]), float(own[key].exp() / total))
    return torch.tensor(recall, dtype=torch.float64)


@given(seed=seeds, num_entries=st.integers(1, 6), num_original=st.integers(1, 12), num_own=st.integers(1, 4))
def test_recall_is_what_a_count_entry_by_entry_gives(
    seed: int, num_entries: int, num_original: int, num_own: int
) -> None:
    original, own = randn(1, 2, 3, num_original, seed=seed), randn(1, 2, 3, num_own, seed=seed + 1)
    entries = 2 * randn(1, 2, 3, num_entries, seed=seed + 2)
    seen, own_seen = rand_bool(*entries.shape, seed=seed), rand_bool(*own.shape, seed=seed + 1)
    own_seen[..., 0] = True  # a query sees something
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(-1, num_entries, (1, 2, num_original), generator=generator)
    got = exact_recall(original, (own, own_seen), (entries, seen), owner)
    for n in range(2):
        for q in range(3):
            want = plain_recall(
                original[0, n, q], own[0, n, q], own_seen[0, n, q], entries[0, n, q], seen[0, n, q], owner[0, n]
            )
            assert torch.allclose(got[0, n, q], want, atol=1e-12)


@given(seed=seeds)
def test_for_a_selection_recall_is_the_dense_mass_on_what_is_seen(seed: int) -> None:
    logit, own = 3 * randn(1, 2, 5, 20, seed=seed), randn(1, 2, 5, 4, seed=seed + 1)
    seen, own_seen = rand_bool(*logit.shape, seed=seed), torch.ones_like(own, dtype=torch.bool)
    got = exact_recall(logit, (own, own_seen), (logit, seen), identity(20, logit))
    p = torch.softmax(torch.cat((logit, own), -1), -1)
    assert torch.allclose(got, (p * torch.cat((seen, own_seen), -1)).sum(-1), atol=1e-12)
    assert torch.allclose(kept_mass(logit, (own, own_seen), seen, identity(20, logit)), got, atol=1e-12)


@given(seed=seeds, num_entries=st.integers(1, 6), num_original=st.integers(1, 12))
def test_the_kept_mass_counts_each_key_whose_entry_is_seen(seed: int, num_entries: int, num_original: int) -> None:
    original, own = randn(1, 2, 3, num_original, seed=seed), randn(1, 2, 3, 2, seed=seed + 1)
    seen = rand_bool(1, 2, 3, num_entries, seed=seed)
    own_seen = rand_bool(1, 2, 3, 2, seed=seed + 1)
    own_seen[..., 0] = True
    owner = torch.randint(-1, num_entries, (1, 2, num_original), generator=torch.Generator().manual_seed(seed))
    kept = kept_mass(original, (own, own_seen), seen, owner)
    p = torch.softmax(torch.cat((original, own), -1), -1)
    for n in range(2):
        for q in range(3):
            want = float((p[0, n, q, num_original:] * own_seen[0, n, q]).sum())
            for key, held_by in enumerate(owner[0, n].tolist()):
                want += float(p[0, n, q, key]) if held_by >= 0 and bool(seen[0, n, q, held_by]) else 0.0
            assert float(kept[0, n, q]) == pytest.approx(want, abs=1e-12)
    recall = exact_recall(original, (own, own_seen), (randn(1, 2, 3, num_entries, seed=seed + 2), seen), owner)
    assert bool((recall <= kept + 1e-12).all())


@given(seed=seeds, num_groups=st.integers(1, 5))
def test_merging_identical_keys_costs_nothing(seed: int, num_groups: int) -> None:
    groups, own = 2 * randn(1, 2, 5, num_groups, seed=seed), randn(1, 2, 5, 3, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, num_groups, (1, 2, 17), generator=generator)
    mass = torch.zeros(1, 2, num_groups, dtype=torch.float64).scatter_add_(-1, owner, torch.ones(1, 2, 17).double())
    entries = groups + mass.log()[:, :, None]  # a group that nobody joined is an empty slot: -inf
    original = groups.gather(-1, owner[:, :, None].expand(1, 2, 5, 17))
    all_seen = torch.ones_like(entries, dtype=torch.bool)
    got = exact_recall(original, (own, torch.ones_like(own, dtype=torch.bool)), (entries, all_seen), owner)
    assert torch.allclose(got, torch.ones_like(got), atol=1e-12)


@given(seed=seeds)
def test_evicting_everything_leaves_the_share_of_the_own_chunk(seed: int) -> None:
    original, own = randn(1, 2, 5, 9, seed=seed), randn(1, 2, 5, 3, seed=seed + 1)
    nothing = original[..., :0]
    owner = torch.full((1, 2, 9), -1)
    all_own = torch.ones_like(own, dtype=torch.bool)
    share = torch.softmax(torch.cat((original, own), -1), -1)[..., 9:].sum(-1)
    one_unseen = original[..., :1], torch.zeros(1, 2, 5, 1, dtype=torch.bool)
    assert torch.allclose(exact_recall(original, (own, all_own), one_unseen, owner), share, atol=1e-12)
    assert torch.allclose(exact_recall(nothing, (own, all_own)), torch.ones_like(share), atol=1e-12)


@given(seed=seeds, tiles_q=st.integers(1, 4), tiles_k=st.integers(1, 5), in_order=st.booleans())
def test_seen_rows_are_those_of_the_whole_mask(seed: int, tiles_q: int, tiles_k: int, in_order: bool) -> None:
    num_q, num_k = 7, 11
    visible = rand_bool(1, 2, -(-num_q // tiles_q), -(-num_k // tiles_k), seed=seed)
    order_q = None if in_order else randn(1, 2, num_q, seed=seed).argsort(-1)
    order_k = None if in_order else randn(1, 2, num_k, seed=seed + 1).argsort(-1)
    tiles = Tiles(visible, tiles_q, tiles_k, order_q, order_k)
    plan = AttentionPlan((PlanPart("cached", 0, 2), PlanPart("cached", 3, 3 + num_k, tiles), PlanPart("own", 1, 3)))
    queries = sample_queries(num_q, 3, seed % 10)
    seen = seen_keys(plan, "cached", queries, num_q, torch.zeros(1, 2, 3, 16))
    assert seen[..., :2].all()
    assert not seen[..., 2].any()
    assert not seen[..., 3 + num_k :].any()
    assert torch.equal(seen[..., 3 : 3 + num_k], tiles.mask(num_q, num_k)[:, :, queries])
    assert seen_keys(plan, "own", queries, num_q, torch.zeros(1, 2, 3, 4))[0, 0, 0].tolist() == [
        False,
        True,
        True,
        False,
    ]


@given(num=st.integers(1, 300), wanted=st.integers(1, 40), turn=st.integers(0, 500))
def test_sampled_queries_differ_and_lie_in_range(num: int, wanted: int, turn: int) -> None:
    queries = sample_queries(num, wanted, turn).tolist()
    assert len(set(queries)) == len(queries) == min(num, wanted)
    assert min(queries) >= 0
    assert max(queries) < num


def make_kept(keep_BNK: Tensor, position_T3: Tensor, log_mass_BNK: Tensor | None = None) -> KeyValues:
    batch, heads, num = keep_BNK.shape
    k = torch.zeros(batch, num, heads, 2)
    return KeyValues(k, k, position_T3[keep_BNK].transpose(1, 2), log_mass_BNK)


def test_owners_are_found_by_position_head_by_head() -> None:
    position = torch.stack((torch.arange(6) // 2, torch.zeros(6), torch.arange(6) % 2 + 0.25), 1).float()
    keep = torch.tensor([[[0, 3, 5], [1, 2, 3]]])
    owner = owners_by_position(make_kept(keep, position), position)
    assert owner.tolist() == [[[0, -1, -1, 1, -1, 2], [-1, 0, 1, 2, -1, -1]]]
    shared = KeyValues(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2), position[[0, 3, 5]])
    assert owners_by_position(shared, position).tolist() == [[[0, -1, -1, 1, -1, 2]] * 2] * 2
    empty = torch.tensor([[[0.0, -math.inf, 0.0], [0.0, 0.0, -math.inf]]])
    owner = owners_by_position(make_kept(keep, position, empty), position)
    assert owner.tolist() == [[[0, -1, -1, -1, -1, 2], [-1, 0, 1, -1, -1, -1]]]


def test_entries_that_stand_for_several_keys_are_refused_without_owners() -> None:
    position = torch.arange(6).float()[:, None].expand(6, 3)
    keep = torch.tensor([[[0, 3, 5]]])
    with pytest.raises(ValueError, match="tracks its owners"):
        owners_by_position(make_kept(keep, position, torch.tensor([[[0.0, 1.0, 0.0]]])), position)
    with pytest.raises(ValueError, match="no chunk had"):
        owners_by_position(make_kept(keep, position), position[:4])


def test_logits_are_scaled_and_weighed() -> None:
    q, k, mass = randn(1, 2, 3, 4, seed=1), randn(1, 5, 3, 4, seed=2), randn(1, 3, 5, seed=3)
    want = torch.einsum("bqnd,bknd->bnqk", q, k) / 2 + mass[:, :, None]
    assert torch.allclose(scaled_logits(q, k, mass), want, atol=1e-14)

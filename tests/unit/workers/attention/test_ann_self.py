"""AnnSA in a rollout: chosen once per chunk, shared by its steps, anew for new keys; and chosen well."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workers.attention import ann_self, tile_mass
from workers.attention.ann_self import AnnSelfAttention, AnnSettings
from workers.attention.gate import GatedAttention
from workers.contracts import AttentionPlan, KeyValues, Moment, PlansAfterRope, Tightens, Tiles
from workers.search.exact import ExactSearch
from workers.search.quant import QuantSearch

TILE, TILES, HEADS, HEAD_DIM = 16, 24, 2, 32
SETTINGS = AnnSettings(8, 8, 0.25, query_tile=16, key_tile=TILE)


def make_layer(seed: int = 0) -> tuple[Tensor, KeyValues, KeyValues]:
    """A history in which each query tile looks at a few tiles, other ones in each head."""
    g = torch.Generator().manual_seed(seed)
    theme = torch.randn(TILES, HEADS, HEAD_DIM, generator=g)
    k = theme.repeat_interleave(TILE, 0) + 0.7 * torch.randn(TILES * TILE, HEADS, HEAD_DIM, generator=g)
    ends = torch.randn(8, HEADS, HEAD_DIM, generator=g)
    k = torch.cat((ends, k, ends))[None]
    liked = torch.randint(TILES, (3, 4), generator=g)
    taste = torch.stack([theme[row].sum(0) for row in liked]).repeat_interleave(16, 0)
    q = 1.5 * (taste + torch.randn(48, HEADS, HEAD_DIM, generator=g))[None]
    own = torch.randn(1, 48, HEADS, HEAD_DIM, generator=g)
    return q, KeyValues(k, k, torch.zeros(k.shape[1], 3)), KeyValues(own, own, torch.zeros(48, 3))


def tiles_of(plan: AttentionPlan) -> Tiles:
    (tiles,) = [part.tiles for part in plan.parts if part.tiles is not None]
    return tiles


def recall(tiles: Tiles, q: Tensor, cached: KeyValues, own: KeyValues) -> Tensor:
    """Of the dense softmax, by head; sink, newest and own keys are seen."""
    k = torch.cat((cached.k_BKND, own.k_BKND), 1)
    p = (torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(HEAD_DIM)).softmax(-1)
    mask = torch.ones_like(p, dtype=torch.bool)
    mask[..., 8 : cached.num_tokens - 8] = tiles.mask(48, cached.num_tokens - 16)
    return (p * mask).sum(-1).mean((0, 2))


def test_steps_share_a_selection_and_new_keys_void_it() -> None:
    q, cached, own = make_layer()
    policy = AnnSelfAttention(SETTINGS, QuantSearch(), None)
    first = tiles_of(policy.plan(0, Moment(5, 1, 4), q, cached, own))
    assert tiles_of(policy.plan(0, Moment(5, 2, 4), q + 1, cached, own)) is first
    assert tiles_of(policy.plan(1, Moment(5, 2, 4), q, cached, own)) is not first
    assert tiles_of(policy.plan(0, Moment(5, 2, 4, branch=1), q, cached, own)) is not first
    assert tiles_of(policy.plan(0, Moment(5, 2, 4), q, replace(cached), own)) is not first
    policy.begin_chunk(own.position_K3)
    assert tiles_of(policy.plan(0, Moment(6, 1, 4), q, cached, own)) is not first
    anew = AnnSelfAttention(replace(SETTINGS, every_step=True), QuantSearch(), None)
    before = tiles_of(anew.plan(0, Moment(5, 1, 4), q, cached, own))
    assert tiles_of(anew.plan(0, Moment(5, 2, 4), q, cached, own)) is not before


def results(policy: AnnSelfAttention, moment: Moment, layer: tuple[Tensor, KeyValues, KeyValues]) -> set[str]:
    """What a plan does with the history."""
    plan = policy.plan(0, moment, *layer)
    rest = [part for part in plan.parts if part.tiles is None and (part.source == "own" or part.stop in (8, 400))]
    assert {part.result for part in rest} == {"fresh"}
    return {part.result for part in plan.parts if part not in rest}


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_some_steps_look_at_the_history_and_the_others_take_what_they_saw(density: float) -> None:
    layer = make_layer()
    assert layer[1].num_tokens == 400
    policy = AnnSelfAttention(replace(SETTINGS, density=density, history_at=(0, 2)), QuantSearch(), None)
    for chunk in (5, 6):
        policy.begin_chunk(layer[2].position_K3)
        assert [results(policy, Moment(chunk, step, 4), layer) for step in range(4)] == [
            {"kept"},
            {"taken"},
            {"kept"},
            {"taken"},
        ]
        first = policy.plan(0, Moment(chunk, 3, 4), *layer)
        assert results(policy, Moment(chunk, 3, 4, branch=1), layer) == {"kept"}  # its own branch has not looked
        clean = policy.plan(0, Moment(chunk, is_clean_pass=True), *layer)
        assert {part.result for part in clean.parts} == {"fresh"}
        if density < 1:
            assert tiles_of(clean) is tiles_of(first)
    policy.begin_chunk(layer[2].position_K3)
    assert results(policy, Moment(7, 1, 4), layer) == {"kept"}  # the first step was spent elsewhere


def test_it_plans_after_rope_unless_it_is_given_a_way_to_rotate() -> None:
    assert isinstance(AnnSelfAttention(SETTINGS, QuantSearch(), None), PlansAfterRope)
    assert not isinstance(AnnSelfAttention(SETTINGS, QuantSearch(), replace), PlansAfterRope)


def test_a_history_that_is_not_there_is_dense() -> None:
    q, cached, own = make_layer()
    policy = AnnSelfAttention(SETTINGS, QuantSearch(), None)
    assert [part.source for part in policy.plan(0, Moment(0), q, None, own).parts] == ["own"]
    short = cached.narrow(0, 16)
    assert all(part.tiles is None for part in policy.plan(0, Moment(1), q, short, own).parts)


@pytest.mark.parametrize("search", [ExactSearch(), QuantSearch()])
def test_a_quarter_of_the_tiles_holds_nearly_all_of_a_concentrated_attention(search: ExactSearch | QuantSearch) -> None:
    q, cached, own = make_layer()
    tiles = tiles_of(AnnSelfAttention(SETTINGS, search, None).plan(0, Moment(5), q, cached, own))
    assert recall(tiles, q, cached, own).min() > 0.9
    chance = replace(tiles, visible_BNIJ=tiles.visible_BNIJ.roll(5, -1))
    assert recall(chance, q, cached, own).max() < 0.6


@pytest.mark.parametrize("target", [0.8, 0.9, 0.95])
def test_a_target_is_reached_with_fewer_keys_than_one_share_for_all_needs(target: float) -> None:
    q, cached, own = make_layer(3)
    q = q * torch.tensor([0.2, 1.5])[:, None]  # one head spreads its attention, the other concentrates it
    # Tiles of 16 with 2 samples each, asked by half of these unlike queries, would be chosen for the samples' luck.
    settings = replace(SETTINGS, target_recall=target, sample_share=0.5, query_share=1.0)
    tiles = tiles_of(AnnSelfAttention(settings, ExactSearch(), None).plan(0, Moment(5), q, cached, own))
    reached = recall(tiles, q, cached, own).mean()
    assert abs(reached - target) < 0.04
    share = tiles.visible_BNIJ.float().mean().item()
    fixed = AnnSelfAttention(replace(settings, target_recall=None, density=share), ExactSearch(), None)
    assert recall(tiles_of(fixed.plan(0, Moment(5), q, cached, own)), q, cached, own).mean() < reached


@pytest.mark.parametrize("num", [1, 5, 12])
def test_a_number_of_keys_is_seen_where_their_mass_is(num: int) -> None:
    q, cached, own = make_layer(3)
    q = q * torch.tensor([0.2, 1.5])[:, None]  # one head spreads its attention, the other concentrates it
    settings = replace(SETTINGS, seen_keys=num * TILE, sample_share=0.5, query_share=1.0)
    tiles = tiles_of(AnnSelfAttention(settings, ExactSearch(), None).plan(0, Moment(5), q, cached, own))
    assert int(tiles.visible_BNIJ.sum()) == num * tiles.visible_BNIJ[..., 0].numel()
    assert int(tiles.visible_BNIJ.sum(-1).min()) >= num / 2
    equal = AnnSelfAttention(replace(settings, seen_keys=None, density=num / TILES), ExactSearch(), None)
    by_head = recall(tiles_of(equal.plan(0, Moment(5), q, cached, own)), q, cached, own)
    assert recall(tiles, q, cached, own).mean() >= by_head.mean()


def test_a_history_no_longer_than_what_is_seen_is_dense() -> None:
    q, cached, own = make_layer()
    policy = AnnSelfAttention(replace(SETTINGS, seen_keys=TILES * TILE), ExactSearch(), None)
    assert all(part.tiles is None for part in policy.plan(0, Moment(5), q, cached, own).parts)


def test_the_bound_of_what_is_held_at_once_changes_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cached, own = make_layer()
    whole = tiles_of(AnnSelfAttention(SETTINGS, ExactSearch(), None).plan(0, Moment(5), q, cached, own))
    monkeypatch.setattr(tile_mass, "MAX_SCORES", 100)
    pieces = tiles_of(AnnSelfAttention(SETTINGS, ExactSearch(), None).plan(0, Moment(5), q, cached, own))
    assert torch.equal(whole.visible_BNIJ, pieces.visible_BNIJ)


def test_tightening_shows_more_and_its_end_shows_what_was_configured() -> None:
    q, cached, own = make_layer()
    for settings in (SETTINGS, replace(SETTINGS, target_recall=0.6), replace(SETTINGS, seen_keys=5 * TILE)):
        policy = GatedAttention(AnnSelfAttention(settings, QuantSearch(), None), dense_step_share=0.0)
        assert isinstance(policy, Tightens)
        seen = []
        for factor in (1.0, 2.0, 1.0):
            policy.begin_chunk(own.position_K3)
            policy.tighten(factor)
            seen.append(tiles_of(policy.plan(0, Moment(5), q, cached, own)).visible_BNIJ.float().mean().item())
        assert seen[0] == seen[2] < seen[1]
    loose = AnnSelfAttention(SETTINGS, QuantSearch(), None)
    loose.tighten(4.0)
    assert all(part.tiles is None for part in loose.plan(0, Moment(5), q, cached, own).parts)


def test_layers_compete_once_each_has_had_its_turn() -> None:
    seen = 6 * TILE
    settings = replace(SETTINGS, seen_keys=seen, across_layers=True)
    alone = AnnSelfAttention(replace(SETTINGS, seen_keys=8 * TILE), QuantSearch(), None)
    policy = AnnSelfAttention(settings, QuantSearch(), None)
    layers = [make_layer(seed) for seed in range(3)]
    q, cached, own = layers[1]
    layers[1] = 0.01 * q, cached, own  # it looks everywhere alike: its tiles hold less than the best of the others
    first = [tiles_of(policy.plan(i, Moment(5, 0, 4), *layer)) for i, layer in enumerate(layers)]
    for i, layer in enumerate(layers):
        assert torch.equal(first[i].visible_BNIJ, tiles_of(alone.plan(i, Moment(5, 0, 4), *layer)).visible_BNIJ)
    second = [tiles_of(policy.plan(i, Moment(5, 1, 4), *layer)) for i, layer in enumerate(layers)]
    counts = [int(tiles.visible_BNIJ.sum()) for tiles in second]
    assert sum(counts) == 3 * HEADS * 3 * 6
    assert counts[1] != HEADS * 3 * 6
    third = [tiles_of(policy.plan(i, Moment(5, 2, 4), *layer)) for i, layer in enumerate(layers)]
    assert all(a is b for a, b in zip(second, third, strict=True))

    def mean(found: list[Tiles]) -> float:
        of = [recall(tiles, *layer).mean() for tiles, layer in zip(found, layers, strict=True)]
        return float(torch.stack(of).mean())

    fewer = AnnSelfAttention(replace(SETTINGS, seen_keys=seen), QuantSearch(), None)
    assert mean(second) > mean([tiles_of(fewer.plan(i, Moment(5, 0, 4), *layer)) for i, layer in enumerate(layers)])


@pytest.mark.parametrize("num", [1, 5, 12, 40])
def test_of_all_layers_the_heaviest_tiles_are_kept_and_each_row_has_some(num: int) -> None:
    g = torch.Generator().manual_seed(num)
    masses = [
        tile_mass.TileMass(torch.rand(2, 3, 2, j, generator=g) ** 4, torch.rand(2, 3, 2, generator=g)) for j in (24, 31)
    ]
    kept = tile_mass.keep_most_jointly(masses, num)
    for mass, visible in zip(masses, kept, strict=True):
        sure = mass.history_BNIJ.topk(min(-(-num // tile_mass._SURE_SHARE), visible.shape[-1]), -1).indices
        assert bool(visible.gather(-1, sure).all())
        mass.history_BNIJ.scatter_(-1, sure, 1.0)  # what is left over competes
    for b in range(2):
        assert sum(int(visible[b].sum()) for visible in kept) == sum(min(num, j) * 6 for j in (24, 31))
        pairs = [(mass.history_BNIJ[b], visible[b]) for mass, visible in zip(masses, kept, strict=True)]
        lightest = min(float(x.masked_fill(~visible, 1.0).min()) for x, visible in pairs)
        assert lightest >= max(float(x.masked_fill(visible, 0.0).max()) for x, visible in pairs)


def test_a_layer_that_chooses_at_once_serves_all_steps_and_shows_a_clean_pass_less() -> None:
    settings = replace(SETTINGS, seen_keys=6 * TILE, across_layers=True, at_once=True, clean_share=0.5)
    policy = AnnSelfAttention(settings, QuantSearch(), None)
    layers = [make_layer(seed) for seed in range(2)]
    layers[1] = 0.01 * layers[1][0], *layers[1][1:]  # it looks everywhere alike
    first = [tiles_of(policy.plan(i, Moment(5, 0, 4), *layer)) for i, layer in enumerate(layers)]
    later = [tiles_of(policy.plan(i, Moment(5, 3, 4), *layer)) for i, layer in enumerate(layers)]
    assert all(a is b for a, b in zip(first, later, strict=True))
    rows = HEADS * 3
    assert all(int(tiles.visible_BNIJ.sum(-1).min()) >= 3 for tiles in first)
    assert all(int(tiles.visible_BNIJ.sum()) <= 12 * rows for tiles in first)
    for i, layer in enumerate(layers):
        clean = tiles_of(policy.plan(i, Moment(5, noise_level=0.0, is_clean_pass=True), *layer))
        assert clean.first_of is first[i], "nothing is gathered for it"
        assert bool((clean.visible_BNIJ <= first[i].visible_BNIJ).all())
        assert int(clean.visible_BNIJ.sum()) <= 6 * rows
    alone = AnnSelfAttention(settings, QuantSearch(), None)  # a clean pass that comes first chooses for itself
    assert int(tiles_of(alone.plan(0, Moment(5, is_clean_pass=True), *layers[0])).visible_BNIJ.sum()) <= 6 * rows


def slowly_above(mass: tile_mass.TileMass, num: int, seen_before: list[Tensor] | None = None) -> Tensor:
    """Plain twin of `keep_above`, batch by batch and tile by tile."""
    visible = torch.zeros_like(mass.history_BNIJ, dtype=torch.bool)
    batch, heads, rows, tiles = visible.shape
    for b in range(batch):
        value = mass.history_BNIJ[b]
        sure, others = set(), []
        for n, i in itertools.product(range(heads), range(rows)):
            of_row = sorted(range(tiles), key=lambda j: -float(value[n, i, j]))
            num_sure = min(tiles, math.ceil(num / tile_mass._SURE_SHARE))
            sure |= {(n, i, j) for j in of_row[:num_sure]}
            others += [(n, i, j) for j in of_row[num_sure:]]
        others = sorted(others, key=lambda place: -float(value[place]))[
            : min(tiles, 2 * num) * heads * rows - len(sure)
        ]
        least = tile_mass._LEAST_MASS / num
        if seen_before is not None:
            alone = (len(sure) + sum(float(value[place]) > least for place in others)) / (heads * rows)
            mean = statistics.mean([alone, *(float(seen_B[b]) for seen_B in seen_before)])
            least *= (mean / (tile_mass._USUAL * num)) ** tile_mass._FIRMNESS
        for place in (*sure, *(place for place in others if value[place] > least)):
            visible[(b, *place)] = True
    return visible


@pytest.mark.parametrize("seen_before", [None, [], [0.8, 1.3], [1.9]])
@pytest.mark.parametrize(("num", "sharpness"), [(1, 4), (5, 1), (5, 12), (12, 4), (40, 4)])
def test_tiles_above_a_mass_are_kept_beside_those_that_are_sure_and_at_most_twice_as_many(
    num: int, sharpness: int, seen_before: list[float] | None
) -> None:
    g = torch.Generator().manual_seed(num)
    history = torch.rand(2, 3, 2, 24, generator=g) ** sharpness
    mass = tile_mass.TileMass(history / history.sum(-1, keepdim=True), torch.zeros(2, 3, 2))
    seen = None if seen_before is None else [torch.tensor([x * num, num]) for x in seen_before]
    kept = tile_mass.keep_above(mass, num, seen)
    assert torch.equal(kept, slowly_above(mass, num, seen))
    assert int(kept.sum(-1).min()) >= min(24, math.ceil(num / tile_mass._SURE_SHARE))
    assert int(kept.flatten(1).sum(-1).max()) <= min(24, 2 * num) * 6


@pytest.mark.parametrize("sharpness", [2, 12])
def test_layers_make_up_for_what_those_before_them_saw_too_much_or_too_little(sharpness: int) -> None:
    g, num = torch.Generator().manual_seed(sharpness), 12
    history = [torch.rand(1, 4, 2, 96, generator=g) ** sharpness for _ in range(8)]
    masses = [tile_mass.TileMass(x / x.sum(-1, keepdim=True), torch.zeros(1, 4, 2)) for x in history]
    alone, seen = list[Tensor](), list[Tensor]()
    for mass in masses:
        for found, before in ((alone, None), (seen, seen)):
            found.append(tile_mass.keep_above(mass, num, before).sum(-1, dtype=torch.float32).mean((1, 2)))
    usual = tile_mass._USUAL * num
    off, off_alone = (float(torch.stack(found).mean()) - usual for found in (seen, alone))
    assert abs(off) < 0.5 * abs(off_alone)
    assert off * off_alone > 0


def test_a_head_whose_tiles_are_light_keeps_its_share_beside_one_whose_tiles_are_heavy() -> None:
    heavy, light = torch.full((1, 1, 1, 64), 1 / 64), torch.full((1, 1, 1, 64), 1e-6)
    light[..., :6] = 1e-5  # a place that only this head looks for
    kept = tile_mass.keep_above(tile_mass.TileMass(torch.cat((heavy, light), 1), torch.zeros(1, 2, 1)), 12)
    assert bool(kept[0, 1, 0, :6].all())
    assert int(kept[0, 1].sum()) == 6
    assert int(kept[0, 0].sum()) == 2 * 2 * 12 - 6


def test_layers_that_would_end_at_that_mass_together_end_there_alone() -> None:
    g = torch.Generator().manual_seed(1)
    history = [torch.rand(1, 3, 2, 64, generator=g) ** 4 for _ in range(4)]
    num = 16
    ending = torch.cat([x.flatten() for x in history]).topk(4 * 6 * num + 1).values[-2:].mean()
    scale = tile_mass._LEAST_MASS / num / float(ending)
    masses = [tile_mass.TileMass(x * scale, torch.zeros(1, 3, 2)) for x in history]
    for mass, together in zip(masses, tile_mass.keep_most_jointly(masses, num), strict=True):
        assert torch.equal(tile_mass.keep_above(mass, num), together)


@pytest.mark.parametrize("size", [1, 8, 32])
def test_sums_of_groups_are_those_of_logsumexp(size: int) -> None:
    logit = torch.randn(2, 3, 5, 4 * size, generator=torch.Generator().manual_seed(size)).mul(10)
    logit[0, 0, 0] = -torch.inf  # nothing anywhere
    logit[0, 0, 1, :size] = -torch.inf
    expected = logit.double().unflatten(-1, (4, size)).logsumexp(-1)
    found = tile_mass._group_lse(logit.clone(), size)
    near = expected > logit.double().amax(-1, keepdim=True) - 80
    torch.testing.assert_close(found.double()[near], expected[near], atol=1e-4, rtol=0)
    assert bool((found[~near] <= expected[~near].clamp(min=-80)).all())
    assert bool(found[0, 0, 0].isneginf().all())


@pytest.mark.parametrize("step", [0.125, 0.3])
def test_merged_entries_are_ordered_by_time_row_and_column(step: float) -> None:
    g = torch.Generator().manual_seed(9)
    position = torch.randint(-3, 9, (2, 400, 3, 3), generator=g) * torch.tensor([1.0, step, step])
    mass = torch.zeros(2, 3, 400).masked_fill(torch.rand(2, 3, 400, generator=g) < 0.1, -torch.inf)
    k = torch.zeros(2, 400, 3, 4)
    order = ann_self._order_by_time(KeyValues(k, k, position, mass))
    assert order is not None
    for b in range(2):
        for n in range(3):
            empty = mass[b, n].isneginf().tolist()
            there = [(*position[b, at, n].tolist(), at) for at in range(400) if not empty[at]]
            assert order[b, n].tolist()[: len(there)] == [at for *_, at in sorted(there)]


@pytest.mark.parametrize("share", [0.2, 1 / 3, 1.0])
def test_of_what_is_seen_the_heaviest_share_is_kept(share: float) -> None:
    g = torch.Generator().manual_seed(3)
    mass = tile_mass.TileMass(torch.rand(2, 3, 2, 11, generator=g), torch.zeros(2, 3, 2))
    visible = torch.rand(2, 3, 2, 11, generator=g) < 0.6
    kept = tile_mass.keep_heaviest(mass, visible, share)
    for masses, seen, found in zip(*(x.flatten(0, 2) for x in (mass.history_BNIJ, visible, kept)), strict=True):
        by_mass = sorted(seen.nonzero().flatten().tolist(), key=lambda tile: -float(masses[tile]))
        assert set(found.nonzero().flatten().tolist()) == set(by_mass[: math.ceil(share * len(by_mass) - 1e-6)])

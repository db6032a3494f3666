"""AnnSA and AnnCA leave out what they choose to and nothing else: where that is nothing, they equal dense attention."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workers.attention.ann_cross import AnnPromptAttention
from workers.attention.ann_self import AnnSelfAttention, AnnSettings
from workers.attention.dense import plan_dense
from workers.attention.tile_mass import TileMass, keep_mass, keep_share, sample_places
from workers.contracts import AttentionPlan, KeyValues, Moment, PromptKeys, TiledKeys
from workers.kernels.reference import ReferenceKernel
from workers.model.dit import attend_prompt_dense
from workers.search.select import make_search

HEADS, HEAD_DIM = 3, 8
ALL_BUT_NONE = 0.9999
"""A density that rounds to all tiles and still takes the way of tiles."""


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_layer(seed: int, num_cached: int, num_queries: int, form: str) -> tuple[Tensor, KeyValues, KeyValues]:
    """Queries, cached keys ("plain", or "merged": positions of their own, masses, empty entries) and own keys."""
    g = torch.Generator().manual_seed(seed)
    q = draw(g, 1, num_queries, HEADS, HEAD_DIM)
    own = KeyValues(draw(g, *q.shape), draw(g, *q.shape), torch.rand(num_queries, 3, generator=g))
    shape = (1, num_cached, HEADS, HEAD_DIM)
    cached = KeyValues(draw(g, *shape), draw(g, *shape), torch.rand(num_cached, 3, generator=g))
    if form == "merged":
        mass = torch.randint(0, 5, (1, HEADS, num_cached), generator=g).double().log()
        position = torch.rand(1, num_cached, HEADS, 3, generator=g)
        cached = replace(cached, position_K3=position, log_mass_BNK=mass)
    return q, cached, own


def turn(keys: KeyValues) -> KeyValues:
    """Stands for RoPE: something that depends on the position and keeps lengths."""
    first = keys.position_K3[..., 0]
    angle = first[None, :, None, None] if first.dim() == 1 else first[..., None]
    even, odd = keys.k_BKND.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1)
    return replace(keys, k_BKND=turned.flatten(-2).to(keys.k_BKND.dtype))


def attend(plan: AttentionPlan, q: Tensor, cached: KeyValues, own: KeyValues) -> Tensor:
    parts: list[KeyValues | TiledKeys] = []
    for part in plan.parts:
        keys = turn(cached if part.source == "cached" else own).narrow(part.start, part.stop)
        parts.append(keys if part.tiles is None else TiledKeys(keys, part.tiles))
    return ReferenceKernel().attend(turn(KeyValues(q, q, own.position_K3)).k_BKND, tuple(parts))[0]


layers = st.tuples(st.integers(0, 10_000), st.integers(1, 90), st.integers(1, 20), st.sampled_from(["plain", "merged"]))
orders = st.tuples(st.sampled_from(["exact", "quant", "lsh"]), st.sampled_from(["time", "bucket"]))


@given(layers, orders, st.integers(0, 9), st.integers(0, 9))
def test_annsa_that_keeps_all_tiles_equals_dense(
    layer: tuple[int, int, int, str], order: tuple[str, str], sink: int, recent: int
) -> None:
    q, cached, own = draw_layer(*layer)
    settings = AnnSettings(
        sink,
        recent,
        ALL_BUT_NONE,
        query_tile=4,
        key_tile=8,
        order=order[1],
        num_buckets=4,  # type: ignore[arg-type]
    )
    policy = AnnSelfAttention(settings, make_search(order[0]), turn)  # type: ignore[arg-type]
    plan = policy.plan(0, Moment(1), q, cached, own)
    history = [part for part in plan.parts if part.tiles is not None]
    assert len(history) == (1 if cached.num_tokens > sink + recent else 0)
    expected = attend(plan_dense(cached, own), q, cached, own)
    torch.testing.assert_close(attend(plan, q, cached, own), expected, atol=1e-10, rtol=0)


@given(layers, orders, st.floats(0.05, 0.95))
def test_annsa_sees_sink_newest_and_own_keys_and_its_share_of_tiles(
    layer: tuple[int, int, int, str], order: tuple[str, str], density: float
) -> None:
    q, cached, own = draw_layer(layer[0], layer[1] + 20, *layer[2:])
    settings = AnnSettings(
        5,
        6,
        density,
        query_tile=4,
        key_tile=8,
        order=order[1],
        num_buckets=4,  # type: ignore[arg-type]
    )
    plan = AnnSelfAttention(settings, make_search(order[0]), turn).plan(0, Moment(1), q, cached, own)  # type: ignore[arg-type]
    runs = [(part.source, part.start, part.stop, part.tiles is None) for part in plan.parts]
    end = cached.num_tokens
    assert runs == [
        ("cached", 0, 5, True),
        ("cached", 5, end - 6, False),
        ("cached", end - 6, end, True),
        ("own", 0, own.num_tokens, True),
    ]
    tiles = plan.parts[1].tiles
    assert tiles is not None
    num_tiles = -(-(end - 11) // 8)
    assert tiles.visible_BNIJ.shape == (1, HEADS, -(-q.shape[1] // 4), num_tiles)
    assert bool((tiles.visible_BNIJ.sum(-1) == min(num_tiles, max(1, round(density * num_tiles)))).all())
    assert bool(attend(plan, q, cached, own).isfinite().all())


@given(layers, orders)
def test_annsa_does_not_mind_the_order_of_heads(layer: tuple[int, int, int, str], order: tuple[str, str]) -> None:
    q, cached, own = draw_layer(layer[0], layer[1] + 20, *layer[2:])

    def flip(keys: KeyValues) -> KeyValues:
        position = keys.position_K3 if keys.position_K3.dim() == 2 else keys.position_K3.flip(2)
        mass = None if keys.log_mass_BNK is None else keys.log_mass_BNK.flip(1)
        return KeyValues(keys.k_BKND.flip(2), keys.v_BKND.flip(2), position, mass)

    settings = AnnSettings(5, 6, 0.3, query_tile=4, key_tile=8, order=order[1], num_buckets=4)  # type: ignore[arg-type]
    policy = AnnSelfAttention(settings, make_search(order[0]), turn)  # type: ignore[arg-type]
    straight = attend(policy.plan(0, Moment(1), q, cached, own), q, cached, own)
    flipped_layer = q.flip(2), flip(cached), flip(own)
    flipped = attend(policy.plan(1, Moment(1), *flipped_layer), *flipped_layer).flip(2)
    torch.testing.assert_close(flipped, straight, atol=1e-10, rtol=0)


@given(st.integers(1, 500), st.integers(1, 70), st.floats(0.01, 1.0))
def test_samples_lie_in_their_tile_and_stand_for_all_of_it(num_keys: int, tile: int, share: float) -> None:
    num = max(1, round(share * tile))
    place, weight = (x.view(-1, num) for x in sample_places(num_keys, tile, num, torch.device("cpu")))
    start = torch.arange(0, num_keys, tile)[:, None]
    assert bool(((place >= start) & (place < (start + tile).clamp(max=num_keys))).all())
    torch.testing.assert_close(weight.sum(-1), (num_keys - start[:, 0]).clamp(max=tile).float())
    if num == tile <= num_keys:
        assert torch.equal(place[0], torch.arange(tile))


@given(st.integers(0, 1000), st.integers(1, 30), st.floats(0.05, 0.999))
def test_the_fewest_tiles_with_the_target_mass(seed: int, num_tiles: int, target: float) -> None:
    share = torch.randn(2, 3, 2, num_tiles + 1, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)
    mass = TileMass(share[..., 1:], share[..., 0])
    kept = keep_mass(mass, target)
    seen = (mass.history_BNIJ * kept).sum(-1) + mass.rest_BNI
    assert bool((seen.flatten(1).mean(-1) >= target - 1e-5).all())
    assert bool((seen >= 1 - 1.5 * (1 - target) - 1e-5).all())
    lightest = mass.history_BNIJ.masked_fill(~kept, torch.inf).flatten(1).amin(-1)
    for one in range(2):  # without the lightest one, the mean or that head's own floor is missed
        if bool(lightest[one].isfinite()):
            where = (mass.history_BNIJ[one] == lightest[one]) & kept[one]
            less = seen[one] - (where * mass.history_BNIJ[one]).sum(-1)
            floor = 1 - 1.5 * (1 - target)
            assert less.mean() < target + 1e-5 or bool((less < floor + 1e-5)[where.any(-1)].any())


def test_a_share_is_that_of_the_heaviest_tiles() -> None:
    mass = TileMass(torch.tensor([[[[0.1, 0.4, 0.0, 0.2]]]]), torch.tensor([[[0.3]]]))
    assert keep_share(mass, 0.5).tolist() == [[[[False, True, False, True]]]]
    assert keep_share(mass, 0.01).tolist() == [[[[False, True, False, False]]]]


def draw_prompt(seed: int, num_tokens: int, *, folded: bool) -> tuple[Tensor, PromptKeys]:
    g = torch.Generator().manual_seed(seed)
    k, v = draw(g, 2, num_tokens, HEADS, HEAD_DIM), draw(g, 2, num_tokens, HEADS, HEAD_DIM)
    mass = None
    if folded:
        mass = torch.zeros(2, num_tokens, dtype=torch.float64)
        mass[:, -1] = math.log(500)
        if num_tokens > 2:
            mass[1, -2] = -torch.inf
    return draw(g, 2, 11, HEADS, HEAD_DIM), PromptKeys(k, v, mass)


@given(st.integers(0, 1000), st.integers(1, 30), st.booleans(), st.booleans(), st.sampled_from(["exact", "quant"]))
def test_annca_with_one_bucket_equals_dense(
    seed: int, num_tokens: int, folded: bool, with_image: bool, search: str
) -> None:
    q, keys = draw_prompt(seed, num_tokens, folded=folded)
    if with_image:
        keys = keys._replace(k_image_BPND=keys.v_BPND, v_image_BPND=keys.k_BPND)
    policy = AnnPromptAttention(make_search(search), num_buckets=1)  # type: ignore[arg-type]
    torch.testing.assert_close(policy(0, q, keys), attend_prompt_dense(0, q, keys), atol=1e-10, rtol=0)
    assert policy.take_density() == pytest.approx(1.0)


@given(st.integers(0, 1000), st.integers(1, 30), st.booleans(), st.sampled_from(["exact", "quant", "lsh"]))
def test_annca_keeps_exactly_the_tokens_with_a_query_in_their_bucket_padding_and_one(
    seed: int, num_tokens: int, folded: bool, search: str
) -> None:
    q, keys = draw_prompt(seed, num_tokens, folded=folded)
    back_end = make_search(search)  # type: ignore[arg-type]
    kept = AnnPromptAttention(back_end, 8).keep(0, q, keys)
    k_BNPD = keys.k_BPND.transpose(1, 2)
    q_code, k_code = (back_end.buckets(x, 8, k_BNPD) for x in (q.transpose(1, 2), k_BNPD))
    shared = (k_code[..., None] == q_code[:, :, None]).any(-1)
    assert bool((kept | ~shared).all())
    extra = (kept & ~shared).sum(-1)
    assert int(extra.max()) <= (2 if folded else 1)  # the favourite, and folded padding
    assert bool(kept.any(-1).all())
    if folded:
        assert bool(kept[..., -1].all())
    policy = AnnPromptAttention(back_end, 8)
    assert bool(policy(0, q, keys).isfinite().all())
    assert 0 < policy.take_density() <= 1

"""RadialAttention, SVG and SVG2 against their papers' definitions, written out token by token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.attention.history import DenseRegion, count_columns, find_places
from workers.attention.kmeans import cluster, first_centroids, sum_by_cluster
from workers.attention.radial import RadialAttention, RadialSettings, see_radially
from workers.attention.svg import SvgAttention, SvgSettings, draw_sample, make_masks, read_rows
from workers.attention.svg2 import Svg2Attention, Svg2Settings
from workers.contracts import AttentionPlan, KeyValues, Moment, Tiles

ROWS, COLUMNS = 4, 6
FRAME = ROWS * COLUMNS
LATE = Moment(chunk_index=4, step_index=3, num_steps=4)
NOTHING_DENSE = DenseRegion(0, 0)


def positions(first: int, num: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(first, first + num), torch.arange(ROWS), torch.arange(COLUMNS)).float()


def draw_keys(position: Tensor) -> KeyValues:
    k, v = torch.randn(2, 1, len(position), 2, 4).unbind(0)
    return KeyValues(k, v, position)


def tiles_of(plan: AttentionPlan) -> Tiles:
    (tiles,) = [part.tiles for part in plan.parts if part.tiles is not None]
    return tiles


def sees(query: int, key: int, num_frames: int, tile: int, decay: float) -> bool:
    """The mask of the paper for one pair: a query of the chunk after `num_frames`, a key among those."""
    distance = num_frames + query // FRAME - key // FRAME
    width: float = decay * FRAME / 2 ** int(math.log2(distance))
    apart = abs(query % FRAME - key % FRAME)
    if width >= tile:
        return apart <= width
    return bool(distance % math.ceil(tile / width) == 0 and apart <= tile)


@pytest.mark.parametrize("tile", [4, 5, 16, 40])
@pytest.mark.parametrize("decay", [0.3, 1.0])
def test_radial_sees_a_tile_if_and_only_if_the_paper_sees_a_pair_of_it(tile: int, decay: float) -> None:
    num_frames, chunk = 21, 3
    radial = RadialSettings(NOTHING_DENSE, tile, decay)
    queries, keys = (find_places(positions(*span), COLUMNS) for span in ((num_frames, chunk), (0, num_frames)))
    visible = see_radially(queries, keys, FRAME, radial)[0, 0]
    pairs = torch.tensor(
        [[sees(q, k, num_frames, tile, decay) for k in range(num_frames * FRAME)] for q in range(chunk * FRAME)]
    )
    for i, rows in enumerate(pairs.split(tile)):
        for j, pair in enumerate(rows.split(tile, dim=1)):
            assert bool(visible[i, j]) == bool(pair.any())


def test_radial_costs_the_same_for_each_doubling_of_the_distance() -> None:
    radial = RadialSettings(NOTHING_DENSE, tile=2)
    queries, keys = (find_places(positions(*span), COLUMNS) for span in ((128, 1), (0, 128)))
    per_frame = see_radially(queries, keys, FRAME, radial)[0, 0].float().unflatten(-1, (128, -1)).sum((0, 2)).flip(0)
    octaves = [per_frame[2**n - 1 : 2 ** (n + 1) - 1].sum().item() for n in range(2, 7)]
    assert max(octaves) <= 1.8 * min(octaves)


def test_radial_makes_its_mask_once_for_layers_with_the_same_positions() -> None:
    policy, position = RadialAttention(RadialSettings(NOTHING_DENSE, 8)), positions(0, 9)
    own_position = positions(9, 3)
    own, cached = draw_keys(own_position), draw_keys(position)
    policy.begin_chunk(own_position)
    plans = [policy.plan(layer, LATE, own.k_BKND, cached, own) for layer in range(3)]
    assert tiles_of(plans[0]) is tiles_of(plans[2])


def test_columns_are_read_off_the_positions() -> None:
    assert count_columns(positions(7, 3)) == COLUMNS
    assert count_columns(positions(7, 3) + torch.tensor([0.0, 3.5, -2.25])) == COLUMNS  # in a world


@pytest.mark.parametrize("density", [0.1, 0.25, 0.6])
def test_both_kinds_of_svg_head_see_equally_much(density: float) -> None:
    queries, keys = (find_places(positions(*span), COLUMNS) for span in ((30, 3), (0, 30)))
    masks = make_masks(queries, keys, SvgSettings(NOTHING_DENSE, 8, density))
    num_seen = [mask.visible_BNIJ.sum(-1).unique().tolist() for mask in masks]
    assert num_seen[0] == num_seen[1] == [math.ceil(density * 90)]


def test_a_temporal_svg_head_sees_its_own_place_in_every_frame_and_a_spatial_one_the_newest_frames() -> None:
    queries, keys = (find_places(positions(*span), COLUMNS) for span in ((30, 3), (0, 30)))
    masks = make_masks(queries, keys, SvgSettings(NOTHING_DENSE, 8, density=0.3))
    spatial, temporal = (read_rows(mask, torch.arange(3 * FRAME), 8)[0, 0] for mask in masks)
    same_place = (torch.arange(3 * FRAME)[:, None] - torch.arange(30 * FRAME)) % FRAME == 0
    assert temporal[same_place].all()
    assert spatial[:, 21 * FRAME :].all()
    assert not spatial[:, : 20 * FRAME].any()


def test_svg_heads_look_at_keys_that_exist() -> None:
    """Half of a merged cache's slots are empty: neither kind of head spends its share on them."""
    position = positions(0, 20)[None, :, None].expand(1, -1, 2, -1)
    mass = torch.zeros(1, 2, 20 * FRAME)
    mass[..., 10 * FRAME :] = -torch.inf
    queries, keys = find_places(positions(30, 3), COLUMNS), find_places(position, COLUMNS, mass)
    for mask in make_masks(queries, keys, SvgSettings(NOTHING_DENSE, tile=8, density=0.25)):
        seen = read_rows(mask, torch.arange(3 * FRAME), 8)
        assert not seen[..., 10 * FRAME :].any()
        assert seen.any(-1).all()


def test_svg_finds_out_what_a_head_looks_at() -> None:
    """Head 0 looks at the place of the query at any time, head 1 at the newest frames: masks follow."""
    num_frames = 24
    code = torch.linalg.qr(torch.randn(FRAME, FRAME, generator=torch.Generator().manual_seed(0))).Q * 30.0
    where = torch.arange((num_frames + 3) * FRAME) % FRAME
    when = torch.arange((num_frames + 3) * FRAME) // FRAME
    by_place = code[where]
    by_time = torch.zeros_like(by_place)
    by_time[:, 0] = (when >= num_frames - 4).float() * 40.0
    queries_by_time = torch.zeros(3 * FRAME, FRAME)
    queries_by_time[:, 0] = 40.0
    k = torch.stack((by_place, by_time), 1)[None]
    q = torch.stack((by_place[-3 * FRAME :], queries_by_time), 1)[None]
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(1))
    split = num_frames * FRAME
    cached = KeyValues(k[:, :split], v[:, :split], positions(0, num_frames))
    own = KeyValues(k[:, split:], v[:, split:], positions(num_frames, 3))
    policy = SvgAttention(SvgSettings(NOTHING_DENSE, tile=8, density=0.25))
    policy.begin_chunk(own.position_K3)
    tiles = tiles_of(policy.plan(0, LATE, q, cached, own))
    assert tiles.key_order_BNK is not None
    in_order_of_time = (tiles.key_order_BNK[0] == torch.arange(split)).all(-1).tolist()
    assert in_order_of_time == [False, True]


def test_svg_samples_are_a_function_of_the_call() -> None:
    a, b = draw_sample(500, 64, LATE, 3), draw_sample(500, 64, LATE, 3)
    assert torch.equal(a, b)
    assert len(a.unique()) == 64
    assert not torch.equal(a, draw_sample(500, 64, LATE, 4))
    assert len(draw_sample(10, 64, LATE, 0)) == 10


@settings(max_examples=20)
@given(num=st.integers(1, 40), clusters=st.integers(1, 6), steps=st.integers(0, 4), seed=st.integers(0, 99))
def test_kmeans_equals_lloyd_written_out(num: int, clusters: int, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, num, 3, 4, dtype=torch.float64, generator=generator)
    start = torch.randn(2, 3, clusters, 4, dtype=torch.float64, generator=generator)
    weight = torch.randint(0, 3, (2, 3, num), generator=generator).double()
    found = cluster(x, start, steps, weight)
    for b in range(2):
        for n in range(3):
            centroid = start[b, n].clone()
            for _ in range(steps):
                label = torch.cdist(x[b, :, n], centroid).argmin(-1)
                for c in range(clusters):
                    w = weight[b, n] * (label == c)
                    if w.sum() > 0:
                        centroid[c] = (w[:, None] * x[b, :, n]).sum(0) / w.sum()
            torch.testing.assert_close(found.centroid_BNCD[b, n], centroid, atol=1e-9, rtol=0)
            assert torch.equal(found.label_BNK[b, n], torch.cdist(x[b, :, n], centroid).argmin(-1))
    sums = sum_by_cluster(weight, found.label_BNK, clusters)
    by_hand = torch.stack([(weight * (found.label_BNK == c)).sum(-1) for c in range(clusters)], -1)
    torch.testing.assert_close(sums, by_hand)


def test_first_centroids_are_tokens_and_no_more_than_there_are() -> None:
    x = torch.randn(1, 5, 2, 4)
    assert first_centroids(x, 9, seed=0).shape == (1, 2, 5, 4)
    assert torch.equal(first_centroids(x, 3, seed=1), first_centroids(x, 3, seed=1))


@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
def test_svg2_sees_the_mass_asked_for_where_clusters_say_all(top_p: float) -> None:
    """Keys are copies of 12 vectors, queries of 4: centroids predict the mass exactly, so top-p is reached."""
    generator = torch.Generator().manual_seed(2)
    kinds = torch.randn(12, 16, generator=generator) * 6
    keys = kinds[torch.randint(12, (600,), generator=generator)][None, :, None]
    queries = torch.randn(4, 16, generator=generator)[torch.arange(72) % 4][None, :, None]
    own_k = torch.randn(1, 72, 1, 16, generator=generator)
    cached = KeyValues(keys, keys, positions(0, 25))
    own = KeyValues(own_k, own_k, positions(25, 3))
    svg2 = Svg2Settings(NOTHING_DENSE, 1, 1, keys_per_cluster=10, top_p=top_p, min_share=0.0, first_iterations=40)
    policy = Svg2Attention(svg2)
    policy.begin_chunk(own.position_K3)
    mask = tiles_of(policy.plan(0, LATE, queries, cached, own)).mask(72, 600)[0, 0]
    weight = (queries[0, :, 0] @ torch.cat((keys, own_k), 1)[0, :, 0].T / 4).softmax(-1)
    seen = (weight[:, :600] * mask).sum(-1) + weight[:, 600:].sum(-1)
    assert seen.min() >= top_p - 1e-4
    assert mask.float().mean() < 1.0


def test_svg2_clusters_keys_once_per_chunk_and_queries_in_every_step() -> None:
    own_position, position = positions(9, 3), positions(0, 9)
    own, cached = draw_keys(own_position), draw_keys(position)
    policy = Svg2Attention(Svg2Settings(NOTHING_DENSE, 4, 4, keys_per_cluster=8))
    policy.begin_chunk(own_position)
    first = tiles_of(policy.plan(0, LATE, own.k_BKND, cached, own))
    second = tiles_of(policy.plan(0, LATE, torch.randn_like(own.k_BKND), cached, own))
    assert first.key_order_BNK is second.key_order_BNK
    assert first.query_order_BNQ is not None
    assert second.query_order_BNQ is not None
    assert not torch.equal(first.query_order_BNQ, second.query_order_BNQ)

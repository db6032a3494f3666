"""The half of the tile-skipping CUDA kernels that needs no GPU: orders, whole tiles, log m in channels, lists."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.contracts import KeyValues, TiledKeys, Tiles
from workers.kernels.reference import ReferenceKernel
from workers.kernels.skip_tiles import TileSkipper
from workers.kernels.tile_lists import TileList, list_tiles, split_tiles

TILE, BATCH, HEADS, HEAD_DIM = 8, 2, 3, 16


def attend_listed(q: Tensor, k: Tensor, v: Tensor, scale: float, lists: TileList) -> tuple[Tensor, Tensor]:
    """What a GPU kernel does with the lists, written out; it knows no bias and no keys but whole tiles of them."""
    assert k.shape[1] % TILE == 0
    assert lists.count_BNI.min() >= 1
    listed = torch.arange(lists.index_BNIJ.shape[-1]) < lists.count_BNI[..., None]
    visible = torch.zeros(*lists.count_BNI.shape, k.shape[1] // TILE, dtype=torch.bool)
    visible.scatter_(-1, lists.index_BNIJ.long(), listed)
    keys = KeyValues(k, pad_values(v, q.shape[-1]), torch.zeros(k.shape[1], 3))
    out, lse = ReferenceKernel().attend(q, (TiledKeys(keys, Tiles(visible, TILE, TILE)),), scale)
    return out[..., : v.shape[-1]], lse.transpose(1, 2)


def pad_values(v: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(v, (0, width - v.shape[-1]))


@settings(max_examples=60, deadline=None)
@given(
    num_queries=st.integers(1, 40),
    num_keys=st.integers(1, 70),
    times=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    mass=st.booleans(),
    orders=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
)
def test_equals_the_reference(
    num_queries: int,
    num_keys: int,
    times: tuple[int, int],
    share: float,
    mass: bool,
    orders: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(num_queries * 100 + num_keys)
    tiles = (TILE * times[0], TILE * times[1])
    q = torch.randn(BATCH, num_queries, HEADS, HEAD_DIM).to(dtype)
    k, v = torch.randn(2, BATCH, num_keys, HEADS, HEAD_DIM).to(dtype).unbind(0)
    log_mass = None
    if mass:
        log_mass = torch.rand(BATCH, HEADS, num_keys, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        log_mass = (log_mass * 4).masked_fill(torch.rand(BATCH, HEADS, num_keys) < 0.3, -math.inf)
    orders_of = [torch.rand(BATCH, HEADS, n).argsort(-1) if orders else None for n in (num_queries, num_keys)]
    shape = (BATCH, HEADS, -(-num_queries // tiles[0]), -(-num_keys // tiles[1]))
    part = TiledKeys(
        KeyValues(k, v, torch.zeros(num_keys, 3), log_mass), Tiles(torch.rand(shape) < share, *tiles, *orders_of)
    )
    skipper = TileSkipper(attend_listed, TILE)
    assert skipper.takes(part.tiles)
    expected = ReferenceKernel().attend(q, (part,))
    for _ in range(2):  # the second time from what was kept
        out, lse = skipper.attend(q, part)
        # In bfloat16 log m stands in two parts, exact to 2^-16 of at most 4 times the root of 16.
        torch.testing.assert_close(out, expected[0], atol=1e-10 if dtype == torch.float64 else 1e-2, rtol=0)
        torch.testing.assert_close(lse, expected[1], atol=1e-10 if dtype == torch.float64 else 1e-3, rtol=0)


def test_tiles_of_other_sizes_are_not_taken() -> None:
    tiles = Tiles(torch.ones(1, 1, 2, 2, dtype=torch.bool), 8, 12)
    assert not TileSkipper(attend_listed, TILE).takes(tiles)
    assert split_tiles(tiles, 8, 8) is None


def test_lists_name_the_visible_tiles_first_and_in_order() -> None:
    lists = list_tiles(torch.tensor([[[[True, False, True], [False, False, False], [True, True, True]]]]))
    assert lists.count_BNI.tolist() == [[[2, 0, 3]]]
    assert lists.index_BNIJ[0, 0, 0, :2].tolist() == [0, 2]
    assert lists.index_BNIJ[0, 0, 2].tolist() == [0, 1, 2]
    assert lists.index_BNIJ.dtype == lists.count_BNI.dtype == torch.int32


@pytest.mark.parametrize("num_keys", [16, 20])
def test_a_cache_that_needs_nothing_is_handed_on_as_it_is(num_keys: int) -> None:
    handed: list[Tensor] = []

    def look(q: Tensor, k: Tensor, v: Tensor, scale: float, lists: TileList) -> tuple[Tensor, Tensor]:
        handed.append(k)
        return attend_listed(q, k, v, scale, lists)

    k, v = torch.randn(2, 1, num_keys, HEADS, HEAD_DIM).unbind(0)
    tiles = Tiles(torch.ones(1, HEADS, 1, -(-num_keys // TILE), dtype=torch.bool), TILE, TILE)
    keys = KeyValues(k, v, torch.zeros(num_keys, 3))
    TileSkipper(look, TILE).attend(torch.randn(1, 4, HEADS, HEAD_DIM), TiledKeys(keys, tiles))
    assert (handed[0].data_ptr() == k.data_ptr()) == (num_keys == 16)

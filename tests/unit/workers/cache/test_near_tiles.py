"""The search for groups by tiles: as good as the whole search where it looks, and whole where the table is short."""

import pytest
import torch

from workers.cache.near_tiles import TileMeans, nearest_in_store, nearest_in_tiles
from workers.search.exact import ExactSearch

HEADS, DIM, TILE = 2, 16, 64
NEAREST = ExactSearch().top1


def make_pictures(num_tiles: int) -> torch.Tensor:
    """Keys tile by tile: what is in one picture has something in common."""
    generator = torch.Generator().manual_seed(num_tiles)
    common = torch.randn(1, HEADS, num_tiles, 1, DIM, generator=generator)
    return (common + torch.randn(1, HEADS, num_tiles, TILE, DIM, generator=generator)).flatten(2, 3)


@pytest.mark.parametrize("num_queries", [1, 64, 150])
def test_a_short_table_is_searched_as_a_whole(num_queries: int) -> None:
    keys = make_pictures(24)
    query = torch.randn(1, HEADS, num_queries, DIM, generator=torch.Generator().manual_seed(1))
    for found, want in zip(nearest_in_tiles(NEAREST, query, keys), NEAREST(query, keys), strict=True):
        assert torch.equal(found, want)


@pytest.mark.parametrize("first", [0, 5 * TILE, 39 * TILE, 59 * TILE + 7])
@pytest.mark.parametrize("num_queries", [64, 100])
def test_what_was_seen_before_is_found_wherever_it_lies(first: int, num_queries: int) -> None:
    keys = make_pictures(62)
    query = keys[:, :, first : first + num_queries] + 1e-3
    index, cosine = nearest_in_tiles(NEAREST, query, keys)
    assert torch.equal(index, (torch.arange(num_queries) + first).expand(1, HEADS, -1))
    torch.testing.assert_close(cosine, NEAREST(query, keys)[1])


class Slots:
    """A store that counts what is unpacked."""

    slots_at_once = 3 * TILE

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys, self.num_read = keys, 0

    def read_run(self, start: int, stop: int) -> torch.Tensor:
        self.num_read += stop - start
        return self.keys[:, :, start:stop]

    def gather(self, slot_BNR: torch.Tensor) -> torch.Tensor:
        return self.keys.gather(2, slot_BNR[..., None].expand(*slot_BNR.shape, DIM))


def test_a_store_is_searched_as_its_keys_are_and_little_of_it_is_read() -> None:
    keys, means, num = make_pictures(80), TileMeans((1, HEADS, 80 * TILE, DIM), torch.device("cpu")), 60 * TILE
    store = Slots(keys)
    for turn in range(6):
        query = keys[:, :, 9 * TILE : 10 * TILE] + 1e-3
        found = nearest_in_store(NEAREST, query, store, num, means)
        for x, want in zip(found, nearest_in_tiles(NEAREST, query, keys[:, :, :num]), strict=True):
            assert torch.equal(x, want)
        assert store.num_read <= (num if turn in (0, 3) else 25 * TILE)
        store.num_read, num = 0, num + 3 * TILE
        if turn == 2:  # everything moves
            keys = store.keys = keys.flip(2)
            means.forget()
        if turn == 4:  # some keys of a tile change
            keys = store.keys = keys.clone()
            keys[:, :, 50 * TILE + 3 :] += 1
            means.forget(50 * TILE + 3)

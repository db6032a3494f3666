"""Attention over listed tiles in Triton against the plain one. With `TRITON_INTERPRET=1` it runs without a GPU (with a
NumPy that turns arrays of one element into numbers)."""

import math
import os

import pytest
import torch

from tests.tables import draw_listed
from workers.kernels import listed_tiles
from workers.kernels.listed_tiles import attend_listed_plain, attend_listed_plain_lse

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("tile", "dim", "queries"), [(16, 24, 37), (64, 64, 100), (128, 128, 293)])
@pytest.mark.parametrize(
    "cut", [(128, 128, 8, 2, False), (128, 64, 8, 3, True), (64, 64, 4, 2, True), (32, 16, 4, 1, False)]
)
def test_it_gives_what_the_plain_one_gives(
    tile: int, dim: int, queries: int, cut: tuple[int, int, int, int, bool]
) -> None:
    pytest.importorskip("triton")
    from workers.kernels.triton_listed import Config, make_triton_listed, make_triton_listed_lse

    if cut[-1] and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors are for compute capability 9.0 and later")
    heads, tiles, listed = 2, 7, 3
    empty = slice(tile, tile + 9)
    *drawn, index = draw_listed((queries, heads, dim), tile, tiles, listed, most_mass=4 * math.sqrt(dim), empty=empty)
    device, dtype = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
    q, k, v = (x.to(device, dtype) for x in drawn)
    expected, expected_lse = attend_listed_plain_lse(q.float(), k.float(), v.float(), index.to(device), tile)
    found = make_triton_listed(tile, Config(*cut))(q, k, v, index.to(device)).float()
    same, lse = make_triton_listed_lse(tile, Config(*cut))(q, k, v, index.to(device))
    assert torch.equal(same.float(), found)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-4 if INTERPRETED else 0.05)
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < (1e-5 if INTERPRETED else 0.02)


def test_both_triton_kernels_give_what_the_plain_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    device, dtype = ("cpu", torch.float16) if INTERPRETED else ("cuda", torch.bfloat16)
    empty = slice(32, 41)
    *drawn, index = draw_listed((70, 2, 32), 32, 7, 3, most_mass=2 * math.sqrt(32), empty=empty)
    q, k, v = (x.clamp(min=-6e4).to(device, dtype) for x in drawn)
    expected = attend_listed_plain(q.float(), k.float(), v.float(), index.to(device), 32)
    for is_hopper in (False, True):
        monkeypatch.setattr(listed_tiles, "_is_hopper", lambda found=is_hopper: found)
        found = listed_tiles.make_attend("triton", 32)(q, k, v, index.to(device)).float()
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert float(error) < (2e-3 if INTERPRETED else 0.02)

"""Attention over listed tiles of 8-bit codes against the plain one; `TRITON_INTERPRET=1` runs it on a CPU."""

import math
import os

import pytest
import torch

from tests.tables import code_table, draw_listed
from workers.kernels.listed_codes import attend_codes_plain
from workers.kernels.listed_tiles import attend_listed_plain
from workers.kernels.lse import merge

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]
DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
LARGEST = 1e-5 if INTERPRETED else 0.02


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.float() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().square().mean().sqrt())


@pytest.mark.parametrize(("tile", "dim", "queries"), [(16, 24, 37), (64, 64, 100), (128, 128, 293)])
@pytest.mark.parametrize("cut", [(128, 128, 8, 2), (128, 64, 8, 3), (32, 16, 4, 1)])
def test_it_gives_what_the_plain_one_gives(tile: int, dim: int, queries: int, cut: tuple[int, int, int, int]) -> None:
    pytest.importorskip("triton")
    from workers.kernels.triton_codes import make_triton_codes
    from workers.kernels.triton_listed import Config

    empty = slice(tile, tile + 9)
    q, k, v, index = draw_listed((queries, 2, dim), tile, 7, 3, most_mass=4 * math.sqrt(dim), empty=empty)
    keys, q, index = code_table(k.to(DEVICE), v.to(DEVICE)), q[..., :dim].to(DEVICE, DTYPE), index.to(DEVICE)
    expected, expected_lse = attend_codes_plain(q.float(), keys, index, tile)
    found, lse = make_triton_codes(tile, Config(*cut))(q, keys, index)
    assert error(found, expected) < LARGEST
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-4 if INTERPRETED else 0.05)


def test_merged_with_keys_in_16_bits_it_is_attention_over_both() -> None:
    pytest.importorskip("triton")
    from workers.kernels.triton_codes import make_triton_codes

    tile, dim = 32, 32
    q, k, v, index = draw_listed((70, 2, dim), tile, 9, 4, most_mass=2 * math.sqrt(dim), empty=slice(0, 5))
    keys, index = code_table(k.to(DEVICE), v.to(DEVICE)), index.to(DEVICE)
    wide = k.clone()
    wide[..., :dim] = (keys.k_NLD * keys.k_scale_NL[..., None].float()).cpu()
    v = (keys.v_NLD * keys.v_scale_NL[..., None].float()).cpu()
    expected = attend_listed_plain(q, wide, v, index.cpu(), tile)
    narrow = q[..., :dim].to(DEVICE, DTYPE)
    parts = [make_triton_codes(tile)(narrow, keys, part.contiguous()) for part in (index[..., :3], index[..., 3:])]
    (out_a, lse_a), (out_b, lse_b) = parts
    found, _ = merge(out_a[None].float(), lse_a[None], out_b[None].float(), lse_b[None])
    assert error(found[0].cpu(), expected) < LARGEST


def test_tiles_without_a_key_count_for_nothing_beside_others() -> None:
    pytest.importorskip("triton")
    from workers.kernels.triton_codes import make_triton_codes

    q, k, v, index = draw_listed((20, 2, 16), 16, 4, 2, most_mass=1.0, empty=slice(0, 32))
    keys, q = code_table(k.to(DEVICE), v.to(DEVICE)), q[..., :16].to(DEVICE, DTYPE)
    index = torch.tensor([0, 1], dtype=torch.int32).expand(index.shape).contiguous().to(DEVICE)
    out, lse = make_triton_codes(16)(q, keys, index)
    assert bool(out.isfinite().all())
    assert float(lse.max()) < -1000

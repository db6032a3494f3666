"""The reference of attention in 8-bit floats, and how its tiles lie."""

from __future__ import annotations

import pytest
import torch

from tests.bench.fp8_attention import CASES, Case, draw, error
from workers.coded_tiles import (
    SCALE_V,
    code_masses,
    code_queries_plain,
    code_tiles_plain,
    decode_masses,
    erase_keys,
    key_of_byte,
    log2_mass,
    to_e4m3,
)
from workers.kernels.fp8_attention import make_source
from workers.kernels.fp8_plain import attend_coded_plain
from workers.kernels.listed_tiles import attend_listed_plain_lse

CPU = torch.device("cpu")


@pytest.mark.parametrize(("tile", "head_dim"), [(128, 128), (16, 24)])
def test_it_is_near_attention_in_float32(tile: int, head_dim: int) -> None:
    q, k = torch.randn(tile * 2 + 3, 2, head_dim + 2), torch.randn(2, tile * 5, head_dim + 2)
    q[..., head_dim:], k[..., head_dim + 1] = 1.0, 0.0
    v = torch.randn(2, tile * 5, head_dim)
    index = torch.rand(2, 3, 5).argsort(-1)[..., :3].int()
    out, lse = attend_coded_plain(q, k, v, index, tile)
    expected, expected_lse = attend_listed_plain_lse(q, k, v, index, tile)
    assert error(out, expected) < 0.08
    assert torch.allclose(lse, expected_lse, atol=0.1)


def test_one_key_whose_numbers_fit_is_exact() -> None:
    q, k = torch.randn(5, 2, 16), torch.randn(2, 1, 16)
    v = to_e4m3(torch.randn(2, 1, 16), SCALE_V).float() / SCALE_V
    out, _ = attend_coded_plain(q, k, v, None, 8)
    assert torch.equal(out, v.transpose(0, 1).expand(5, 2, 16))


def test_keys_in_one_run_are_all_tiles_in_order() -> None:
    q, k, v, index = draw(Case("", 200, 640, 5, heads=2, absent=0.2), CPU, torch.float32)
    listed, run = attend_coded_plain(q, k, v, index, 128), attend_coded_plain(q, k, v, None, 128)
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(listed, run, strict=True))


def test_rows_without_keys_are_zero() -> None:
    given = draw(next(case for case in CASES if case.name == "nothing but absent keys"), CPU, torch.float32)
    out, lse = attend_coded_plain(*given, 128)
    assert torch.equal(out, torch.zeros_like(out))
    assert bool(lse.isneginf().all())


def test_pieces_of_a_row_lie_swizzled_and_keys_of_values_as_a_thread_has_them() -> None:
    q, k, v, _ = draw(Case("", 130, 150, None, heads=1, mass=False), CPU, torch.float32)
    coded_q, tiles = code_queries_plain(q), code_tiles_plain(k, v)
    assert coded_q.shape == (1, 2, 16384)
    for row, channel in ((0, 0), (13, 77), (127, 127)):
        at = row * 128 + (channel // 16 ^ row % 8) * 16 + channel % 16
        assert coded_q[0, 0, at].view(torch.float8_e4m3fn) == to_e4m3(q[row, 0, channel], 4.0)
        assert tiles.k_NTB[0, 0, at].view(torch.float8_e4m3fn) == to_e4m3(k[0, row, channel], 4.0)
    # Byte 16 + 4 * 3 + 2 + 1 of the second 32 holds key 24 + 2 * 3 + 1 of them.
    channel, byte = 21, 32 + 16 + 12 + 3
    at = channel * 128 + (byte // 16 ^ channel % 8) * 16 + byte % 16
    assert tiles.v_NTB[0, 0, at].view(torch.float8_e4m3fn) == to_e4m3(v[0, 32 + 31, channel], 8.0)
    assert sorted(key_of_byte().tolist()) == list(range(128))
    log2 = decode_masses(tiles.mass_NTB, 128).flatten(1)
    assert bool(log2[0, 150:].isneginf().all())
    assert torch.equal(log2[0, :150], torch.zeros(150))


def test_codes_of_log_m_have_sixteen_bits() -> None:
    m = torch.tensor([1.0, 2.0, 3.0, 7.0, 100.0, 12345.0])
    k = torch.zeros(1, 7, 130)
    k[0, :6, 128] = (m.log() * 128**0.5).bfloat16().float()
    k[0, :6, 129] = m.log() * 128**0.5 - k[0, :6, 128]
    k[0, 6, 128] = -1e5
    exact = log2_mass(k, 128)[0]
    found = decode_masses(code_masses(k[..., 128:].sum(-1)), 128)[0, 0]
    torch.testing.assert_close(found[:6], exact[:6], rtol=2**-15, atol=1e-6)
    assert bool(found[6:].isneginf().all())


def test_erased_keys_are_no_keys() -> None:
    k, v = torch.randn(2, 1, 250, 128)
    tiles = code_tiles_plain(k, v)
    erase_keys(tiles, 130)
    log2 = decode_masses(tiles.mass_NTB, 128).flatten(1)
    assert bool(log2[:, 130:].isneginf().all())
    assert bool((log2[:, :130] == 0).all())


def test_the_source_holds_both_products_behind_what_kernels_share() -> None:
    source = make_source(0.125, SCALE_V)
    assert "#define FACTOR 0.125f\n" in source
    places = [source.index(part) for part in ("void bring(", "m64n128k32", "m64n136k32", "void __launch_bounds__")]
    assert places == sorted(places)

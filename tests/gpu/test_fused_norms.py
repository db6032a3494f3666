"""The kernel between two products against its plain forms; `TRITON_INTERPRET=1` runs it on a CPU."""

from __future__ import annotations

import os

import pytest
import torch

from tests.gpu.test_fused_codes import assert_near, draw, draw_product
from workers.model import add_norm
from workers.model.add_norm import Norm, _add_plain, norm_codes_plain, norm_rows_plain
from workers.model.fp8_linears import Product, has_products

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float32)
HAS_PRODUCTS = torch.cuda.is_available() and has_products(torch.device("cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]
TOKENS, FRAMES, EPS = 30, 3, 1e-6
CASES = ("first", "with weights", "without a gate", "not scaled", "gate of another layer")


def draw_case(case: str, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, Product | None, Norm]:
    x = draw(TOKENS, dim, dtype=dtype, seed=5) * 3
    modulation = draw(6, dim, dtype=dtype, seed=6), draw(FRAMES, 6, dim, dtype=dtype, seed=7)
    weights = draw(dim, dtype=dtype, seed=8), draw(dim, dtype=dtype, seed=9)
    product = None if case == "first" else draw_product(dim, dtype, scaled=case != "not scaled")
    if case == "with weights":
        return x, product, Norm(*modulation, 2, -1, *weights)
    if case == "gate of another layer":
        return x, product, Norm(*modulation, 5, 0, gate_6E=draw(6, dim, dtype=dtype, seed=10))
    return x, product, Norm(*modulation, -1, 3)


def in_float64(x: torch.Tensor, product: Product | None, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact but for the stream, which is rounded before it is normalised."""
    wide = Norm(*(part.double() if isinstance(part, torch.Tensor) else part for part in norm))
    stream = x
    if product is not None:
        stream = _add_plain(x.double(), Product(product.in_float32().double()), wide).to(x.dtype)
    return stream, norm_rows_plain(stream.double(), None, wide, EPS)[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [80, 256, 1536])
@pytest.mark.parametrize("case", CASES)
def test_norm_and_rows_in_one_pass(dtype: torch.dtype, dim: int, case: str) -> None:
    pytest.importorskip("triton")
    from workers.model import fused_norms

    x, product, norm = draw_case(case, dim, dtype)
    out, rows = fused_norms.norm_rows(x, product, norm, EPS)
    if product is None:
        assert torch.equal(add_norm._norm_rows(x, *norm, EPS), rows)
    else:
        for found, same in zip(add_norm._add_norm_rows(x, *product, *norm, EPS), (out, rows), strict=True):
            assert torch.equal(found, same)
    stream, exact = in_float64(x, product, norm)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out, stream, rtol=rounding, atol=1e-5)
    exact = exact if torch.equal(out, stream) else in_float64(out, None, norm)[1]
    torch.testing.assert_close(rows.double(), exact, rtol=rounding, atol=1e-5)
    plain = norm_rows_plain(x, product, norm, EPS)
    torch.testing.assert_close(rows, plain[1], rtol=4 * rounding, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [80, 256, 1536])
@pytest.mark.parametrize("case", CASES)
def test_norm_and_codes_in_one_pass(dtype: torch.dtype, dim: int, case: str) -> None:
    pytest.importorskip("triton")
    if not (HAS_PRODUCTS or INTERPRETED):
        pytest.skip("needs a CUDA device that has 8-bit floats")
    from workers.model import fused_norms

    x, product, norm = draw_case(case, dim, dtype)
    out, *codes = fused_norms.norm_codes(x, product, norm, EPS)
    stream, expected = norm_codes_plain(x, product, norm, EPS)
    torch.testing.assert_close(out, stream, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    assert_near((codes[0], codes[1]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_last_product_is_added_alone(dtype: torch.dtype, scaled: bool) -> None:
    pytest.importorskip("triton")
    from workers.model import fused_norms

    x, product = draw(TOKENS, 96, dtype=dtype, seed=5), draw_product(96, dtype, scaled=scaled)
    norm = Norm(draw(6, 96, dtype=dtype, seed=6), draw(FRAMES, 6, 96, dtype=dtype, seed=7), 5)
    found = fused_norms.add_product(x, product, norm)
    assert torch.equal(add_norm._add_product(x, *product, *norm[:3]), found)
    torch.testing.assert_close(found, in_float64(x, product, norm._replace(shift=0))[0], rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("case", CASES[:2] + CASES[-1:])
def test_however_the_work_is_cut(case: str) -> None:
    pytest.importorskip("triton")
    from workers.model import fused_norms
    from workers.model.fused_norms import Launch

    x, product, norm = draw_case(case, 96, DTYPES[0])
    expected = fused_norms.norm_rows(x, product, norm, EPS)
    cuts = [Launch(1, 1), Launch(2, 2, 2), Launch(5, 4, 3, True), Launch(10, 4, 2), Launch(4, 2)]
    for cut in cuts:  # ten tokens a frame: by fours they would share a program with the next frame's
        for found, same in zip(fused_norms.norm_rows(x, product, norm, EPS, cut), expected, strict=True):
            torch.testing.assert_close(found, same, rtol=1e-5 if DTYPES[0] == torch.float32 else 2**-7, atol=1e-5)

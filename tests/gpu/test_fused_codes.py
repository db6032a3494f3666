"""Kernels that write codes of 8-bit floats against their plain forms, and products of such; see `fp8_linears.py`.

`TRITON_INTERPRET=1` runs the kernels, not the products, on a CPU.
"""

import os
from typing import Any

import pytest
import torch

from workers.coded_tiles import TILE_BYTES, code_queries_plain
from workers.model.fp8_linears import (
    Codes,
    LinearWeights,
    Product,
    encode_rows,
    gelu_codes_plain,
    has_products,
    multiply,
    quantise,
    row_codes_plain,
    weight_codes_plain,
)
from workers.model.rope import grid_positions, make_rotation
from workers.model.static_layers import Targets, norm_rotate_plain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float32)
HAS_PRODUCTS = torch.cuda.is_available() and has_products(torch.device("cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_PRODUCTS or INTERPRETED), reason="needs a CUDA device that has 8-bit floats"),
]
TOKENS = 30


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def draw_product(dim: int, dtype: torch.dtype, *, scaled: bool) -> Product:
    sums = draw(TOKENS, dim, dtype=dtype, seed=1)
    if not scaled:
        return Product(sums)
    scale_Q1, scale_1O = draw(TOKENS, 1, seed=2).abs() / 1e3 + 1e-4, draw(1, dim, seed=3).abs() / 1e3 + 1e-4
    return Product((sums * 1e6).to(dtype), scale_Q1, scale_1O, draw(dim, dtype=dtype, seed=4))


def assert_near(found: tuple[torch.Tensor, torch.Tensor], expected: Codes) -> None:
    """What the codes stand for: by at most a step of a code apart where a rounding fell otherwise, on average equal."""
    code, scale = found
    assert code.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(scale, expected.scale_Q1, rtol=2e-2, atol=0)
    a, b = code.float() * scale, expected.code_QI.float() * expected.scale_Q1
    if INTERPRETED:  # Triton's interpreter loses the carry where rounding up reaches the next power of two
        a = torch.where(code.float() * 2 == expected.code_QI.float(), b, a)
    largest = b.abs().amax(-1, keepdim=True)
    assert bool(((a - b).abs() <= 0.13 * b.abs() + 0.005 * largest).all())
    assert float((a - b).square().mean().sqrt()) < 0.015 * float(b.square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [96, 768, 8960])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("approximate", [False] if INTERPRETED else [False, True])
def test_gelu_and_codes_in_one_pass(dtype: torch.dtype, dim: int, scaled: bool, approximate: bool) -> None:
    pytest.importorskip("triton")
    from workers.model import fused_codes

    product = draw_product(dim, dtype, scaled=scaled)
    found = fused_codes.gelu_codes(product, approximate=approximate)
    assert_near(found, gelu_codes_plain(product))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 40), (12, 128)])
@pytest.mark.parametrize("heads_outside", [False, True])
def test_codes_of_what_attention_gives(dtype: torch.dtype, heads: int, head_dim: int, heads_outside: bool) -> None:
    pytest.importorskip("triton")
    from workers.model import fused_codes

    shape = (heads, TOKENS, head_dim) if heads_outside else (TOKENS, heads, head_dim)
    h = draw(*shape, dtype=dtype)
    h = h.transpose(0, 1) if heads_outside else h
    assert_near(fused_codes.row_codes(h), row_codes_plain(h))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 80), (64, 1536), (16, 8960)])
def test_codes_of_a_weight_by_scales_that_are_known(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    from workers.model import fused_codes

    weight = draw(*shape, dtype=dtype)
    expected = encode_rows(weight)
    scale_1O = expected.scale_Q1.t().contiguous()
    found = fused_codes.weight_codes(weight, scale_1O)
    assert_near((found, expected.scale_Q1), expected)
    assert_near((weight_codes_plain(weight, scale_1O), expected.scale_Q1), expected)


def test_a_row_of_zeros_has_codes_of_zero() -> None:
    pytest.importorskip("triton")
    from workers.model import fused_codes

    h = draw(TOKENS, 2, 40)
    h[7] = 0
    code, scale = fused_codes.row_codes(h)
    assert not code[7].float().any()
    assert bool(scale.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 40), (12, 128)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_scales_applied_before_norm_and_rope(dtype: torch.dtype, heads: int, head_dim: int, tokens: int) -> None:
    pytest.importorskip("triton")
    from workers.model.fused_rotate import Launch, norm_rotate

    dim = heads * head_dim
    rotation = make_rotation(grid_positions(torch.arange(2, device=DEVICE) + 40, 3, 5)[None], head_dim, 10_000.0)
    product = draw_product(3 * dim, dtype, scaled=True)
    assert product.scale_Q1 is not None
    assert product.scale_1O is not None
    assert product.bias_O is not None
    norms = draw(dim, dtype=dtype, seed=10), draw(dim, dtype=dtype, seed=11)
    found, expected = (
        Targets(*(torch.zeros(shape, device=DEVICE, dtype=dtype) for shape in shapes))
        for shapes in [((TOKENS, heads, head_dim), *2 * [(heads, TOKENS, head_dim)])] * 2
    )
    scales = product.scale_Q1, product.scale_1O, product.bias_O
    norm_rotate(product.sum_QO, norms, rotation, 1e-6, found, scales, Launch(tokens))
    norm_rotate_plain(product.value, *norms, rotation, 1e-6, expected)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not HAS_PRODUCTS, reason="needs a CUDA device that has 8-bit floats")
@pytest.mark.parametrize(
    ("dtype", "vectors"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)]
)
def test_a_product_of_codes_is_that_of_what_they_stand_for(dtype: torch.dtype, vectors: bool) -> None:
    if vectors and dtype == torch.float32:
        pytest.skip("the library's products that apply vectors of scales write bfloat16")
    linear = LinearWeights(draw(512, 1536, dtype=dtype, seed=12) / 40, draw(512, dtype=dtype, seed=13))
    coded, codes = quantise(linear, vectors=vectors), encode_rows(draw(90, 1536, dtype=dtype, seed=14))
    assert (coded.one is None) == vectors
    assert coded.scale_1O is not None
    weight_code = weight_codes_plain(coded.weight_OI, coded.scale_1O)
    exact = (codes.code_QI.double() * codes.scale_Q1) @ (weight_code.double() * coded.scale_1O.t()).t()
    found = multiply(coded, codes).value.double()
    error = (found - exact - linear.bias_O.double()).square().mean().sqrt() / exact.square().mean().sqrt()
    assert float(error) < 1e-2, "bfloat16 rounds by 2^-9; sums of 8-bit floats are kept in about 14 bits"


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("scaled", [True, False])
def test_codes_of_queries_and_keys_beside_them_or_alone(rows: bool, tokens: int, scaled: bool) -> None:
    """Of what is rounded, bit for bit; tiles behind the last token are left alone."""
    pytest.importorskip("triton")
    from workers.model.fused_rotate import Launch, norm_rotate

    heads, head_dim, dtype = 3, 128, DTYPES[0]
    dim, tiles = heads * head_dim, 2
    rotation = make_rotation(grid_positions(torch.arange(2, device=DEVICE) + 40, 3, 5)[None], head_dim, 10_000.0)
    sums, *scale = draw_product(3 * dim, dtype, scaled=scaled)
    scales: Any = tuple(scale) if scaled else None
    norms = draw(dim, dtype=dtype, seed=10), draw(dim, dtype=dtype, seed=11) * 40  # more than fits
    shapes = (TOKENS, heads, head_dim), *2 * [(heads, TOKENS, head_dim)]
    expected, found = (Targets(*(torch.zeros(shape, device=DEVICE, dtype=dtype) for shape in shapes)) for _ in range(2))
    nines = torch.full((2, heads, tiles, TILE_BYTES), 9, dtype=torch.uint8, device=DEVICE)
    codes = nines[0], nines[1]
    norm_rotate(sums, norms, rotation, 1e-6, expected, scales, Launch(tokens))
    norm_rotate(sums, norms, rotation, 1e-6, found, scales, Launch(tokens), codes, rows=rows)
    assert torch.equal(found[2], expected[2])
    in_tokens = expected[0], expected[1].transpose(0, 1)
    for x, y, in_order, code in zip(found[:2], expected[:2], in_tokens, codes, strict=True):
        assert torch.equal(x, y if rows else torch.zeros_like(y))
        in_rows, plain = (c[:, 0].unflatten(1, (128, 128)) for c in (code, code_queries_plain(in_order)))
        assert bool((in_rows[:, TOKENS:] == 9).all())
        assert bool((code[:, 1:] == 9).all())
        same = in_rows[:, :TOKENS] == plain[:, :TOKENS]
        if INTERPRETED:  # it loses the carry where rounding up reaches the next power of two, and does not saturate
            assert float((~same).float().mean()) < 0.1
        else:
            assert bool(same.all())

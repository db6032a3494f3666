"""Kernels of cross-attention to the prompt, against the plain form and float64; see `prompt_attention.py`.

`TRITON_INTERPRET=1` runs them on a CPU.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from workers.model.backbones import find_backbone
from workers.model.dit import CausalDiT
from workers.model.fp8_linears import Fp8Linears, Product, has_products
from workers.model.prompt_attention import (
    PromptTable,
    attend_prompt,
    attend_prompt_plain,
    has_kernel,
    hold_prompt,
)
from workers.model.static_layers import StaticLayers

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float32)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]
SIZES = [(77, 3, 64), (33, 2, 128)] if INTERPRETED else [(4679, 12, 128), (77, 3, 64), (130, 5, 16)]
EPS = 1e-6


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def draw_product(tokens: int, dim: int, dtype: torch.dtype, *, scaled: bool) -> Product:
    sums = draw(tokens, dim, seed=1)
    if not scaled:
        return Product(sums.to(dtype))
    scale_Q1, scale_1O = draw(tokens, 1, seed=2).abs() / 1e2 + 1e-2, draw(1, dim, seed=3).abs() / 1e2 + 1e-2
    return Product((sums * 1e3).to(dtype), scale_Q1, scale_1O, draw(dim, dtype=dtype, seed=4))


def draw_prompt(heads: int, rows: int, head_dim: int, dtype: torch.dtype) -> PromptTable:
    """One row stands for many; some in front, more than are taken at once where there are so many, have no weight."""
    mass = torch.zeros(rows, device=DEVICE)
    mass[rows // 2] = 5.3
    mass[-rows // 8 :] = -torch.inf
    mass[: rows // 4] = -torch.inf
    return PromptTable(
        draw(heads, rows, head_dim, dtype=dtype, seed=5), draw(heads, rows, head_dim, dtype=dtype, seed=6), mass
    )


def attend_exactly(product: Product, norm_E: Tensor, prompt: PromptTable) -> Tensor:
    heads, _, head_dim = prompt.k_NPD.shape
    q = product.value.double()
    q = q * (q.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm_E.double()
    q_NQD = q.unflatten(-1, (heads, head_dim)).transpose(0, 1)
    logit = q_NQD @ prompt.k_NPD.double().mT / head_dim**0.5 + prompt.log_mass_P.double()
    return (logit.softmax(-1) @ prompt.v_NPD.double()).transpose(0, 1)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 112, 512])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), SIZES)
def test_attention_to_the_prompt(
    dtype: torch.dtype, rows: int, scaled: bool, tokens: int, heads: int, head_dim: int
) -> None:
    pytest.importorskip("triton")
    from workers.model import fused_prompt

    product = draw_product(tokens, heads * head_dim, dtype, scaled=scaled)
    norm, prompt = draw(heads * head_dim, dtype=dtype, seed=7) * 2, draw_prompt(heads, rows, head_dim, dtype)
    assert INTERPRETED or has_kernel(product.sum_QO, head_dim)
    exact = attend_exactly(product, norm, prompt)
    found = fused_prompt.attend_prompt(product, norm, prompt, EPS)
    assert found.shape == (tokens, heads, head_dim)
    assert found.is_contiguous()
    assert found.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=2e-5)
    plain = attend_prompt_plain(product, norm, prompt, EPS)
    assert error(found, exact) < 1.2 * error(plain, exact) + 1e-6  # it rounds where that does, or less often
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("rows", [16, 48, 144])
@pytest.mark.parametrize("scaled", [False, True])
def test_however_the_work_is_cut(rows: int, scaled: bool) -> None:
    pytest.importorskip("triton")
    from workers.model import fused_prompt
    from workers.model.fused_prompt import Launch

    dtype = DTYPES[0]
    tokens, heads, head_dim = 203, 3, 32
    product = draw_product(tokens, heads * head_dim, dtype, scaled=scaled)
    norm, prompt = draw(heads * head_dim, dtype=dtype, seed=7), draw_prompt(heads, rows, head_dim, dtype)
    exact = attend_exactly(product, norm, prompt)
    launches = [
        Launch(16, programs=1, num_stages=1),  # of each head one, which does all
        Launch(32, programs=9, num_stages=2, norm_tokens=4, norm_warps=2),
        Launch(64, programs=6, num_stages=3, whole_p=32, block_p=16, norm_tokens=16),
        Launch(128, programs=10**6, num_warps=8, whole_p=256),
    ]
    for launch in launches[: 3 if dtype == torch.float32 else 4]:
        found = fused_prompt.attend_prompt(product, norm, prompt, EPS, launch)
        assert error(found, exact) < (1e-5 if dtype == torch.float32 else 1e-2), launch


@pytest.mark.parametrize("scaled", [False, True])
def test_the_norms_inverse_is_over_all_heads(scaled: bool) -> None:
    pytest.importorskip("triton")
    from workers.model import fused_prompt

    product = draw_product(29, 1536, DTYPES[0], scaled=scaled)
    exact = (product.value.double().square().mean(-1) + EPS).rsqrt()
    torch.testing.assert_close(fused_prompt.inverse_norms(product, EPS).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("fp8", ["none", "all"])
@torch.inference_mode()
def test_a_layer_compiled_with_the_kernel_is_the_one_without(fp8: Fp8Linears) -> None:
    if fp8 != "none" and not has_products(torch.device("cuda")):
        pytest.skip("needs products of 8-bit floats")
    backbone = replace(find_backbone("longtake-world"), num_layers=1)
    model = CausalDiT(backbone).to(DEVICE, torch.bfloat16)
    torch.manual_seed(3)
    model.reset_parameters(zero_output=False)
    model.eval().requires_grad_(False)
    prompt = hold_prompt(model.project_prompt(draw(1, 21, backbone.text_dim, dtype=torch.bfloat16)))[0]
    x = draw(90, backbone.dim, dtype=torch.bfloat16, seed=1)
    out = draw(90, backbone.num_heads, backbone.head_dim, dtype=torch.bfloat16, seed=2)
    time = draw(3, 6, backbone.dim, dtype=torch.bfloat16, seed=3) / 4
    added = []
    for way, compiled in ((attend_prompt, True), (attend_prompt, False), (attend_prompt_plain, False)):
        layers = StaticLayers(model, fp8, attend=way)
        if compiled:
            layers.compile()
        added.append((layers.settle(layers.leave(layers.weights[0], prompt, x, out, time), time) - x).double())
    assert error(added[0], added[2]) < 0.02  # a rounding of bfloat16 may fall otherwise, and so may one of a code
    assert error(added[1], added[2]) < 0.02

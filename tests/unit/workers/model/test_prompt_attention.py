"""Cross-attention to the prompt in static layers: exact in its plain form, and whole when a layer is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.contracts import PromptKeys
from workers.model.backbones import find_backbone
from workers.model.dit import CausalDiT, attend_prompt_dense
from workers.model.fp8_linears import Fp8Linears, Product
from workers.model.prompt_attention import (
    PromptAttention,
    PromptTable,
    attend_prompt,
    attend_prompt_plain,
    has_kernel,
    hold_prompt,
)
from workers.model.static_layers import StaticLayers

TOKENS, ROWS, HEADS, HEAD_DIM, EPS = 9, 21, 3, 8, 1e-6
DIM = HEADS * HEAD_DIM


def make_keys(dtype: torch.dtype) -> PromptKeys:
    """Of 17 rows that are words, one that stands for many, and three of no weight."""
    mass = torch.zeros(1, ROWS)
    mass[0, 17], mass[0, 18:] = 4.0, -torch.inf
    k, v = (torch.randn(1, ROWS, HEADS, HEAD_DIM, dtype=dtype) for _ in range(2))
    return PromptKeys(k, v, mass)


def make_product(dtype: torch.dtype, *, scaled: bool) -> Product:
    sums = torch.randn(TOKENS, DIM, dtype=dtype)
    return Product(sums, torch.rand(TOKENS, 1), torch.rand(1, DIM), torch.randn(DIM)) if scaled else Product(sums)


@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_norm_and_attention_over_the_rows_of_the_prompt(scaled: bool) -> None:
    dtype = torch.float32 if scaled else torch.float64
    keys, product, norm_E = make_keys(dtype), make_product(dtype, scaled=scaled), torch.rand(DIM, dtype=dtype)
    q = product.value
    q = q / (q.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_E
    expected = attend_prompt_dense(0, q.unflatten(-1, (HEADS, HEAD_DIM))[None], keys)[0]
    prompt = hold_prompt([keys])[0]
    assert prompt.k_NPD.shape == (HEADS, 32, HEAD_DIM)
    found = attend_prompt(product, norm_E, prompt, EPS)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)  # logits are float32
    assert found.is_contiguous()
    assert torch.equal(found, attend_prompt_plain(product, norm_E, prompt, EPS))


@pytest.mark.parametrize("scaled", [False, True])
def test_the_operation_says_what_it_gives_before_it_runs(scaled: bool) -> None:
    product, prompt = make_product(torch.float32, scaled=scaled), hold_prompt([make_keys(torch.float32)])[0]
    torch.library.opcheck(torch.ops.longtake.attend_prompt.default, (*product, torch.rand(DIM), *prompt, EPS))


def test_kernels_are_for_gpus() -> None:
    assert not has_kernel(torch.zeros(1, DIM), 128)


@pytest.mark.parametrize("fp8", ["none", "all"])
def test_a_layer_is_the_same_with_the_operation_and_with_the_plain_form(fp8: Fp8Linears) -> None:
    torch.manual_seed(3)
    backbone = find_backbone("tiny-test")
    model = CausalDiT(backbone)
    model.reset_parameters(zero_output=False)
    model.eval().requires_grad_(False)
    x, time = torch.randn(12, backbone.dim), torch.randn(3, 6, backbone.dim) / 4
    out = torch.randn(12, backbone.num_heads, backbone.head_dim)
    prompt: PromptTable = hold_prompt(model.project_prompt(torch.randn(1, 5, backbone.text_dim)))[0]

    def run(attend: PromptAttention, backend: str | None = None) -> Tensor:
        layers = StaticLayers(model, fp8, attend=attend)
        if backend is not None:
            layers.compile(backend)
        return layers.settle(layers.leave(layers.weights[0], prompt, x, out, time), time)

    plain = run(attend_prompt_plain)
    assert torch.equal(run(attend_prompt), plain)
    torch.testing.assert_close(run(attend_prompt, "aot_eager"), plain, rtol=1e-4, atol=1e-4)

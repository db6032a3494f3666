"""Linear layers in 8-bit floats: how far they are from exact ones, and that every way of them rounds the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.plain_fp8 import round_linears
from workers.model.add_norm import Norm, norm_codes_plain
from workers.model.backbones import BACKBONES, find_backbone
from workers.model.dit import CausalDiT
from workers.model.fp8_linears import (
    Codes,
    Fp8Linears,
    Fp8Way,
    LinearWeights,
    encode_rows,
    gelu_codes_plain,
    multiply,
    quantise,
    row_codes_plain,
    weight_codes_plain,
)
from workers.model.prompt_attention import hold_prompt
from workers.model.rope import grid_positions, make_rotation
from workers.model.static_layers import StaticLayers, Stream, Targets

TOKENS, FRAMES, EPS = 12, 3, 1e-6
LARGEST_ERROR = 0.04
"""RMS of a product: a code is off by 2^-4 at most, 2.6% RMS with its subnormals, and so are both factors."""
BACKBONE = find_backbone("tiny-test")


def decode(codes: Codes) -> Tensor:
    return codes.code_QI.double() * codes.scale_Q1.double()


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).square().mean().sqrt() / exact.double().square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_near_the_exact_one_whatever_the_size_of_a_row_or_an_output(dtype: torch.dtype) -> None:
    x, weight = torch.randn(TOKENS, 256), torch.randn(64, 256)
    x, weight = x * torch.logspace(-6, 6, TOKENS)[:, None], weight * torch.logspace(-3, 3, 64)[:, None]
    linear = LinearWeights(weight.to(dtype), torch.zeros(64, dtype=dtype))
    found = multiply(quantise(linear), encode_rows(x.to(dtype))).value
    assert found.dtype == dtype
    exact = F.linear(x.to(dtype).double(), linear.weight_OI.double())
    size = x.norm(dim=-1)[:, None] * weight.norm(dim=-1) / 16  # RMS of a product of such random numbers
    error = ((found.double() - exact) / size).square().mean().sqrt()
    assert 1e-3 < float(error) < LARGEST_ERROR


def test_where_no_product_of_8_bits_exists_codes_are_multiplied_as_they_are() -> None:
    linear = LinearWeights(torch.randn(64, 256), torch.randn(64))
    coded, codes = quantise(linear), encode_rows(torch.randn(TOKENS, 256))
    exact = decode(codes) @ decode(encode_rows(linear.weight_OI)).t() + linear.bias_O.double()
    torch.testing.assert_close(multiply(coded, codes).value.double(), exact, rtol=1e-5, atol=1e-4)


def test_codes_round_to_nearest_and_zeros_stay() -> None:
    x = torch.randn(TOKENS, 96)
    x[5] = 0
    codes = encode_rows(x)
    assert float(codes.code_QI.float().abs().amax()) == 448
    assert bool(codes.scale_Q1.isfinite().all())
    smallest = x.abs().amax(-1, keepdim=True) / 448 * 2**-10
    assert bool(((decode(codes) - x).abs() <= (x.abs() / 16).maximum(smallest) * 1.0001).all())


def test_the_dtype_of_the_model_holds_any_sum_of_codes() -> None:
    widest = max(max(b.dim, b.ffn_dim) for b in BACKBONES.values())
    codes = Codes(torch.full((1, widest), 448.0).to(torch.float8_e4m3fn), torch.full((1, 1), 1e-9))
    weight = LinearWeights(torch.full((16, widest), 448.0, dtype=torch.bfloat16), torch.zeros(16), torch.ones(1, 16))
    assert bool(multiply(weight, codes).sum_QO.isfinite().all())


def test_sizes_of_every_backbone_go_into_such_products() -> None:
    assert all(size % 16 == 0 for b in BACKBONES.values() for size in (b.dim, b.ffn_dim))


def test_what_stands_between_two_products_is_that_of_the_layer() -> None:
    dim = 96
    x, modulation = torch.randn(TOKENS, dim), (torch.randn(6, dim), torch.randn(FRAMES, 6, dim))
    weights = torch.randn(dim), torch.randn(dim)
    linear = LinearWeights(torch.randn(dim, 64), torch.randn(dim))
    product = multiply(quantise(linear), encode_rows(torch.randn(TOKENS, 64)))
    m = (modulation[0] + modulation[1]).repeat_interleave(TOKENS // FRAMES, 0)
    for norm, gate in ((Norm(*modulation, 2, -1, *weights), m[:, 2]), (Norm(*modulation, shift=3), 1.0)):
        stream, codes = norm_codes_plain(x, product, norm, EPS)
        torch.testing.assert_close(stream, x + product.value * gate)
        h = F.layer_norm(stream, (dim,), None, None, EPS)
        h = h * weights[0] + weights[1] if norm.shift < 0 else h * (1 + m[:, 4]) + m[:, 3]
        assert distance(decode(codes), h) < LARGEST_ERROR
    gelu = F.gelu(product.value, approximate="tanh")
    assert distance(decode(gelu_codes_plain(product)), gelu) < LARGEST_ERROR
    heads = torch.randn(3, TOKENS, 32).transpose(0, 1)
    assert distance(decode(row_codes_plain(heads)), heads.flatten(1)) < LARGEST_ERROR


class OneLayer:
    """The pieces of one layer around what attention gives, which is random here."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = CausalDiT(BACKBONE)
        self.model.reset_parameters(zero_output=False)
        self.model.eval().requires_grad_(False)
        self.x, self.time = torch.randn(TOKENS, BACKBONE.dim), torch.randn(FRAMES, 6, BACKBONE.dim) / 4
        self.out = torch.randn(TOKENS, BACKBONE.num_heads, BACKBONE.head_dim)
        position = grid_positions(torch.arange(FRAMES), 2, 2)
        self.rotation = make_rotation(position[None], BACKBONE.head_dim, BACKBONE.rope_theta)
        self.keys = self.model.project_prompt(torch.randn(1, 5, BACKBONE.text_dim))

    def run(self, fp8: Fp8Linears, way: Fp8Way, backend: str | None = None, *, clean: bool = False) -> list[Tensor]:
        layers = StaticLayers(self.model, fp8, way)
        if backend is not None:
            layers.compile(backend)
        heads = BACKBONE.num_heads, TOKENS, BACKBONE.head_dim
        to = Targets(torch.zeros_like(self.out), torch.zeros(heads), torch.zeros(heads))
        weights = (layers.clean_weights if clean else layers.weights)[0]
        x = layers.enter(weights, Stream(self.x), self.time, self.rotation, to)
        stream = layers.leave(weights, hold_prompt(self.keys)[0], x, self.out, self.time)
        return [layers.settle(stream, self.time), *to]


@pytest.mark.parametrize("fp8", ["ffn", "large", "all"])
def test_every_way_gives_the_same_and_is_near_the_layer_itself(fp8: Fp8Linears) -> None:
    layer = OneLayer()
    exact = layer.run("none", Fp8Way())
    found = layer.run(fp8, Fp8Way())
    for way, backend in ((Fp8Way(kernels=False), None), (Fp8Way(), "aot_eager")):
        for a, b in zip(layer.run(fp8, way, backend), found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert 1e-3 < distance(found[0] - layer.x, exact[0] - layer.x) < 3 * LARGEST_ERROR
    assert torch.equal(found[3], exact[3]) == (fp8 == "ffn"), "values come of the product for queries, keys and values"
    assert distance(found[1], exact[1]) < 2 * LARGEST_ERROR


@pytest.mark.parametrize("fp8", ["none", "large", "all"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_what_a_layer_ends_with_is_added_where_the_next_begins(fp8: Fp8Linears, backend: str | None) -> None:
    layer = OneLayer()
    layers, prompt = StaticLayers(layer.model, fp8), hold_prompt(layer.keys)[0]
    if backend is not None:
        layers.compile(backend)
    stream = layers.leave(layers.weights[0], prompt, layer.x, layer.out, layer.time)
    assert torch.equal(stream.x_QE + 0, layers.settle(Stream(stream.x_QE), layer.time))
    heads, found = (BACKBONE.num_heads, TOKENS, BACKBONE.head_dim), []
    for entered in (stream, Stream(layers.settle(stream, layer.time))):
        to = Targets(torch.zeros_like(layer.out), torch.zeros(heads), torch.zeros(heads))
        found.append((layers.enter(layers.weights[1], entered, layer.time, layer.rotation, to), *to))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **({} if fp8 == "none" else {"rtol": 1e-3, "atol": 1e-3}))
    if fp8 == "none" and backend is None:
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("fp8", ["ffn", "large", "all"])
def test_a_model_that_rounds_is_the_one_of_a_tile_table(fp8: Fp8Linears) -> None:
    layer = OneLayer()
    model = round_linears(layer.model, fp8)

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer.out[None]

    def attend_prompt(index: int, q: Tensor, keys: object) -> Tensor:
        prompt = layer.keys[0]
        parts = (part.transpose(1, 2) for part in (q, prompt.k_BPND, prompt.v_BPND))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2)

    plain = model.layers[0](layer.x[None], layer.time[None], layer.keys[0], 0, attend, attend_prompt)
    found = layer.run(fp8, Fp8Way())[0]
    assert distance(plain[0] - layer.x, found - layer.x) < 0.02, "codes next to a border may fall on its other side"


@pytest.mark.parametrize("fp8", ["ffn", "large", "all"])
def test_a_clean_pass_does_not_round_and_leaves_the_models_weights_as_they_are(fp8: Fp8Linears) -> None:
    layer = OneLayer()
    kept = [parameter.clone() for parameter in layer.model.parameters()]
    for clean, exact in zip(layer.run(fp8, Fp8Way(), clean=True), layer.run("none", Fp8Way()), strict=True):
        assert torch.equal(clean, exact)
    layers = StaticLayers(layer.model, fp8)
    assert layers.has_clean_weights
    assert not StaticLayers(layer.model).has_clean_weights
    assert layers.weights[0].up.weight_OI.data_ptr() == layer.model.layers[0].ffn[0].weight.data_ptr(), "held once"  # type: ignore[union-attr]
    for now, before in zip(layer.model.parameters(), kept, strict=True):
        assert torch.equal(now, before)


def test_a_model_that_rounds_does_so_in_steps_alone() -> None:
    layer = OneLayer()
    model = round_linears(layer.model, "all")
    latents = torch.randn(1, FRAMES, BACKBONE.in_channels, 4, 4)

    def flow(of: CausalDiT, timestep: float) -> Tensor:
        time = torch.full((1, FRAMES), timestep)
        found: Tensor = of(latents, time, layer.keys, lambda index, q, k, v: v + q)
        return found

    torch.testing.assert_close(flow(model, 0.0), flow(layer.model, 0.0))
    assert distance(flow(model, 500.0), flow(layer.model, 500.0)) > 1e-3


def test_codes_of_a_weight_are_those_of_its_rows() -> None:
    weight = torch.randn(32, 96) * torch.logspace(-3, 3, 32)[:, None]
    code, scale = encode_rows(weight)
    assert torch.equal(weight_codes_plain(weight, scale.t()).float(), code.float())

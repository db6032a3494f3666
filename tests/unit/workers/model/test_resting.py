"""Weights that codes stand for go to host memory and come back as they were; nothing computes without them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workers.geometry import coded_weights, fp8_saved_bytes
from workers.model.backbones import find_backbone
from workers.model.dit import CausalDiT
from workers.model.fp8_linears import Fp8Linears, LinearWeights
from workers.model.resting import rest_weights, wake_weights
from workers.model.static_layers import StaticLayers

BACKBONE = find_backbone("tiny-test")


@pytest.fixture
def with_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device multiplied codes, for whoever decides what rests; products stay those of a CPU."""
    monkeypatch.setattr("workers.model.static_layers.has_products", lambda device: True)


@pytest.fixture
def model() -> CausalDiT:
    torch.manual_seed(5)
    made = CausalDiT(BACKBONE)
    made.reset_parameters(zero_output=False)
    made.eval().requires_grad_(False).fuse_projections()
    return made


def flow(model: CausalDiT) -> Tensor:
    torch.manual_seed(6)
    latents = torch.randn(1, BACKBONE.chunk_latent_frames, BACKBONE.in_channels, 4, 8)
    prompt = model.project_prompt(torch.randn(1, 4, BACKBONE.text_dim))
    timestep = torch.full((1, BACKBONE.chunk_latent_frames), 300.0)
    return model(latents, timestep, prompt, lambda index, q, k, v: v + q)  # type: ignore[no-any-return]


def num_bytes(model: CausalDiT) -> int:
    """Of the weights that are not in host memory, one part of a fused weight being all of it."""
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fp8", ["ffn", "large", "all"])
@pytest.mark.usefixtures("with_products")
def test_coded_weights_rest_and_come_back_as_they_were(
    model: CausalDiT, fp8: Fp8Linears, mode: Callable[[], torch.no_grad]
) -> None:
    with mode():
        expected, full = flow(model), num_bytes(model)
        codes = StaticLayers(model, fp8)
        dim, ffn = BACKBONE.dim, BACKBONE.ffn_dim
        coded = {"ffn": 0, "large": 3, "all": 6}[fp8] * dim * dim + 2 * dim * ffn
        assert full - num_bytes(model) == BACKBONE.num_layers * coded * 4
        with pytest.raises(AssertionError, match="weights rest in host memory"):
            flow(model)
        wake_weights(model)
        assert num_bytes(model) == full
        assert torch.equal(flow(model), expected)
        for one, other in zip(StaticLayers(model, fp8).weights, codes.weights, strict=True):
            assert torch.equal(one.up.weight_OI, other.up.weight_OI)
            assert torch.equal(one.qkv.weight_OI, other.qkv.weight_OI)


@pytest.mark.usefixtures("with_products")
def test_no_weight_of_a_layer_is_left_to_compute_with(model: CausalDiT) -> None:
    StaticLayers(model, "all")
    layer, x = model.layers[0], torch.randn(1, 6, BACKBONE.dim)
    for compute in (layer.self_attn.project, layer.cross_attn.project_queries, layer.ffn, layer.self_attn.o):
        with pytest.raises(RuntimeError):
            compute(x)  # type: ignore[operator]


@pytest.mark.usefixtures("with_products")
def test_static_layers_made_next_have_the_weights_whatever_was_coded_before(model: CausalDiT) -> None:
    before = StaticLayers(model, "none").weights[0]
    StaticLayers(model, "all")
    after = StaticLayers(model, "none").weights[0]
    assert not model.resting
    for one, other in zip(before, after, strict=True):
        pairs = [(one, other)] if isinstance(one, Tensor) else zip(one[:2], other[:2], strict=True)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in pairs)  # type: ignore[arg-type]


def test_nothing_rests_where_a_device_has_no_such_products(model: CausalDiT) -> None:
    StaticLayers(model, "all")
    assert not model.resting


def test_host_memory_holds_a_part_of_a_fused_weight_alone(model: CausalDiT) -> None:
    attention = model.layers[0].self_attn
    fused = attention.fused[0]
    rest_weights(model, [attention.q, attention.k, attention.v])
    assert [weight.untyped_storage().nbytes() for _, weight in model.resting] == [fused.nbytes // 3] * 3


def test_a_copy_made_while_weights_rest_wakes_in_its_own_dtype_and_leaves_the_first_alone(model: CausalDiT) -> None:
    expected = model.layers[0].cross_attn.o.weight.clone()
    rest_weights(model, [model.layers[0].cross_attn.o])
    other = copy.deepcopy(model).double()
    wake_weights(other)
    assert torch.equal(other.layers[0].cross_attn.o.weight, expected.double())
    assert len(model.resting) == 1


@pytest.mark.parametrize("fp8", ["none", "ffn", "large", "all"])
@pytest.mark.usefixtures("with_products")
def test_the_bytes_said_to_be_saved_are_those_of_weights_less_codes_and_scales(
    model: CausalDiT, fp8: Fp8Linears
) -> None:
    layers = StaticLayers(model, fp8)
    linears = [part for layer in layers.weights for part in layer if isinstance(part, LinearWeights)]
    coded = [(linear.weight_OI, linear.scale_1O) for linear in linears if linear.scale_1O is not None]
    codes = sum(weight.numel() + scale.nbytes for weight, scale in coded)
    resting = sum(weight.numel() for _, weight in model.resting)
    assert coded_weights(BACKBONE, fp8) == (resting, sum(scale.numel() for _, scale in coded))
    assert fp8_saved_bytes(BACKBONE, fp8, 4) == resting * 4 - codes

"""A model whose linear layers round as those of a tile table with `backbone.fp8`, for loops that have other layers."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from workers.model.dit import CausalDiT, Layer
from workers.model.fp8_linears import Codes, Fp8Linears, LinearWeights, encode_rows, multiply, quantise


class RoundedLinear(nn.Module):
    """In place of a linear layer: inputs and weights are rounded to 8-bit floats."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = quantise(LinearWeights(linear.weight.detach(), linear.bias.detach()))

    def forward(self, x: Tensor) -> Tensor:
        code, scale = encode_rows(x)
        codes = Codes(code.flatten(0, -2), scale.flatten(0, -2))
        return multiply(self._linear, codes).value.view(*x.shape[:-1], -1)


def round_linears(dit: CausalDiT, fp8: Fp8Linears) -> CausalDiT:
    """A copy whose layers round; itself for "none"."""
    if fp8 == "none":
        return dit
    dit = copy.deepcopy(dit)
    for layer in dit.layers:
        assert isinstance(layer, Layer)
        for index in (0, 2):
            layer.ffn[index] = RoundedLinear(_linear(layer.ffn[index]))
        attention, cross = layer.self_attn, layer.cross_attn
        if fp8 in ("large", "all"):
            attention._fused = None  # three products that are rounded give what one does
            attention.q, attention.k, attention.v = (
                RoundedLinear(_linear(part)) for part in (attention.q, attention.k, attention.v)
            )  # type: ignore[assignment]
        if fp8 == "all":
            attention.o = RoundedLinear(_linear(attention.o))  # type: ignore[assignment]
            cross.q, cross.o = (RoundedLinear(_linear(part)) for part in (cross.q, cross.o))  # type: ignore[assignment]
    return dit


def _linear(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    return module

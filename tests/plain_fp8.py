"""A model whose linear layers round as those of a tile table with `backbone.fp8`, for loops that have other layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from workers.model.dit import CausalDiT, Layer
from workers.model.fp8_linears import Fp8Linears, encode_rows


@dataclass
class Call:
    """Of the model, the one under way."""

    rounds: bool = True
    """A clean pass does not."""


class RoundedLinear(nn.Module):
    """In place of a linear layer: inputs and weights are rounded to 8-bit floats, in some calls."""

    def __init__(self, linear: nn.Linear, call: Call) -> None:
        super().__init__()
        self._linear, self._call = linear, call
        self._code, self._scale = encode_rows(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if not self._call.rounds:
            exact: Tensor = self._linear(x)
            return exact
        code, scale = encode_rows(x)
        sums = F.linear(code.to(x.dtype), self._code.to(x.dtype))
        return (sums.float() * (scale * self._scale.t()) + self._linear.bias.float()).to(x.dtype)


def round_linears(dit: CausalDiT, fp8: Fp8Linears) -> CausalDiT:
    """A copy whose layers round in denoising steps, told by their timestep; itself for "none"."""
    if fp8 == "none":
        return dit
    dit, call = copy.deepcopy(dit), Call()
    dit.register_forward_pre_hook(lambda _, arguments: _note(call, *arguments))

    def rounded(module: nn.Module) -> Any:
        assert isinstance(module, nn.Linear)
        return RoundedLinear(module, call)

    for layer in dit.layers:
        assert isinstance(layer, Layer)
        for index in (0, 2):
            layer.ffn[index] = rounded(layer.ffn[index])
        attention, cross = layer.self_attn, layer.cross_attn
        if fp8 in ("large", "all"):
            attention._fused = None  # three products that are rounded give what one does
            attention.q, attention.k, attention.v = (rounded(part) for part in (attention.q, attention.k, attention.v))
        if fp8 == "all":
            attention.o, cross.q, cross.o = (rounded(part) for part in (attention.o, cross.q, cross.o))
    return dit


def _note(call: Call, latents_BTCHW: Tensor, timestep_BT: Tensor, *_: object) -> None:
    call.rounds = bool(timestep_BT.any())

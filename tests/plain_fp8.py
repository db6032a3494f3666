"""A model that rounds as one over a tile table with `backbone.fp8` and `attention.fp8`, for loops of other layers."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn

from workers.config_tiles import Fp8Attention
from workers.contracts import Kernel, KernelPart, KeyValues
from workers.kernels.fp8_plain import attend_rounded
from workers.kernels.lse import attend_parts
from workers.kernels.tiled import GroupMemory, attend_tiled
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
    dit = copy.deepcopy(dit)
    call = _calls_of(dit)

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


class RoundedAttention:
    """A `Kernel` that rounds in denoising steps, told by their timestep, or in all calls; else it is another one.

    Args:
        kernel: For calls that do not round.
        dit: Whose calls they are.
        which: Of them round.
    """

    def __init__(self, kernel: Kernel, dit: CausalDiT, which: Fp8Attention) -> None:
        self._kernel, self._call, self._which = kernel, _calls_of(dit), which
        self._memory = GroupMemory()

    @property
    def version(self) -> str:
        return f"{self._kernel.version}, rounded to 8-bit floats: {self._which}"

    def attend(self, q_BQND: Tensor, parts: tuple[KernelPart, ...]) -> tuple[Tensor, Tensor]:
        if self._which == "none" or (self._which == "steps" and not self._call.rounds):
            return self._kernel.attend(q_BQND, parts)
        return attend_parts(
            _attend_rounded, lambda q, part: attend_tiled(q, part, _attend_rounded, self._memory), q_BQND, parts
        )


def _attend_rounded(q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BQND, keys.k_BKND, keys.v_BKND))
    bias = None if keys.log_mass_BNK is None else keys.log_mass_BNK.float().flatten(0, 1) * math.log2(math.e)
    out, lse = attend_rounded(q, k, v, bias)
    batch_and_heads = q_BQND.shape[0], q_BQND.shape[2]
    out_BQND = out.unflatten(0, batch_and_heads).transpose(1, 2).to(q_BQND.dtype)
    return out_BQND, lse.unflatten(0, batch_and_heads).transpose(1, 2)


_CALLS: WeakKeyDictionary[CausalDiT, Call] = WeakKeyDictionary()


def _calls_of(dit: CausalDiT) -> Call:
    """Of a model, noted from now on."""
    if dit not in _CALLS:
        call = _CALLS[dit] = Call()
        dit.register_forward_pre_hook(lambda _, arguments: _note(call, *arguments))
    return _CALLS[dit]


def _note(call: Call, latents_BTCHW: Tensor, timestep_BT: Tensor, *_: object) -> None:
    call.rounds = bool(timestep_BT.any())

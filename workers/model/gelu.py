"""The feed-forward's activation, as fast as each device computes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_SCALE, _CUBE = math.sqrt(2 / math.pi), 0.044715
"""x / 2 (1 + tanh(scale (x + cube x^3)))."""


class TanhGelu(nn.GELU):
    """GELU by its tanh form."""

    def __init__(self) -> None:
        super().__init__("tanh")

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or x.dtype != torch.float32 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        # The same as x times a sigmoid, which takes half of the time: a CPU computes a tanh four times as long.
        inner = x.square().mul_(2 * _SCALE * _CUBE).add_(2 * _SCALE).mul_(x)
        return inner.sigmoid_().mul_(x)

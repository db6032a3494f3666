"""Keys as they were before RoPE, from keys that are stored after it: a rotation is undone by turning back.

A table of keys that kernels read as it lies holds them rotated; who compares keys with keys turns back those it looks
at. Everything here has fixed shapes and waits for nothing, so it can be compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.model.rope import split_head_dim


class TurnBack:
    """Undoes RoPE of one model.

    Args:
        head_dim: Channels of one head; further channels of a stored key are not looked at.
        theta: Base of the wavelengths.
        device: Where the keys are.
    """

    def __init__(self, head_dim: int, theta: float, device: torch.device) -> None:
        self.head_dim = head_dim
        axis, frequency = [], []
        for number, size in enumerate(split_head_dim(head_dim)):
            exponent = torch.arange(0, size, 2, dtype=torch.float64) / size
            frequency.append(theta**-exponent)
            axis.append(torch.full_like(exponent, number, dtype=torch.int64))
        self.axis_D = torch.cat(axis).to(device)
        """Of each pair of channels: 0 turns by time, 1 by row, 2 by column."""
        self.frequency_D = torch.cat(frequency).float().to(device)

    def __call__(self, k_NKW: Tensor, position_NK3: Tensor) -> Tensor:
        """Keys before RoPE, float32 [N, K, D]."""
        return turn_back(k_NKW[..., : self.head_dim], position_NK3, self.axis_D, self.frequency_D)

    def unit(self, k_NKW: Tensor, position_NK3: Tensor) -> Tensor:
        """The same at length 1, in the dtype of the keys: their products are cosines."""
        return unit_turned_back(k_NKW[..., : self.head_dim], position_NK3, self.axis_D, self.frequency_D)


def turn_back(k_NKD: Tensor, position_NK3: Tensor, axis_D: Tensor, frequency_D: Tensor) -> Tensor:
    angle = position_NK3[..., axis_D] * frequency_D
    cos, sin = angle.cos(), angle.sin()
    even, odd = k_NKD.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos + odd * sin, odd * cos - even * sin), -1).flatten(-2)


def unit_turned_back(k_NKD: Tensor, position_NK3: Tensor, axis_D: Tensor, frequency_D: Tensor) -> Tensor:
    k = turn_back(k_NKD, position_NK3, axis_D, frequency_D)
    length = k.square().sum(-1, keepdim=True).clamp(min=1e-24).sqrt()
    return (k / length).to(k_NKD.dtype)


def take_rows(x_NLW: Tensor, index_NR: Tensor, start: int = 0) -> Tensor:
    """Rows `start + index` of each head, [N, R, W]; whole rows are copied."""
    heads, length = x_NLW.shape[:2]
    base_N1 = torch.arange(heads, device=x_NLW.device)[:, None] * length + start
    flat = x_NLW.reshape(heads * length, -1).index_select(0, (index_NR + base_N1).flatten())
    return flat.view(*index_NR.shape, -1)

"""Keys as they were before RoPE, from keys that are stored after it: a rotation is undone by turning back.

A table of keys that kernels read as it lies holds them rotated; who compares keys with keys turns back those it looks
at. Everything here has fixed shapes and waits for nothing, so it can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable

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
        self.axis_int32_D = self.axis_D.int()
        self.frequency_D = torch.cat(frequency).float().to(device)
        numbers = zip(torch.cat(axis).tolist(), torch.cat(frequency).float().tolist(), strict=True)
        self.turns: tuple[tuple[int, float], ...] = tuple(numbers)
        """The same as numbers, for the text of a kernel."""
        self._unit: Callable[..., Tensor] = unit_turned_back
        self._products: Callable[..., tuple[Tensor, Tensor, Tensor]] = pair_products

    def __call__(self, k_NKW: Tensor, position_NK3: Tensor) -> Tensor:
        """Keys before RoPE, float32 [N, K, D]."""
        return turn_back(k_NKW[..., : self.head_dim], position_NK3, self.axis_D, self.frequency_D)

    def compile(self, backend: str | Callable[..., object]) -> None:
        """Fuse what follows."""
        self._unit = torch.compile(unit_turned_back, dynamic=False, backend=backend)
        self._products = torch.compile(pair_products, dynamic=False, backend=backend)

    def unit(self, k_NKW: Tensor, position_NK3: Tensor) -> Tensor:
        """The same at length 1, in the dtype of the keys: their products are cosines."""
        return self._unit(k_NKW[..., : self.head_dim], position_NK3, self.axis_D, self.frequency_D)

    def products(
        self, k_NCW: Tensor, position_NC3: Tensor, a_NR: Tensor | None, b_NR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of pairs of keys before RoPE, float32 [N, R]: their inner product, and the square of either length.

        Args:
            k_NCW, position_NC3: All keys.
            a_NR, b_NR: Which; None pairs every key with one.
        """
        return self._products(k_NCW, position_NC3, a_NR, b_NR, self.axis_D, self.frequency_D)


def pair_products(
    k_NCW: Tensor, position_NC3: Tensor, a_NR: Tensor | None, b_NR: Tensor, axis_D: Tensor, frequency_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Only the difference of two rotations counts, and a rotation changes no length."""
    head_N1 = torch.arange(k_NCW.shape[0], device=k_NCW.device)[:, None]
    dim = 2 * len(axis_D)
    k_a, at_a = (k_NCW, position_NC3) if a_NR is None else (k_NCW[head_N1, a_NR], position_NC3[head_N1, a_NR])
    k_b, at_b = k_NCW[head_N1, b_NR], position_NC3[head_N1, b_NR]
    angle = (at_a - at_b)[..., axis_D] * frequency_D
    (even_a, odd_a), (even_b, odd_b) = (x[..., :dim].float().unflatten(-1, (-1, 2)).unbind(-1) for x in (k_a, k_b))
    cos, sin = angle.cos(), angle.sin()
    inner = (even_a * even_b + odd_a * odd_b) * cos + (odd_a * even_b - even_a * odd_b) * sin
    return inner.sum(-1), (even_a.square() + odd_a.square()).sum(-1), (even_b.square() + odd_b.square()).sum(-1)


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

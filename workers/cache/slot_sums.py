"""Sums per slot that come out the same in every process: frames must not depend on which GPU made them.

A GPU adds floats that go to one place in whatever order its threads arrive, and their sum depends on it in the last
bits. Whole numbers do not mind: there values are added as multiples of one small step.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP_BITS = 40  # the largest value takes so many bits; 22 more are left for sums of up to four million values
CHANNELS_AT_ONCE = 16  # whole numbers of 64 bits take memory: a slice of the channels at a time


def sum_by_slot(values_BNC: Tensor, slot_BNC: Tensor, num_slots: int) -> Tensor:
    """Sum of all values that go to each of `num_slots` slots, [B, N, num_slots] or with channels behind, float32.

    Args:
        values_BNC: Float32 with or without channels as a last dimension.
        slot_BNC: Where each goes.
    """
    if values_BNC.device.type == "cuda":
        return sum_by_slot_in_steps(values_BNC, slot_BNC, num_slots)
    shape = (*slot_BNC.shape[:2], num_slots, *values_BNC.shape[3:])
    return values_BNC.new_zeros(shape).scatter_add_(2, _widened(slot_BNC, values_BNC), values_BNC)


def sum_by_slot_in_steps(values_BNC: Tensor, slot_BNC: Tensor, num_slots: int) -> Tensor:
    """`sum_by_slot` for devices that add in any order; off by at most 2^-40 of the largest value for each one added."""
    largest = values_BNC.abs().amax().double().clamp(min=1e-30)
    steps_per_unit = torch.exp2(STEP_BITS - largest.log2().ceil())
    has_channels = values_BNC.ndim == 4
    pieces = values_BNC.split(CHANNELS_AT_ONCE, dim=-1) if has_channels else (values_BNC,)
    sums = []
    for piece in pieces:
        steps = (piece.double() * steps_per_unit).round().long()
        total = steps.new_zeros((*slot_BNC.shape[:2], num_slots, *piece.shape[3:]))
        total.scatter_add_(2, _widened(slot_BNC, piece), steps)
        sums.append((total.double() / steps_per_unit).to(values_BNC.dtype))
    return torch.cat(sums, -1) if has_channels else sums[0]


def _widened(slot_BNC: Tensor, values: Tensor) -> Tensor:
    return slot_BNC if values.ndim == 3 else slot_BNC[..., None].expand(values.shape)

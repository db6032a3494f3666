"""What several rooms do to tensors: widen them, and take or replace whole rows of many heads at once."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Float32, or float64 where that is what is given."""
    return x if x.dtype == torch.float64 else x.float()


def as_words(x: Tensor) -> Tensor:
    """The same memory in elements of 16 bytes, where rows allow it: a GPU copies what lies apart element by element."""
    num = torch.complex128.itemsize // x.dtype.itemsize
    lengths = x.shape[-1], x.storage_offset(), *x.stride()[:-1]
    return x if any(length % num for length in lengths) else x.view(torch.complex128)


def take_slots(x_BNCW: Tensor, slot_BNR: Tensor) -> Tensor:
    """What lies in these slots, [B, N, R, W]: whole rows are several times faster than numbers one by one.

    Args:
        x_BNCW: Contiguous.
        slot_BNR: int64.
    """
    width = x_BNCW.shape[-1]
    if width == 0:
        return x_BNCW.new_zeros((*slot_BNR.shape, 0))
    return x_BNCW.view(-1, width).index_select(0, _lines(slot_BNR, x_BNCW)).view(*slot_BNR.shape, width)


def put_slots(x_BNCW: Tensor, slot_BNR: Tensor, new_BNRW: Tensor) -> None:
    """Replace these slots; where one is named twice, either row may win."""
    if x_BNCW.shape[-1]:
        x_BNCW.view(-1, x_BNCW.shape[-1]).index_copy_(0, _lines(slot_BNR, x_BNCW), new_BNRW.flatten(0, 2))


def _lines(slot_BNR: Tensor, x_BNCW: Tensor) -> Tensor:
    """Rows of all batches and heads under one another: which of them these slots are."""
    batch, heads, num_slots = x_BNCW.shape[:3]
    first = torch.arange(batch * heads, device=slot_BNR.device).view(batch, heads, 1) * num_slots
    return (slot_BNR + first).flatten()

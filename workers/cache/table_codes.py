"""Vectors of a tile table in few bits: codes, and beside them the largest channel of each group as bfloat16.

`low_bit.py` keeps a scale, which is the largest channel divided by the largest code; in bfloat16 that quotient is
rounded, and for a ninth of all scales of `int4` coding what was decoded finds another one. Here the largest channel
itself is kept: it is given back to the bit, so coding again changes nothing in any dtype, and what a full history
writes back after each merge does not drift. `int8` has one group a vector; `int4` one of 32 channels, or one a vector
where those do not divide it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from workers.cache.low_bit import pack_halves, unpack_halves

CodedStorage = Literal["int8", "int4"]
LIMITS: dict[CodedStorage, int] = {"int8": 127, "int4": 7}
"""Largest code; the smallest is its opposite."""
LEAST = 1e-30
"""What is smaller is zero: quotients stay finite."""
_CHANNELS = 32
"""Of a group of `int4`: half a bit a channel."""


def group_channels(dim: int, storage: CodedStorage) -> int:
    """Channels that share a largest one."""
    return _CHANNELS if storage == "int4" and dim % _CHANNELS == 0 else dim


def code_width(dim: int, storage: CodedStorage) -> int:
    """Bytes of the codes of a vector."""
    return dim // 2 if storage == "int4" else dim


def coded_bytes(dim: int, storage: CodedStorage) -> int:
    """Of a vector, its largest channels included."""
    return code_width(dim, storage) + 2 * (dim // group_channels(dim, storage))


def code_dtype(storage: CodedStorage) -> torch.dtype:
    return torch.uint8 if storage == "int4" else torch.int8


def encode(x_RD: Tensor, storage: CodedStorage) -> tuple[Tensor, Tensor]:
    """Codes [..., B] (`int4`: the first half of the channels in the low bits) and largest channels [..., G].

    Args:
        x_RD: Finite; bfloat16 or float32, any number of dimensions before the last, which is even.
        storage: Form.
    """
    limit = LIMITS[storage]
    x = x_RD.float().unflatten(-1, (-1, group_channels(x_RD.shape[-1], storage)))
    largest = x.abs().amax(-1).to(torch.bfloat16)
    largest = largest * (largest.float() >= LEAST)
    most = largest.float().clamp(min=LEAST)
    per_step = torch.full_like(most, limit) / most  # a number over a tensor would be a rounded reciprocal, times it
    code = (x * per_step[..., None] + 0.5).floor().clamp(-limit, limit).flatten(-2)
    if storage == "int8":
        return code.to(torch.int8), largest
    return pack_halves(code), largest


def decode_into(code_RB: Tensor, largest_RG: Tensor, out_RD: Tensor, storage: CodedStorage) -> Tensor:
    """Write the vectors; `out_RD` may be a view, and its dtype is what they are rounded to, once."""
    if storage == "int4":
        unpack_halves(code_RB, out_RD)
    else:
        out_RD.copy_(code_RB)
    step = largest_RG.float() * (1 / LIMITS[storage])
    out_RD.unflatten(-1, (-1, group_channels(out_RD.shape[-1], storage))).mul_(step[..., None])
    return out_RD


def round_trip(x_RD: Tensor, storage: CodedStorage) -> Tensor:
    """What is read back after these vectors are written."""
    return decode_into(*encode(x_RD, storage), torch.empty_like(x_RD), storage)

"""Tensor maps: what the GPU's copy engine (TMA) needs to know of frames to bring boxes of them or to take them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workers.nvrtc import check, load_driver

_KINDS = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTE_128 = 2


def describe_boxes(frames: Tensor, box: Sequence[int], swizzle: int = 0) -> ctypes.Array[Any]:
    """An argument of a kernel; what lies outside arrives as zeros and is never written.

    Args:
        frames: Of 16 bits and up to five dimensions, of which the last is contiguous.
        box: Its sizes, those of the last dimension first.
        swizzle: Bytes of its rows, 32, 64 or 128, where these lie swizzled in shared memory.
    """
    sizes, strides, rank = frames.shape[::-1], [2 * stride for stride in frames.stride()[::-1]], frames.ndim
    assert strides[0] == 2
    raw = ctypes.create_string_buffer(192)
    found = (ctypes.c_char * 128).from_buffer(raw, -ctypes.addressof(raw) % 64)
    check(
        load_driver().cuTensorMapEncodeTiled(
            ctypes.byref(found), _KINDS[frames.dtype], rank, ctypes.c_void_p(frames.data_ptr()),
            (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * (rank - 1))(*strides[1:]),
            (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
            0, _SWIZZLES[swizzle], _PROMOTE_128, 0,
        )
    )  # fmt: skip
    return found

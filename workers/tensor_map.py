"""Tensor maps: what the GPU's copy engine (TMA) needs to know of frames to bring a box of them into shared memory."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from workers.nvrtc import check, load_driver

_KINDS = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES = {32: 1, 64: 2, 128: 3}
_PROMOTE_128 = 2


def describe_frames(frames_THWC: Tensor, rows: int, columns: int, channels: int) -> ctypes.Array[Any]:
    """Boxes of one frame, as an argument of a kernel; what lies outside arrives as zeros.

    Args:
        frames_THWC: Contiguous, in 16 bits.
        channels: Of a box: 16, 32 or 64, which lie swizzled.
    """
    num, height, width, all_channels = frames_THWC.shape
    sizes = [all_channels, width, height, num]
    strides = [2 * all_channels, 2 * all_channels * width, 2 * all_channels * width * height]  # bytes
    raw = ctypes.create_string_buffer(192)
    found = (ctypes.c_char * 128).from_buffer(raw, -ctypes.addressof(raw) % 64)
    check(
        load_driver().cuTensorMapEncodeTiled(
            ctypes.byref(found), _KINDS[frames_THWC.dtype], 4, ctypes.c_void_p(frames_THWC.data_ptr()),
            (ctypes.c_uint64 * 4)(*sizes), (ctypes.c_uint64 * 3)(*strides),
            (ctypes.c_uint32 * 4)(channels, columns, rows, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1),
            0, _SWIZZLES[2 * channels], _PROMOTE_128, 0,
        )
    )  # fmt: skip
    return found

"""Launches fp8_codes.cu: tiles of `coded_tiles.py` from bfloat16, all in one launch, or values alone."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from workers.nvrtc import address_of, launch, load_functions, make_hopper_source


class _Source(ctypes.Structure):
    """Rows of heads, as the kernel takes them."""

    _fields_ = (
        ("at", ctypes.c_void_p),
        ("row_bytes", ctypes.c_longlong),
        ("head_bytes", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("tiles", ctypes.c_int),
    )


@functools.cache
def _load(scale_qk: float, scale_v: float, device: int) -> ctypes.c_void_p:
    names = {"SCALE_QK": f"({scale_qk!r}f)", "SCALE_V": f"({scale_v!r}f)"}
    return load_functions(make_hopper_source(names, "", Path(__file__).with_suffix(".cu")), ("code",), 0, device)[0]


def code_all(
    q_QNW: Tensor,
    k_NKW: Tensor,
    v_NKD: Tensor,
    to: tuple[Tensor, Tensor, Tensor, Tensor],
    scales: tuple[float, float],
) -> None:
    """Write the tiles of what is given.

    Args:
        q_QNW: Channels behind the 128th are not read.
        k_NKW: Log m in two channels behind the 128th if W > 128.
        v_NKD: As many.
        to: Tiles of queries, keys and values, and log m of keys.
        scales: Of queries and keys, and of values.
    """
    heads, num_keys, width = k_NKW.shape
    assert q_QNW.shape[1] == heads
    assert v_NKD.shape == (heads, num_keys, 128)
    device = q_QNW.get_device()
    assert device == torch.cuda.current_device()
    for tensor in to:
        assert tensor.is_contiguous()
    q, k, v = map(_describe, (q_QNW.transpose(0, 1), k_NKW, v_NKD))
    arguments = [q, k, v, *map(address_of, to), ctypes.c_int(heads), ctypes.c_int(width > 128)]
    launch(_load(*scales, device), heads * (q.tiles + k.tiles + v.tiles), 256, 0, arguments, device)


def code_values(v_NKD: Tensor, to_NTB: Tensor, scales: tuple[float, float]) -> None:
    """Write the tiles of values alone; `scales` as of `code_all`."""
    heads, device, v = v_NKD.shape[0], v_NKD.get_device(), _describe(v_NKD)
    assert v_NKD.shape[2] == 128
    assert to_NTB.shape[:2] == (heads, v.tiles)
    assert to_NTB.is_contiguous()
    assert device == torch.cuda.current_device()
    nothing, to = _Source(None, 0, 0, 0, 0), map(address_of, (None, None, to_NTB, None))
    arguments = [nothing, nothing, v, *to, ctypes.c_int(heads), ctypes.c_int(0)]
    launch(_load(*scales, device), heads * v.tiles, 256, 0, arguments, device)


def _describe(rows_NRW: Tensor) -> _Source:
    _, rows, width = rows_NRW.shape
    assert rows_NRW.dtype == torch.bfloat16
    assert width == 128 or width >= 130
    assert rows_NRW.stride(2) == 1
    assert rows_NRW.stride(0) % 8 == rows_NRW.stride(1) % 8 == rows_NRW.data_ptr() % 16 == 0
    return _Source(rows_NRW.data_ptr(), rows_NRW.stride(1) * 2, rows_NRW.stride(0) * 2, rows, -(-rows // 128))

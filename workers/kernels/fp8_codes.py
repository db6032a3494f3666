"""Launches fp8_codes.cu: tiles of `fp8_tiles.py` from bfloat16, queries, keys and values in one launch."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from workers.nvrtc import launch, load_functions


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
def _load(scale_qk: float, scale_v: float, no_key: float, device: int) -> ctypes.c_void_p:
    names = {"SCALE_QK": scale_qk, "SCALE_V": scale_v, "NO_KEY": no_key, "FACTOR": math.log2(math.e) / math.sqrt(128)}
    defines = "".join(f"#define {name} ({value!r}f)\n" for name, value in names.items())
    source = defines + Path(__file__).with_suffix(".cu").read_text()
    return load_functions(source, ("code",), 0, device)[0]


def code_all(
    q_QNW: Tensor | None,
    keys: tuple[Tensor, Tensor] | None,
    to: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    numbers: tuple[float, float, float],
) -> None:
    """Write the tiles of what is given.

    Args:
        q_QNW: Queries; channels behind the 128th are not read.
        keys: Keys [heads, num, W] and values [heads, num, 128]; log m in two channels behind the 128th if W > 128.
        to: Tiles of queries, keys and values, and the bias.
        numbers: Scales of queries and keys and of values, and what a key's channels with log m sum to at least.
    """
    q = _Source() if q_QNW is None else _describe(q_QNW.transpose(0, 1))
    k, v = (_Source(), _Source()) if keys is None else map(_describe, keys)
    given = q_QNW if keys is None else keys[1]
    assert given is not None
    device = given.get_device()
    assert device == torch.cuda.current_device()
    for tensor in to:
        assert tensor is None or tensor.is_contiguous()
    heads = given.shape[1] if keys is None else given.shape[0]
    addresses = [ctypes.c_void_p(0 if tensor is None else tensor.data_ptr()) for tensor in to]
    has_mass = keys is not None and keys[0].shape[2] > 128
    arguments = [q, k, v, *addresses, ctypes.c_int(heads), ctypes.c_int(has_mass)]
    launch(_load(*numbers, device), heads * (q.tiles + k.tiles + v.tiles), 256, 0, arguments, device)


def _describe(rows_NRW: Tensor) -> _Source:
    _, rows, width = rows_NRW.shape
    assert rows_NRW.dtype == torch.bfloat16
    assert width == 128 or width >= 130
    assert rows_NRW.stride(2) == 1
    assert rows_NRW.stride(0) % 8 == rows_NRW.stride(1) % 8 == rows_NRW.data_ptr() % 16 == 0
    return _Source(rows_NRW.data_ptr(), rows_NRW.stride(1) * 2, rows_NRW.stride(0) * 2, rows, -(-rows // 128))

"""Launches turn_chunk.cu: new keys turned back, means of their tiles, their codes and records, to the bit as by Triton.

Where `fits` says so: tiles of 128 keys of 128 channels, read as bfloat16 from codes of 4 bits in groups of 32, on a GPU
of compute capability 9. For anything else there is the kernel of triton_match.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from workers.cache import row_distances
from workers.cache.table_codes import LEAST, LIMITS
from workers.cache.triton_rows import Rows
from workers.cache.unrotated import TurnBack
from workers.nvrtc import launch, load_functions, make_coded_source

BLOCKS = 4
"""Of a multiprocessor, at least: fewer have more registers."""
_TILE, _THREADS, _PAIRS = 128, 128, 8
"""Of the last, a lane's of either half of the channels."""


class _Old(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("code", "largest", "position", "m", "weight", "mass"))


class _New(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "position")),
        *((name, ctypes.c_longlong) for name in ("stride_head", "stride_row", "stride_position")),
    )


def make_source() -> str:
    """CUDA of the kernel."""
    names = {
        "LIMIT": f"{LIMITS['int4']}.0f",
        "LEAST": f"{LEAST!r}f",
        "TURN_BLOCKS": BLOCKS,
    }
    return make_coded_source(names, Path(__file__).with_suffix(".cu"))


@functools.cache
def _load(device: int) -> ctypes.c_void_p:
    return load_functions(make_source(), ("turn_chunk",), 0, device)[0]


def fits(k: Rows, turn_back: TurnBack, tile: int, new_NTW: Tensor) -> bool:
    """Whether the kernel is for such a history, its GPU and new keys."""
    axes = [axis for axis, _ in turn_back.turns]
    few = all(len(set(axes[at : at + _PAIRS])) <= 2 for at in range(0, len(axes), _PAIRS))
    is_new_of_form = new_NTW.dtype == torch.bfloat16 and new_NTW.stride(1) % 8 == new_NTW.data_ptr() % 16 == 0
    return few and tile == _TILE and is_new_of_form and row_distances.fits(k, turn_back)


def turn_chunk(
    k: Rows, records: Sequence[Tensor], chunk: Sequence[Tensor], turn_back: TurnBack, new: slice, to: Sequence[Tensor]
) -> None:
    """A chunk becomes history, but for its values and partners.

    Args:
        k: Codes of keys; those of new ones are written.
        records: Positions [N, C, 3], m [N, C], weights [N, C] and log m [N, C, 2]; those of new keys are written.
        chunk: New keys with log m behind them [N, T, W] and their positions [N, T, 3].
        turn_back: RoPE of the model.
        new: Slots of the new keys.
        to: Keys at length 1 [N, R, D], of which the last are the new ones, and means [N, J, D] of the tiles in which
            they all are; written.
    """
    unit, mean = to
    k_NTW, position_NT3 = chunk
    heads, code_slots = records[1].shape
    device, before = unit.get_device(), new.stop - unit.shape[1]
    assert all(x.is_contiguous() for x in (k.x, k.largest, *records, unit))
    assert all(x.shape[1] == code_slots for x in (k.x, k.largest, *records))
    assert position_NT3.stride()[1:] == (3, 1)
    assert k_NTW.stride(2) == mean.stride(2) == 1
    assert mean.stride(1) == turn_back.head_dim
    first, stop = before // _TILE, -(-new.stop // _TILE)
    old = _Old(*(x.data_ptr() for x in (k.x, k.largest, *records)))
    strides = 2 * k_NTW.stride(0), 2 * k_NTW.stride(1), position_NT3.stride(0)
    fresh = _New(k_NTW.data_ptr(), position_NT3.data_ptr(), *strides)
    tensors = unit, mean, turn_back.axis_int32_D, turn_back.frequency_D
    sizes = stop - first, first, before, new.start, new.stop
    given = [
        old,
        fresh,
        *(ctypes.c_void_p(x.data_ptr()) for x in tensors),
        *map(ctypes.c_longlong, (code_slots, mean.stride(0))),
        *map(ctypes.c_int, sizes),
    ]
    launch(_load(device), heads * (stop - first), _THREADS, 0, given, device)

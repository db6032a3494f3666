"""Launches row_distances.cu: how far keys and values in codes of 4 bits are from others, to the bit as by Triton.

A merge takes this and average_rows.py where `fits` says so: for heads of 128 channels that are read as bfloat16 from
codes of 4 bits in groups of 32, on a GPU of compute capability 9. For any other storage, dtype, size or GPU there are
the kernels of triton_pairs.py, triton_merge.py and triton_collect.py.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from workers.cache.triton_rows import Rows
from workers.cache.unrotated import TurnBack
from workers.nvrtc import address_of, lacks_compiler, launch, load_functions, make_coded_source

_KEY_PROGRAMS = 512
"""Of a head at most, for lists whose length only the device knows."""
_THREADS, _KEY_THREADS = 256, 128


@functools.cache
def _load(turns: tuple[tuple[int, float], ...], device: int) -> list[ctypes.c_void_p]:
    """Kernels for the turns of a TurnBack."""
    names = {
        "AXIS": ", ".join(str(axis) for axis, _ in turns),
        "FREQUENCY": ", ".join(f"{frequency.hex()}f" for _, frequency in turns),
        "THREADS": _THREADS,
        "KEY_THREADS": _KEY_THREADS,
    }
    source = make_coded_source(names, Path(__file__).with_suffix(".cu"))
    return load_functions(source, ("value_distances", "key_distances"), 0, device)


@functools.cache
def can_run(device: torch.device) -> bool:
    """Whether kernels by CUDA are for this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and not lacks_compiler()


def fits(rows: Rows, turn_back: TurnBack) -> bool:
    """Whether the kernels are for such rows, which are read as bfloat16, and for this GPU."""
    form = rows.form["BITS"], rows.form["GROUP"], rows.form["KIND"].name
    return turn_back.head_dim == 128 and form == (4, 32, "bf16") and can_run(rows.x.device)


def compare_values(v: Rows, turn_back: TurnBack, m_NC: Tensor, partner_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances from the partners, and squared lengths; float32 [N, C], of slots without a key 0."""
    (heads, num), device = m_NC.shape, m_NC.get_device()
    of_values, lengths = (torch.empty(m_NC.shape, dtype=torch.float32, device=m_NC.device) for _ in range(2))
    tensors = v.x, v.largest, m_NC, partner_NC, of_values, lengths
    strides = v.x.shape[1], m_NC.stride(0), partner_NC.stride(0)
    arguments = [*map(address_of, tensors), *map(ctypes.c_longlong, strides), ctypes.c_int(num)]
    blocks = -(-num // _THREADS)
    launch(_load(turn_back.turns, device)[0], heads * blocks, _THREADS, 0, arguments, device)
    return of_values, lengths


def compare_keys(
    k: Rows, turn_back: TurnBack, position_NC3: Tensor, other_NC: Tensor, listed: tuple[Tensor, Tensor], to_NC: Tensor
) -> None:
    """Squared distances before RoPE of listed keys from others.

    Args:
        k: Of all slots.
        turn_back: RoPE of the model.
        position_NC3: Of the first slots.
        other_NC: From which, int32.
        listed: Slots [N, most], int32, and how many of them count, [N].
        to_NC: Written where a slot is listed, float32.
    """
    slots, count = listed
    (heads, most), device = slots.shape, slots.get_device()
    code_slots = k.x.shape[1]
    assert position_NC3.stride() == (code_slots * 3, 3, 1)
    tensors = k.x, k.largest, position_NC3, other_NC, slots, count, to_NC
    strides = code_slots, other_NC.stride(0), slots.stride(0), to_NC.stride(0)
    arguments = [*map(address_of, tensors), *map(ctypes.c_longlong, strides), ctypes.c_int(heads)]
    blocks = min(_KEY_PROGRAMS, -(-most // _KEY_THREADS))
    launch(_load(turn_back.turns, device)[1], heads * blocks, _KEY_THREADS, 0, arguments, device)

"""Launches row_distances.cu: how far keys and values in codes of 4 bits are from others, where `fits` says it can."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from workers.cache.table_codes import LIMITS
from workers.cache.triton_rows import Rows
from workers.cache.unrotated import TurnBack
from workers.nvrtc import lacks_compiler, launch, load_functions

BY_CUDA = True
"""Else by Triton, everywhere."""
LANES = 1
"""Threads of a value: more of them decode the same steps and add up between them."""
KEY_BLOCKS = 5
"""Of a multiprocessor, of keys: fewer have more registers."""
KEY_PROGRAMS = 512
"""Of a head at most, for lists whose length only the device knows."""
_THREADS, _KEY_THREADS = 256, 128


def make_source(turns: tuple[tuple[int, float], ...], names: Mapping[str, int]) -> str:
    """CUDA of the kernels.

    Args:
        turns: Of a TurnBack.
        names: What else is defined.
    """
    defined = {
        "LANES": LANES,
        "KEY_BLOCKS": KEY_BLOCKS,
        "STEP_OF_ONE": f"({1 / LIMITS['int4']!r}f)",
        "AXIS": ", ".join(str(axis) for axis, _ in turns),
        "FREQUENCY": ", ".join(f"{frequency.hex()}f" for _, frequency in turns),
    }
    defines = "".join(f"#define {name} {value}\n" for name, value in (defined | dict(names)).items())
    return defines + Path(__file__).with_suffix(".cu").read_text()


@functools.cache
def _load(lanes: int, key_blocks: int, turns: tuple[tuple[int, float], ...], device: int) -> list[ctypes.c_void_p]:
    source = make_source(turns, {"LANES": lanes, "KEY_BLOCKS": key_blocks})
    return load_functions(source, ("value_distances", "key_distances"), 0, device)


@functools.cache
def _can_run(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and not lacks_compiler()


def fits(rows: Rows, turn_back: TurnBack) -> bool:
    """Whether the kernels are for such rows, which are read as bfloat16, and for this GPU."""
    form = rows.form["BITS"], rows.form["GROUP"], rows.form["KIND"].name
    return BY_CUDA and turn_back.head_dim == 128 and form == (4, 32, "bf16") and _can_run(rows.x.device)


def compare_values(v: Rows, turn_back: TurnBack, m_NC: Tensor, partner_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances from the partners, and squared lengths; float32 [N, C], of slots without a key 0."""
    (heads, num), device = m_NC.shape, m_NC.get_device()
    of_values, lengths = (torch.empty(m_NC.shape, dtype=torch.float32, device=m_NC.device) for _ in range(2))
    addresses = (v.x, v.largest, m_NC, partner_NC, of_values, lengths)
    strides = v.x.shape[1], m_NC.stride(0), partner_NC.stride(0)
    arguments = [
        *(ctypes.c_void_p(x.data_ptr()) for x in addresses),
        *map(ctypes.c_longlong, strides),
        ctypes.c_int(num),
    ]
    blocks = -(-num * LANES // _THREADS)
    launch(_load(LANES, KEY_BLOCKS, turn_back.turns, device)[0], heads * blocks, _THREADS, 0, arguments, device)
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
    addresses = (k.x, k.largest, position_NC3, other_NC, slots, count, to_NC)
    strides = code_slots, other_NC.stride(0), slots.stride(0), to_NC.stride(0)
    arguments = [
        *(ctypes.c_void_p(x.data_ptr()) for x in addresses),
        *map(ctypes.c_longlong, strides),
        ctypes.c_int(heads),
    ]
    blocks = min(KEY_PROGRAMS, -(-most // _KEY_THREADS))
    launch(_load(LANES, KEY_BLOCKS, turn_back.turns, device)[1], heads * blocks, _KEY_THREADS, 0, arguments, device)

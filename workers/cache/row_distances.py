"""Launches row_distances.cu and key_distances.cu: how far keys and values in codes of 4 bits are from others.

To the bit as by Triton; of keys and values that are finite.

A merge takes this and average_rows.py where `fits` says so: for heads of 128 channels that are read as bfloat16 from
codes of 4 bits in groups of 32, on a GPU of compute capability 9. For any other storage, dtype, size or GPU there are
the kernels of triton_pairs.py, triton_merge.py and triton_collect.py.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from workers.cache.table_codes import LIMITS
from workers.cache.triton_rows import Rows
from workers.cache.unrotated import TurnBack
from workers.nvrtc import address_of, define, lacks_compiler, launch, load_functions

_KEY_PROGRAMS = 512
"""Of a head at most, for lists whose length only the device knows."""
_VALUES, _KEYS = 2, 2
"""Which kernels: 0 without tensor cores, 1 with them, 2 with rows of values read by 4 lanes each, or with sines and
cosines from a table."""
_THREADS, _KEY_THREADS = (256, 128, 128), 128
"""Of a block; of values by kernel."""
_BLOCKS = 5
"""Of values that a multiprocessor takes at once: fewer have more registers."""
_UNROLLED = 1
"""Halves of a row of values whose code stands there one after the other."""
_FARTHEST = 1023
"""Differences of positions that are in the table of sines and cosines, either way."""


class _Loaded(NamedTuple):
    values: ctypes.c_void_p
    keys: ctypes.c_void_p
    turns: Tensor | None
    """Sines and cosines of whole numbers, where kernels read them: of 32 pairs for each axis and difference."""


def _bits(x: float) -> int:
    """Of the nearest bfloat16, twice."""
    return int(torch.tensor(x).bfloat16().view(torch.int16)) % (1 << 16) * 0x10001


def make_source(names: Mapping[str, object], own: Path) -> str:
    """CUDA of kernels of rows in 4 bits, behind what such kernels share (codes_of_4.cuh).

    Args:
        names: What it leaves to be defined.
        own: Its file.
    """
    step = 1 / LIMITS["int4"]
    near = _bits(step)
    rest = _bits(step - struct.unpack("f", struct.pack("I", near & 0xFFFF0000))[0])
    defines = define({"STEP_OF_ONE": f"({step!r}f)", "NEAR_OF_ONE": f"{near}u", "REST_OF_ONE": f"{rest}u", **names})
    return defines + Path(__file__).with_name("codes_of_4.cuh").read_text() + own.read_text()


@functools.cache
def _load(turns: tuple[tuple[int, float], ...], values: int, keys: int, device: int) -> _Loaded:
    """Kernels for the turns of a TurnBack."""
    names = {
        "AXIS": ", ".join(str(axis) for axis, _ in turns),
        "FREQUENCY": ", ".join(f"{frequency.hex()}f" for _, frequency in turns),
        "THREADS": _THREADS[values],
        "KEY_THREADS": _KEY_THREADS,
        "BLOCKS": _BLOCKS,
        "UNROLLED": _UNROLLED,
        "FARTHEST": _FARTHEST,
        "VALUES_BY": values,
        "KEYS_BY": keys,
    }
    own = Path(__file__).with_suffix(".cu")
    source = make_source(names, own) + own.with_name("key_distances.cu").read_text()
    of = ["value_distances", "key_distances", *(["fill_turns"] if keys == 2 else [])]
    of_values, of_keys, *fill = load_functions(source, of, 0, device)
    if not fill:
        return _Loaded(of_values, of_keys, None)
    differences = 2 * _FARTHEST + 1
    table = torch.zeros((3, differences, 32, 2), dtype=torch.float32, device=torch.device("cuda", device))
    launch(fill[0], -(-3 * differences // 128), 128, 0, [address_of(table)], device)
    torch.cuda.current_stream(device).synchronize()  # other streams will read it
    return _Loaded(of_values, of_keys, table)


@functools.cache
def _can_run(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and not lacks_compiler()


def fits(rows: Rows, turn_back: TurnBack) -> bool:
    """Whether the kernels are for such rows, which are read as bfloat16, and for this GPU."""
    form = rows.form["BITS"], rows.form["GROUP"], rows.form["KIND"].name
    return turn_back.head_dim == 128 and form == (4, 32, "bf16") and _can_run(rows.x.device)


def compare_values(v: Rows, turn_back: TurnBack, m_NC: Tensor, partner_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances from the partners, and squared lengths; float32 [N, C], of slots without a key 0.

    The distance of a slot without a partner is anything.
    """
    (heads, num), device = m_NC.shape, m_NC.get_device()
    of_values, lengths = (torch.empty(m_NC.shape, dtype=torch.float32, device=m_NC.device) for _ in range(2))
    tensors = v.x, v.largest, m_NC, partner_NC, of_values, lengths
    strides = v.x.shape[1], m_NC.stride(0), partner_NC.stride(0)
    arguments = [*map(address_of, tensors), *map(ctypes.c_longlong, strides), ctypes.c_int(num)]
    blocks = -(-num // _THREADS[_VALUES])
    loaded = _load(turn_back.turns, _VALUES, _KEYS, device)
    launch(loaded.values, heads * blocks, _THREADS[_VALUES], 0, arguments, device)
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
    loaded = _load(turn_back.turns, _VALUES, _KEYS, device)
    numbers = *map(ctypes.c_longlong, strides), ctypes.c_int(heads)
    arguments = [*map(address_of, tensors), *numbers, address_of(loaded.turns)]
    blocks = min(_KEY_PROGRAMS, -(-most // _KEY_THREADS))
    launch(loaded.keys, heads * blocks, _KEY_THREADS, 0, arguments, device)

"""Launches unpack_coded.cu: tiles of a packed table as 8-bit floats, as attention with products of such reads them.

What `packed_history.PlainPacking` does, bit by bit. Tiles that nobody sees are skipped.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from workers.cache.packed_history import PackedLayer
from workers.cache.table_codes import LIMITS, CodedStorage, group_channels
from workers.cache.table_layout import EXTRA_CHANNELS, TableSettings
from workers.coded_tiles import CODED_TILE, SCALE_QK, SCALE_V, CodedTiles
from workers.nvrtc import address_of, launch, load_functions, make_hopper_source


class Programs(NamedTuple):
    """How the work is cut."""

    threads: int = 256
    tiles: int = 2
    """Of a program: most are seen by nobody, and a program that does nothing takes time too."""
    stages: int = 2
    """Tiles whose codes a program has in shared memory, at most `tiles`."""
    together: int = 4
    """Programs of a multiprocessor that registers are shared among."""


PROGRAMS = Programs()


class _Layer(ctypes.Structure):
    """As the kernel takes it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "k_steps", "v", "v_steps", "mass", "end_k", "end_v")),
        *((name, ctypes.c_int) for name in ("first_tile", "stop_tile", "end_tiles", "tiles")),
    )


class _Coded(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("k", "v", "mass"))


def make_source(storage: CodedStorage, how: Programs) -> str:
    """CUDA of the kernel."""
    step = torch.tensor(1 / LIMITS[storage]).item()  # in float32, as plain torch has it
    numbers = {
        "STEP_K": step * SCALE_QK,
        "STEP_V": step * SCALE_V,
        "SCALE_K": SCALE_QK,
        "SCALE_V": SCALE_V,
        "SCALE_MASS": SCALE_QK**2,
    }
    names: dict[str, object] = {
        "BITS": {"int8": 8, "int4": 4}[storage],
        "GROUPS": CODED_TILE // group_channels(CODED_TILE, storage),
        "EXTRA": EXTRA_CHANNELS,
        "THREADS": how.threads,
        "TILES": how.tiles,
        "STAGES": how.stages,
        "TOGETHER": how.together,
        "STAGE_BYTES": stage_bytes(storage),
    }
    names |= {name: f"({value!r}f)" for name, value in numbers.items()}
    return make_hopper_source(names, "", Path(__file__).with_suffix(".cu"))


def stage_bytes(storage: CodedStorage) -> int:
    """Of shared memory, as `Stage` has it."""
    code, steps = (128, 2) if storage == "int8" else (64, 8)
    return 2 * CODED_TILE * (code + steps) + 4 * CODED_TILE + 2 * 8 * 16


@functools.cache
def _load(storage: CodedStorage, how: Programs, device: int) -> ctypes.c_void_p:
    return load_functions(make_source(storage, how), ("unpack_coded",), how.stages * stage_bytes(storage), device)[0]


def unpack_coded(layer: PackedLayer, to: CodedTiles, s: TableSettings, is_seen_NJ: Tensor) -> None:
    """See `PlainPacking.unpack_coded`; tiles whose flag is 0 are left as they are."""
    assert s.storage != "model"
    assert s.head_dim == s.tile == CODED_TILE
    tensors = (layer.k_code_NCB, layer.k_largest_NCG, layer.v_code_NCB, layer.v_largest_NCG, layer.mass_NC2)
    given = *tensors, layer.k_NLW, layer.v_NLD
    assert layer.mass_NC2.dtype == layer.k_NLW.dtype == layer.v_NLD.dtype == torch.bfloat16
    assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (*given, *to))
    assert is_seen_NJ.dtype == torch.uint8
    assert is_seen_NJ.is_contiguous()
    device, how = layer.k_NLW.get_device(), PROGRAMS
    assert device == torch.cuda.current_device()
    tiles, first, stop = (slots // CODED_TILE for slots in (s.num_slots, s.history_start, s.recent_start))
    of = _Layer(*(x.data_ptr() for x in given), first, stop, tiles - (stop - first), tiles)
    units = s.num_heads * tiles
    arguments = [of, _Coded(*(x.data_ptr() for x in to)), address_of(is_seen_NJ), ctypes.c_int(units)]
    shared = how.stages * stage_bytes(s.storage)
    launch(_load(s.storage, how, device), -(-units // how.tiles), how.threads, shared, arguments, device)

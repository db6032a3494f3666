"""Launches near_keys.cu: new keys against older ones of their near tiles, to the bit as by Triton.

Where `fits` says so: tiles of 128 keys of 128 channels, read as bfloat16 from codes of 4 bits in groups of 32, on a GPU
of compute capability 9. For anything else there is the kernel of triton_near.py.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from workers.cache import row_distances
from workers.cache.table_codes import LIMITS
from workers.cache.triton_rows import Rows
from workers.cache.unrotated import TurnBack
from workers.nvrtc import address_of, launch, load_functions, make_hopper_source, make_product

_TILE, _THREADS = 128, 256
_SHARED_BYTES = _THREADS * 256 + 1024
"""Keys of a step, one of each thread."""


def make_source(turns: Sequence[tuple[int, float]]) -> str:
    """CUDA for the turns of a TurnBack."""
    names = {
        "STEP_OF_ONE": f"({1 / LIMITS['int4']!r}f)",
        "AXIS": ", ".join(str(axis) for axis, _ in turns),
        "FREQUENCY": ", ".join(f"{frequency.hex()}f" for _, frequency in turns),
    }
    codes = Path(__file__).with_name("codes_of_4.cuh").read_text()
    return make_hopper_source(names, codes + make_product("wgmma_all", 64, 32), Path(__file__).with_suffix(".cu"))


@functools.cache
def _load(turns: tuple[tuple[int, float], ...], device: int) -> ctypes.c_void_p:
    return load_functions(make_source(turns), ("near_keys",), _SHARED_BYTES, device)[0]


def fits(k: Rows, turn_back: TurnBack, tile: int) -> bool:
    """Whether the kernel is for such a history and its GPU."""
    return tile == _TILE and k.start == 0 and row_distances.fits(k, turn_back)


def compare_near(
    k: Rows, records: Sequence[Tensor], turn_back: TurnBack, chosen_NIn: Tensor, new: slice, found: Sequence[Tensor]
) -> None:
    """Write who the partners of new keys are.

    Args:
        k: Older keys.
        records: Positions [N, C, 3], m [N, C] and partners [N, C], which are written.
        turn_back: RoPE of the model.
        chosen_NIn: The near tiles of each tile of new keys, int32.
        new: Slots of the new keys.
        found: New keys at length 1 and the latent frame before them, if there is one; of that the nearest and how near;
            as `compare_frames` has them.
    """
    position, m, partner = records
    unit, nearest, best = found
    heads, num_own, num_chosen = chosen_NIn.shape
    device, code_slots = unit.get_device(), k.x.shape[1]
    assert position.stride() == (code_slots * 3, 3, 1)
    assert all(x.is_contiguous() for x in (chosen_NIn, *found))
    tensors = k.x, k.largest, position, m, unit, chosen_NIn, nearest, best, partner
    strides = code_slots, m.stride(0), partner.stride(0)
    sizes = num_own, new.start // _TILE, new.stop - unit.shape[1], new.start, new.stop, num_chosen
    given = [*map(address_of, tensors), *map(ctypes.c_longlong, strides), *map(ctypes.c_int, sizes)]
    launch(_load(turn_back.turns, device), heads * num_own, _THREADS, _SHARED_BYTES, given, device)

"""Launches frame_before.cu: new keys against those of the latent frame before, to the bit as by Triton.

Where `fits` says so: heads of 128 channels in bfloat16, on a GPU of compute capability 9. For anything else there is
the kernel of triton_match.py.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from workers.nvrtc import address_of, is_hopper, launch, load_functions, make_hopper_source, make_product, make_row_map

GROUPS, STAGES = 4, 12
"""Of four warps, with 64 new keys each; of 64 other keys in shared memory."""
_AT_ONCE, _DIM = 64, 128
_SHARED_BYTES = STAGES * _AT_ONCE * _DIM * 2 + 1024


def make_source(frame: int) -> str:
    """CUDA for latent frames of so many keys."""
    names = {"FRAME": frame, "GROUPS": GROUPS, "STAGES": STAGES}
    products = make_product("wgmma_all", 64, 32) + make_product("wgmma_rest", frame % 64 or 8, 32)
    return make_hopper_source(names, products, Path(__file__).with_suffix(".cu"))


@functools.cache
def _load(frame: int, device: int) -> ctypes.c_void_p:
    return load_functions(make_source(frame), ("frame_before",), _SHARED_BYTES, device)[0]


def fits(unit_NRD: Tensor, frame: int) -> bool:
    """Whether the kernel is for such keys and this GPU."""
    is_of_form = unit_NRD.dtype == torch.bfloat16 and unit_NRD.shape[2] == _DIM and frame % 8 == 0
    return is_of_form and is_hopper(unit_NRD.device)


def compare_frames(unit_NRD: Tensor, found_NT: Tensor, best_NT: Tensor, before: int, frame: int) -> None:
    """The nearest of the latent frame before.

    Args:
        unit_NRD: New keys at length 1, and ahead of them, if there is one, the latent frame before; no number where
            none is.
        found_NT: Written, int32: slots.
        best_NT: Written, float32: cosines; -inf where there is none.
        before: Slot of the first row.
        frame: Keys of a latent frame.
    """
    (heads, rows, _), new, device = unit_NRD.shape, found_NT.shape[1], unit_NRD.get_device()
    assert unit_NRD.is_contiguous()
    assert found_NT.is_contiguous()
    assert best_NT.is_contiguous()
    assert new % frame == 0
    assert heads * rows < 2**31
    tensors = map(address_of, (unit_NRD, found_NT, best_NT))
    sizes = map(ctypes.c_int, (heads, new // frame, rows, rows - new, before))
    given = [make_row_map(unit_NRD.view(-1, _DIM), _AT_ONCE, _DIM // 2), *tensors, *sizes]
    shares = heads * (new // frame) * -(-frame // (GROUPS * 64))
    programs = min(shares, torch.cuda.get_device_properties(device).multi_processor_count)
    launch(_load(frame, device), programs, (GROUPS * 4 + 1) * 32, _SHARED_BYTES, given, device)

"""A causal 3x3x3 convolution in CUDA for compute capability 9.0 and bfloat16: see halo_conv.cu.

Next to `tile_conv` it reads a tile's inputs once for nine places of the kernel instead of once for each, and takes
numbers of channels that are no power of two, such as 96, without filling them up. Compiled when first used, by the
compiler that comes with torch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers.nvrtc import address_of, launch, load_functions, make_halo_source
from workers.tensor_map import describe_boxes

_KC = 32
"""Input channels of a step: rows of 64 bytes in shared memory."""
_STAGED = 96
"""Channels of a block on their way out."""
_STAGES = 2
"""Places for these, of each of two groups of warps."""
_MOST_SHARED = 227 * 1024 - 4096
"""Bytes for slots, beside the bias and barriers."""


class Cut(NamedTuple):
    """How a product is cut."""

    channels: int
    rows: int = 16
    columns: int = 16
    slots_a: int = 3
    slots_b: int = 6

    @property
    def shared_bytes(self) -> int:
        slot_a = input_slot_bytes((self.rows + 2) * (self.columns + 2), _KC)
        stages = 2 * _STAGES * 64 * _STAGED * 2
        return self.slots_a * slot_a + self.slots_b * 3 * self.channels * _KC * 2 + stages + 1024


def input_slot_bytes(pixels: int, deep: int) -> int:
    """Of a slot for so many pixels of a tile with its border, as halo.cuh has it; deep: input channels of a step."""
    return -(-pixels * deep * 2 // 1024) * 1024


def takes(channels_in: int, channels_out: int) -> bool:
    """Whether these numbers of channels divide into its tiles."""
    return channels_in % _KC == 0 and channels_out % _STAGED == 0


def choose_cut(channels_out: int) -> Cut:
    """Measured on an H200: 780 to 840 TFLOP/s; 740 at 384 channels, where pictures are of 60x104 pixels and tiles so
    small that they come in nearly whole rounds."""
    if channels_out % 384 == 0:
        return Cut(96, columns=8, slots_a=4)
    return Cut(192, rows=8, slots_a=4, slots_b=3) if channels_out % 192 == 0 else Cut(96, slots_a=4, slots_b=4)


def pack_weight(weight_OITHW: Tensor, channels: int, deep: int = _KC) -> Tensor:
    """Weights as they lie in shared memory: [out / N, time, in / deep, row, column, N, deep], each row swizzled.

    Args:
        weight_OITHW: Of the convolution.
        channels: N, those of a tile.
        deep: Input channels of a step, 32 or 64.
    """
    out, channels_in, taps, *size = weight_OITHW.shape
    eighths = deep // 8
    parts = weight_OITHW.reshape(out // channels, channels, channels_in // deep, eighths, 8, taps, *size)
    parts = parts.permute(0, 5, 2, 6, 7, 1, 3, 4)  # tile, time, step, row, column, N, 16 bytes of a row, 8
    n, place = torch.arange(channels)[:, None], torch.arange(eighths)[None, :]
    # In rows of 64 bytes, bits 4 and 5 of an address are combined with bits 7 and 8; of 128, 4 to 6 with 7 to 9.
    lies = (place ^ (n >> 1 & 3 if deep == 32 else n & 7)).to(weight_OITHW.device)
    return parts.gather(-2, lies[:, :, None].expand(parts.shape)).flatten(-2).contiguous()


def make_source(channels_in: int, channels_out: int, cut: Cut, *, frames: int = 1) -> str:
    """CUDA of one convolution; for several frames at once its inputs are float16."""
    names = {
        "C_IN": channels_in,
        "C_OUT": channels_out,
        "KC": _KC,
        "N": cut.channels,
        "PARTS": channels_out // cut.channels,
        "SIDE": 3,
        "TH": cut.rows,
        "TW": cut.columns,
        "MB": cut.rows * cut.columns // 128,
        "NA": cut.slots_a,
        "NB": cut.slots_b,
        "KEPT": 0,
        "FRAMES": frames,
        "STAGED": _STAGED,
        "STAGES": _STAGES,
    }
    return make_halo_source(names, "bf16" if frames == 1 else "f16", Path(__file__).with_suffix(".cu"))


@functools.cache
def _load(channels_in: int, channels_out: int, cut: Cut, frames: int, device: int) -> ctypes.c_void_p:
    """The function, on its device."""
    assert cut.shared_bytes <= _MOST_SHARED
    source = make_source(channels_in, channels_out, cut, frames=frames)
    return load_functions(source, ("convolve",), cut.shared_bytes, device)[0]


def _describe_inputs(frames_THWC: Tensor, cut: Cut) -> ctypes.Array[Any]:
    """Boxes of a tile with its border."""
    return describe_boxes(frames_THWC, [_KC, cut.columns + 2, cut.rows + 2, 1], 2 * _KC)


def convolve(
    before_THWC: Tensor | None,
    new: Sequence[Tensor],
    packed: Tensor,
    bias_O: Tensor,
    beside_THWC: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """Result [T, H, W, O], added to `beside` in place if given; pictures are bordered by zeros.

    Args:
        before_THWC: The two frames before the first; None: zeros.
        new: Frames [T, H, W, C] in one or two pieces, so that the last may be kept as they are for the next call.
        packed: `pack_weight` for the channels of the cut.
        bias_O: Of the convolution.
        beside_THWC: In the shape of the result, which is added after rounding and returned as this.
        cut: How to do it if not as `choose_cut` says. All tensors are contiguous and bfloat16.
    """
    fresh, last = new[0], new[-1]
    height, width, channels = fresh.shape[1:]
    num, out_channels = sum(map(len, new)), len(bias_O)
    cut = cut or choose_cut(out_channels)
    out = fresh.new_empty((num, height, width, out_channels)) if beside_THWC is None else beside_THWC
    for given in (before_THWC, *new, packed, bias_O, beside_THWC):
        assert given is None or (given.is_contiguous() and given.dtype == torch.bfloat16)
    assert len(new) <= 2
    assert last.shape[1:] == fresh.shape[1:]
    assert packed.shape == (out_channels // cut.channels, 3, channels // _KC, 3, 3, cut.channels, _KC)
    assert out.shape == (num, height, width, out_channels)
    assert before_THWC is None or before_THWC.shape == (2, *fresh.shape[1:])
    launch_cut(cut, (before_THWC, fresh, last), packed, bias_O, out, adds=beside_THWC is not None, frames=1)
    return out


def launch_cut(
    cut: Cut,
    inputs: tuple[Tensor | None, Tensor, Tensor],
    packed: Tensor,
    bias_O: Tensor,
    out_THWC: Tensor,
    *,
    adds: bool,
    frames: int,
) -> None:
    """The kernel on what its callers have checked.

    Args:
        inputs: Frames before, new ones, last ones of these; none, and twice their sums, where several go at once.
        out_THWC: Written, or added to if `adds`.
        frames: That go at once.
    """
    before, fresh, last = inputs
    num, height, width, out_channels = out_THWC.shape
    device = fresh.get_device()
    function = _load(fresh.shape[3], out_channels, cut, frames, device)
    assert device == torch.cuda.current_device()
    num_groups = -(-num // frames)
    num_tiles = num_groups * -(-height // cut.rows) * -(-width // cut.columns) * (out_channels // cut.channels)
    described = _describe_inputs(fresh, cut)
    maps = [described if x is None or x is fresh else _describe_inputs(x, cut) for x in (before, fresh, last)]
    given: list[Any] = [
        *maps,
        describe_boxes(out_THWC, [_STAGED, 8, 8, 1]),
        *map(address_of, (packed, bias_O)),
    ]
    numbers = (adds, before is not None, len(fresh) if frames == 1 else num, num_groups, height, width, num_tiles)
    given += map(ctypes.c_int, numbers)
    programs = min(num_tiles, torch.cuda.get_device_properties(device).multi_processor_count)
    launch(function, programs, 384, cut.shared_bytes, given, device)

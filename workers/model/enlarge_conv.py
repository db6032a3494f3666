"""Twice the rows and columns of pictures, or twice the frames, by CUDA for compute capability 9.0: see enlarge_conv.cu.

The same results as `tile_conv` makes ("enlarged", "doubled"), in the manner of `halo_conv`.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from workers.model.halo_conv import input_slot_bytes, pack_weight
from workers.nvrtc import address_of, launch, load_functions, make_halo_source
from workers.tensor_map import describe_boxes

_MOST_SHARED = 227 * 1024
"""Bytes of a block."""


class Cut(NamedTuple):
    """How a product is cut."""

    channels: int
    """Of a tile."""
    rows: int = 16
    columns: int = 16
    deep: int = 32
    """Input channels of a step: 32, or 64 where they divide into so many."""
    slots_a: int = 3
    slots_b: int = 6
    kept: bool = False
    """All weights of a phase stay in shared memory; of an enlargement alone."""

    def shared_bytes(self, side: int) -> int:
        """With so many places each way."""
        slot_a = input_slot_bytes((self.rows + side - 1) * (self.columns + side - 1), self.deep)
        return self.slots_a * slot_a + self.slots_b * side * self.channels * self.deep * 2 + 1024


def takes(channels_in: int, channels_out: int) -> bool:
    """Whether these numbers of channels divide into its tiles; out: of one phase."""
    return channels_in % 64 == 0 and channels_out % 96 == 0


def choose_cut(channels_in: int, channels_out: int, *, doubled: bool = False) -> Cut:
    if doubled:
        return Cut(192, 8, 16, 64, 5, 5) if channels_out % 192 == 0 else Cut(96, 16, 16, 64, 4, 6)
    if channels_out % 192 == 0:
        return Cut(192, 8, 16, 32, 4, 7)
    # Weights of a phase fit beside inputs.
    return Cut(96, 16, 16, 32, 4, channels_in // 16, kept=True) if channels_in <= 192 else Cut(96, 24, 16, 32, 3, 8)


def pack_phases(weight_OITHW: Tensor, cut: Cut) -> Tensor:
    """As enlarge_conv.cu reads them.

    Args:
        weight_OITHW: Of all phases, those of the first phase first; [4 * out, in, 1, 2, 2] or [2 * out, in, 3, 1, 1].
    """
    return pack_weight(weight_OITHW, cut.channels, cut.deep)


def make_source(channels_in: int, channels_out: int, cut: Cut, *, doubled: bool = False) -> str:
    """CUDA of one kind; channels out are those of one phase."""
    names = {
        "C_IN": channels_in,
        "C_OUT": channels_out,
        "KC": cut.deep,
        "N": cut.channels,
        "PARTS": channels_out // cut.channels * (2 if doubled else 4),
        "SIDE": 1 if doubled else 2,
        "TH": cut.rows,
        "TW": cut.columns,
        "MB": cut.rows * cut.columns // 128,
        "NA": cut.slots_a,
        "NB": cut.slots_b,
        "KEPT": int(cut.kept),
        "ENLARGED": int(not doubled),
    }
    return make_halo_source(names, "bf16", Path(__file__).with_suffix(".cu"))


def enlarge_pictures(x_THWC: Tensor, packed: Tensor, bias_O: Tensor, cut: Cut | None = None) -> Tensor:
    """Pictures [T, 2 H, 2 W, O / 4], convolved by 3x3 and bordered by zeros at that size.

    Args:
        x_THWC: Pictures. All tensors are contiguous and bfloat16.
        packed: `pack_phases` of the four phases that `fold_enlargement` makes.
        bias_O: Of all phases.
        cut: How to do it if not as `choose_cut` says.
    """
    num, height, width, channels = x_THWC.shape
    out = x_THWC.new_empty((num, 2 * height, 2 * width, len(bias_O) // 4))
    cut = cut or choose_cut(channels, out.shape[3])
    assert packed.shape == (len(bias_O) // cut.channels, 1, channels // cut.deep, 2, 2, cut.channels, cut.deep)
    _launch(cut, None, x_THWC, packed, bias_O, out, doubled=False)
    return out


def double_frames(
    before_THWC: Tensor | None, x_THWC: Tensor, packed: Tensor, bias_O: Tensor, cut: Cut | None = None
) -> Tensor:
    """Frames [2 T, H, W, O / 2]: two for each, causally of three.

    Args:
        before_THWC: The two frames before the first; None: zeros.
        x_THWC: Frames. All tensors are contiguous and bfloat16.
        packed: `pack_phases`; those of the first frames first.
        bias_O: Likewise.
        cut: How to do it if not as `choose_cut` says.
    """
    num, height, width, channels = x_THWC.shape
    out = x_THWC.new_empty((2 * num, height, width, len(bias_O) // 2))
    cut = cut or choose_cut(channels, out.shape[3], doubled=True)
    assert before_THWC is None or before_THWC.shape == (2, height, width, channels)
    assert packed.shape == (len(bias_O) // cut.channels, 3, channels // cut.deep, 1, 1, cut.channels, cut.deep)
    _launch(cut, before_THWC, x_THWC, packed, bias_O, out, doubled=True)
    return out


@functools.cache
def _load(channels_in: int, channels_out: int, cut: Cut, doubled: bool, device: int) -> ctypes.c_void_p:
    """The function, on its device."""
    shared = cut.shared_bytes(1 if doubled else 2)
    beside = 4 * channels_out * (2 if doubled else 4) + 16 * (cut.slots_a + cut.slots_b) + 64  # bias and barriers
    assert shared + beside <= _MOST_SHARED
    return load_functions(make_source(channels_in, channels_out, cut, doubled=doubled), ("enlarge",), shared, device)[0]


def _launch(
    cut: Cut, before: Tensor | None, x_THWC: Tensor, packed: Tensor, bias_O: Tensor, out_THWC: Tensor, *, doubled: bool
) -> None:
    """The kernel on shapes that its callers have checked."""
    for given in (before, x_THWC, packed, bias_O):
        assert given is None or (given.is_contiguous() and given.dtype == torch.bfloat16)
    num, height, width, channels = x_THWC.shape
    device, side = x_THWC.get_device(), 1 if doubled else 2
    assert device == torch.cuda.current_device()
    function = _load(channels, out_THWC.shape[3], cut, doubled, device)
    parts = len(bias_O) // cut.channels
    num_tiles = num * -(-height // cut.rows) * -(-width // cut.columns) * parts
    box = (cut.deep, cut.columns + side - 1, cut.rows + side - 1, 1)
    described = describe_boxes(x_THWC, box, 2 * cut.deep)
    maps = [described if before is None else describe_boxes(before, box, 2 * cut.deep), described]
    given_numbers = (before is not None, num, height, width, num_tiles)
    arguments = [*maps, *map(address_of, (packed, bias_O, out_THWC)), *map(ctypes.c_int, given_numbers)]
    programs: int = torch.cuda.get_device_properties(device).multi_processor_count
    if cut.kept:
        programs -= programs % parts  # so that each meets one phase alone
    launch(function, min(num_tiles, programs), 384, cut.shared_bytes(side), arguments, device)

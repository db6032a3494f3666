"""Launches move_rows.cu: codes, records and means of tiles of a merged history, where `can_move` says it can."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from workers.cache.row_distances import fits
from workers.cache.table_layout import TableSettings
from workers.cache.triton_rows import StoredHistory
from workers.cache.unrotated import TurnBack
from workers.nvrtc import launch, load_functions, make_coded_source

_TILE = 128
"""As move_rows.cu has it."""


class _Move(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k_code", "v_code", "k_largest", "v_largest")),
        *((name, ctypes.c_void_p) for name in ("position", "m", "weight", "partner", "apart", "log_mass")),
        *((name, ctypes.c_void_p) for name in ("old_partner", "source", "added", "joined", "root", "head_of", "rank")),
        *((name, ctypes.c_void_p) for name in ("is_read", "mean", "axis", "frequency")),
        *((name, ctypes.c_int) for name in ("heads", "history_slots", "num_slots", "num_keep")),
        *((name, ctypes.c_float) for name in ("root_dim", "no_key")),
    )


@functools.cache
def _load(device: int) -> ctypes.c_void_p:
    return load_functions(make_coded_source({}, Path(__file__).with_suffix(".cu")), ("move_rows",), 0, device)[0]


def can_move(of: StoredHistory, turn_back: TurnBack, s: TableSettings) -> bool:
    """Whether the kernel is for such a history, and for this GPU."""
    axis = [axis for axis, _ in turn_back.turns]
    # A thread's pairs of the first half share an axis.
    return s.tile == _TILE and fits(of.k, turn_back) and axis[0:32:2] == axis[1:32:2]


def move_rows(
    codes: tuple[Tensor, ...], records: tuple[Tensor | None, ...], listed: tuple[Tensor, ...], mean: Tensor,
    turn_back: TurnBack, sizes: tuple[int, int, int, int], root_dim: float, no_key: float,
) -> None:  # fmt: skip
    """Everything to where it goes, in place.

    Args:
        codes: Of keys, their largest channels, the same of values: contiguous [N, history slots, ...].
        records: Positions, m, weights, partners, distances or None, log m: contiguous [N, history slots, ...].
        listed: Partners before, the source of each slot, what is added to weights and to m, root, head and rank.
        mean: Of tiles, bfloat16 [N, J, 128].
        turn_back: RoPE of the model.
        sizes: Heads, slots of the history, those that are used, those that are kept.
        root_dim, no_key: Of log m.
    """
    device = mean.get_device()
    assert mean.dtype == torch.bfloat16
    assert sizes[0] * sizes[1] * 4 < 2**31, "rows are counted in 32 bits"
    assert all(x.data_ptr() % 16 == 0 for x in codes)
    pieces = sizes[1] // _TILE
    # Whether each block has read, and how many have begun.
    is_read = torch.zeros(sizes[0] * pieces + 1, dtype=torch.int32, device=mean.device)
    turned = turn_back.axis_int32_D, turn_back.frequency_D
    tensors = codes[0], codes[2], codes[1], codes[3], *records, *listed, is_read, mean, *turned
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    given = _Move(*addresses, *sizes, root_dim, no_key)
    launch(_load(device), sizes[0] * pieces, _TILE, 0, [given], device)

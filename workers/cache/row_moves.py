"""Launches move_rows.cu, by which codes go to where they go within a layer and tiles have their means, and
average_rows.cu, by which values that others join become means."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from workers.cache.packed_history import PackedLayer
from workers.cache.row_distances import fits, make_source
from workers.cache.triton_pairs import Members
from workers.cache.triton_rows import Rows, StoredHistory
from workers.cache.unrotated import TurnBack
from workers.nvrtc import launch, load_functions

BY_CUDA = False
"""Else rows move with their records, by Triton."""
BLOCKS = 4
"""Of a multiprocessor."""
AVERAGED_BY_CUDA = True
_AVERAGE_THREADS = 128
_TILE = 128


class _Move(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k_code", "v_code", "k_largest", "v_largest", "position")),
        *((name, ctypes.c_void_p) for name in ("source", "rank", "is_read", "mean")),
        *((name, ctypes.c_int) for name in ("heads", "history_slots", "num_slots", "num_keep")),
    )


@functools.cache
def _load(blocks: int, turns: tuple[tuple[int, float], ...], device: int) -> ctypes.c_void_p:
    source = make_source(turns, {"MOVE_BLOCKS": blocks}) + Path(__file__).with_name("move_rows.cu").read_text()
    return load_functions(source, ("move_rows",), 0, device)[0]


def can_move(k: Rows, turn_back: TurnBack, tile: int) -> bool:
    """Whether the kernel is for such rows and tiles, and for this GPU."""
    return BY_CUDA and tile == _TILE and fits(k, turn_back)


def move_rows(to: PackedLayer, turn_back: TurnBack, source: Tensor, rank: Tensor) -> None:
    """Codes and largest channels, to where they go, and means; records are left as they are.

    Args:
        to: Its history is read and written, keys in tiles of 128 slots.
        turn_back: RoPE of the model.
        source: Old slot of each new one, -1 where no key goes, int32 [N, num_keep]: no key goes to a later slot.
        rank: Of each slot that is used, how many survive up to it, int32 [N, C].
    """
    heads, slots = to.m_NC.shape
    device, pieces = to.m_NC.get_device(), slots // _TILE
    assert to.mean_NJD.dtype == torch.bfloat16
    assert to.mean_NJD.shape[1] == pieces
    is_read = torch.zeros(heads * pieces + 1, dtype=torch.int32, device=to.m_NC.device)
    codes = to.k_code_NCB, to.v_code_NCB, to.k_largest_NCG, to.v_largest_NCG
    tensors = *codes, to.position_NC3, source, rank, is_read, to.mean_NJD
    assert all(x.is_contiguous() for x in tensors)
    given = _Move(*(x.data_ptr() for x in tensors), heads, slots, rank.shape[1], source.shape[1])
    launch(_load(BLOCKS, turn_back.turns, device), heads * pieces, _TILE, 0, [given], device)


class _Average(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code", "largest", "weight", "added", "tally", "number", "summed")),
        *((name, ctypes.c_void_p) for name in ("member", "share", "groups", "num_group")),
        *(
            (name, ctypes.c_int)
            for name in ("first_head", "heads", "history_slots", "num_slots", "num_sums", "num_most")
        ),
    )


@functools.cache
def _load_average(listed: int, turns: tuple[tuple[int, float], ...], device: int) -> ctypes.c_void_p:
    source = make_source(turns, {"LISTED": listed}) + Path(__file__).with_name("average_rows.cu").read_text()
    return load_functions(source, ("average_rows",), 0, device)[0]


def can_average(v: Rows, turn_back: TurnBack) -> bool:
    """Whether the kernel is for such rows, and for this GPU."""
    return AVERAGED_BY_CUDA and fits(v, turn_back)


def average_rows(
    of: StoredHistory, turn_back: TurnBack, members: Members, share: Tensor, added: Tensor, summed: Tensor, first: int
) -> None:
    """Values of groups that somebody joins, as codes, in place.

    Args:
        of: As it is stored.
        turn_back: RoPE of the model, which does not matter here.
        members: Who joins.
        share, added: Of `find_sums`.
        summed: Of those that are not listed, int32 [heads, groups, 128].
        first: Of those heads.
    """
    v, listed = of.v, members.listed.shape[2]
    of_groups = members.tally, members.number, summed, members.listed, share, members.group, members.num_group
    tensors = v.x, v.largest, of.weight_NC, added, *of_groups
    (heads, num_sums, dim), most, device = summed.shape, members.group.shape[1], v.x.get_device()
    assert dim == 2 * v.x.shape[2]
    sizes = first, heads, v.x.shape[1], added.shape[1], num_sums, most
    given = _Average(*(x.data_ptr() for x in tensors), *sizes)
    blocks = heads * -(-most * 2 // _AVERAGE_THREADS)
    launch(_load_average(listed, turn_back.turns, device), blocks, _AVERAGE_THREADS, 0, [given], device)

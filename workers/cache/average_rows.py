"""Launches add_values.cu and average_rows.cu: values that others join become means, where `fits` of row_distances.py
says they can."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from torch import Tensor

from workers.cache.row_distances import make_source
from workers.cache.triton_pairs import Members
from workers.cache.triton_rows import StoredHistory
from workers.nvrtc import launch, load_functions

_THREADS = 128
_ADDED_TOGETHER = True
"""Keys of a group that a warp reads are added up before their sum is added to memory."""
_CLEARED_BY = 64
"""Blocks of a head that make sums 0."""
_LANES = 8
"""That make a value: 1 is half of one without looking ahead, the others are 2, 4 or 8."""


class _Adding(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code", "largest", "weight", "share", "added", "head_of", "number")),
        *((name, ctypes.c_void_p) for name in ("rest", "num_rest", "num_large", "summed")),
        *(
            (name, ctypes.c_int)
            for name in ("first_head", "heads", "history_slots", "num_slots", "num_sums", "num_most")
        ),
    )


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
def _load(listed: int, lanes: int, device: int) -> ctypes.c_void_p:
    source = make_source({"LISTED": listed, "THREADS": _THREADS, "LANES": lanes}, Path(__file__).with_suffix(".cu"))
    return load_functions(source, ("average_rows",), 0, device)[0]


@functools.cache
def _load_adding(together: bool, device: int) -> list[ctypes.c_void_p]:
    names = {"THREADS": _THREADS, "TOGETHER": int(together)}
    source = make_source(names, Path(__file__).with_name("add_values.cu"))
    return load_functions(source, ("clear_sums", "add_values"), 0, device)


def add_values(
    of: StoredHistory, members: Members, sums: tuple[Tensor, Tensor, Tensor], to: Tensor, first: int
) -> None:
    """Add up the values that are not listed, by group.

    Args:
        of: As it is stored.
        members: Who joins.
        sums: Shares of keys and added weights of `find_sums`, and who stands for the group of each.
        to: Written where a group has a number: int32 [heads, groups, 128].
        first: Of those heads.
    """
    (share, added, head_of), v = sums, of.v
    of_groups = head_of, members.number, members.rest, members.num_rest, members.num_large, to
    tensors = v.x, v.largest, of.weight_NC, share, added, *of_groups
    (heads, num_sums, dim), most, device = to.shape, members.rest.shape[1], v.x.get_device()
    assert dim == 2 * v.x.shape[2]
    sizes = first, heads, v.x.shape[1], added.shape[1], num_sums, most
    given = _Adding(*(x.data_ptr() for x in tensors), *sizes)
    clear, add = _load_adding(_ADDED_TOGETHER, device)
    launch(clear, heads * _CLEARED_BY, _THREADS, 0, [given], device)
    launch(add, heads * -(-most // _THREADS), _THREADS, 0, [given], device)


def average_rows(of: StoredHistory, members: Members, share: Tensor, added: Tensor, summed: Tensor, first: int) -> None:
    """Values of groups that somebody joins, as codes, in place.

    Args:
        of: As it is stored.
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
    blocks = heads * -(-most * max(2, _LANES) // _THREADS)
    launch(_load(listed, _LANES, device), blocks, _THREADS, 0, [given], device)

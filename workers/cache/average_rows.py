"""Launches average_rows.cu: values that others join become means, where `fits` of row_distances.py says it can."""

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
def _load(listed: int, device: int) -> ctypes.c_void_p:
    source = make_source({"LISTED": listed, "THREADS": _THREADS}, Path(__file__).with_suffix(".cu"))
    return load_functions(source, ("average_rows",), 0, device)[0]


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
    blocks = heads * -(-most * 2 // _THREADS)
    launch(_load(listed, device), blocks, _THREADS, 0, [given], device)

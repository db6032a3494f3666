"""Launches average_rows.cu: values that others join become means, where `fits` of row_distances.py says it can."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from torch import Tensor

from workers.cache.triton_rows import StoredHistory
from workers.cache.triton_sums import Found
from workers.nvrtc import launch, load_functions, make_coded_source

_THREADS = 128
_LANES = 4
"""That make a value: 16 bytes of codes each. With 2 or 8 it is slower."""


class _Average(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code", "largest", "weight", "share", "added", "head_of", "tally")),
        *(
            (name, ctypes.c_void_p)
            for name in ("number", "member", "rest", "num_rest", "groups", "num_group", "summed")
        ),
        *(
            (name, ctypes.c_int)
            for name in ("first_head", "heads", "history_slots", "num_slots", "num_sums", "num_most")
        ),
    )


@functools.cache
def _load(listed: int, device: int) -> list[ctypes.c_void_p]:
    names = {"LISTED": listed, "THREADS": _THREADS, "LANES": _LANES}
    source = make_coded_source(names, Path(__file__).with_suffix(".cu"))
    return load_functions(source, ("add_values", "average_rows"), 0, device)


def average_rows(of: StoredHistory, found: Found, summed: Tensor, first: int) -> None:
    """Values of groups that somebody joins, as codes, in place.

    Args:
        of: As it is stored.
        found: By `find_sums`.
        summed: 0 of groups that have a number, int32 [heads, groups, 128]; values that are not listed are added.
        first: Of those heads.
    """
    v, (share, added, _, members), (heads, num_sums, dim) = of.v, found.sums, summed.shape
    assert dim == 2 * v.x.shape[2]
    of_slots = share, added, found.families.head_of, members.tally, members.number, members.listed
    of_groups = members.rest, members.num_rest, members.group, members.num_group, summed
    tensors = v.x, v.largest, of.weight_NC, *of_slots, *of_groups
    most, device = members.group.shape[1], v.x.get_device()
    sizes = first, heads, v.x.shape[1], added.shape[1], num_sums, most
    given = _Average(*(x.data_ptr() for x in tensors), *sizes)
    add, average = _load(members.listed.shape[2], device)
    launch(add, heads * -(-most // _THREADS), _THREADS, 0, [given], device)
    launch(average, heads * -(-most * _LANES // _THREADS), _THREADS, 0, [given], device)

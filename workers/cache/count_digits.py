"""Launches count_digits.cu: digits of long rows, counted in shared memory, for `find_last` of triton_ranks.py.

For GPUs of compute capability 9, as row_distances.py; elsewhere Triton counts digits of 8 bits.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from torch import Tensor

from workers.cache.table_pairs import EARLY, NO_LINK
from workers.nvrtc import define, launch, load_functions

DIGIT_BITS = (11, 11, 10)
_THREADS, _PER_THREAD = 512, 8


class _Count(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "jumps", "num_odd", "num_linked", "begin", "wanted", "counts")),
        *((name, ctypes.c_void_p) for name in ("near", "num_near")),
        *((name, ctypes.c_int) for name in ("k", "num", "rows")),
    )


@functools.cache
def _load(device: int) -> list[ctypes.c_void_p]:
    numbers = {"THREADS": _THREADS, "PER_THREAD": _PER_THREAD, "EARLY": f"({EARLY + 1} - 1)", "NO_LINK": NO_LINK}
    source = define(numbers) + Path(__file__).with_suffix(".cu").read_text()
    return load_functions(source, ("count_first", "count_second", "count_third"), 0, device)


def count_digits(x_NC: Tensor, k: int, links: tuple[Tensor, ...] | None, to: tuple[Tensor, ...]) -> None:
    """All digits, one after another.

    Args:
        x_NC: int32, contiguous; with links they become ranks.
        k: From 1.
        links: Jumps, and how many of a row are odd and linked; if there are.
        to: begin, wanted, counts, near and num_near, as of `Last`.
    """
    (rows, num), device = x_NC.shape, x_NC.get_device()
    of_links = (None, None, None) if links is None else links
    given = _Count(*(None if x is None else x.data_ptr() for x in (x_NC, *of_links, *to)), k, num, rows)
    blocks = rows * -(-num // (_THREADS * _PER_THREAD))
    for function in _load(device):
        launch(function, blocks, _THREADS, 0, [given], device)

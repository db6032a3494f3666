"""The nearest row of a set for each row of another, many sets at once, as tables of keys ask it on a GPU.

Rows have length 1, so products are cosines. The Triton way never stores a product; the plain way is the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NearestRows = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_SQD, y_SKD, there_SK) -> index of the nearest existing row, int64 [S, Q], and its cosine in float32, -inf where
none exists. Of several equally near ones the first."""


def nearest_rows(x_SQD: Tensor, y_SKD: Tensor, there_SK: Tensor) -> tuple[Tensor, Tensor]:
    """The reference."""
    cosine = (x_SQD @ y_SKD.mT).float().masked_fill(~there_SK[:, None], -torch.inf)
    best, index = cosine.max(-1)
    return index, best


def make_triton_nearest_rows() -> NearestRows:
    """The same by one kernel.

    Raises:
        ImportError: Triton is not installed.
    """
    from workers.search.triton_nearest import nearest_rows_triton

    return nearest_rows_triton

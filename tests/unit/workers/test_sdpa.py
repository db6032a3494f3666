"""A single row of a CPU is computed in two halves of its keys: the same attention, whatever stands in either half."""

from __future__ import annotations

import math

import pytest
import torch

from workers.contracts import KeyValues
from workers.kernels.reference import attend_reference
from workers.kernels.sdpa import attend_sdpa


@pytest.mark.parametrize("num_keys", [1024, 1500, 1501])
@pytest.mark.parametrize("missing", [None, slice(0, 0), slice(0, 750), slice(512, None), slice(3, 1490)])
def test_a_row_in_halves_equals_the_row(num_keys: int, missing: slice | None) -> None:
    g = torch.Generator().manual_seed(num_keys)
    q = 2 * torch.randn(1, 192, 1, 64, generator=g, dtype=torch.float64)
    k, v = torch.randn(2, 1, num_keys, 1, 64, generator=g, dtype=torch.float64).unbind(0)
    mass = None
    if missing is not None:
        mass = torch.rand(1, 1, num_keys, generator=g, dtype=torch.float64)
        mass[..., missing] = -math.inf
    keys = KeyValues(k, v, torch.zeros(num_keys, 3), mass)
    for found, want in zip(attend_sdpa(q, keys), attend_reference(q, keys), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)

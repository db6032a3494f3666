"""Sums in steps: as exact as floats allow, and blind to the order in which values are added."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workers.cache.slot_sums import sum_by_slot, sum_by_slot_in_steps


def drawn(seed: int, num_channels: int, size: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 2, 300, num_channels) if num_channels else (1, 2, 300)
    return torch.randn(shape, generator=generator) * size, torch.randint(7, (1, 2, 300), generator=generator)


@given(st.integers(0, 1000), st.sampled_from([0, 1, 16, 40]), st.sampled_from([1e-20, 1e-3, 1.0, 1e6]))
def test_the_order_does_not_matter_and_the_sum_is_that_of_wider_floats(seed: int, channels: int, size: float) -> None:
    values, slot = drawn(seed, channels, size)
    found = sum_by_slot_in_steps(values, slot, 8)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed + 1))
    assert torch.equal(sum_by_slot_in_steps(values[:, :, order], slot[:, :, order], 8), found)
    exact = sum_by_slot(values.double(), slot, 8)
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=2**-23, atol=300 * 2**-39 * float(values.abs().max()))
    assert (found[:, :, 7] == 0).all()


def test_nothing_to_add_is_zero_and_what_is_not_finite_stays_so() -> None:
    slot = torch.zeros(1, 1, 2, dtype=torch.long)
    assert sum_by_slot_in_steps(torch.zeros(1, 1, 2), slot, 1).item() == 0.0
    assert not sum_by_slot_in_steps(torch.tensor([[[1.0, float("nan")]]]), slot, 1).isfinite().any()

"""Sums per slot on a GPU: the same bits each time, which float additions in any order are not."""

from __future__ import annotations

import pytest
import torch

from workers.cache.slot_sums import sum_by_slot

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_gpu_gives_the_same_sums_each_time() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(1, 12, 20_000, 128, generator=generator)
    slot = torch.randint(500, (1, 12, 20_000), generator=generator)
    first = sum_by_slot(values.cuda(), slot.cuda(), 501)
    assert all(torch.equal(sum_by_slot(values.cuda(), slot.cuda(), 501), first) for _ in range(10))
    torch.testing.assert_close(first.cpu(), sum_by_slot(values, slot, 501), rtol=1e-5, atol=1e-4)

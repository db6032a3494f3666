"""Attention in 8-bit floats against the plain way with the same casts, and codes against plain codes."""

from __future__ import annotations

import pytest
import torch

from tests.bench.fp8_attention import (
    CASES,
    LARGEST_ERROR,
    LARGEST_LOSS,
    LARGEST_LSE,
    Case,
    check_attention,
    check_buffers,
    check_coding,
    draw,
    run,
)
from workers.kernels.select_fp8 import KERNEL_ON

HAS_KERNEL = torch.cuda.is_available() and torch.cuda.get_device_capability() == KERNEL_ON
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_KERNEL, reason="needs compute capability 9.0")]
DEVICE = torch.device("cuda")
on_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@on_cases
def test_codes_are_the_plain_ones(case: Case) -> None:
    check_coding(case, DEVICE)


@on_cases
def test_the_kernel_does_what_plain_torch_does(case: Case) -> None:
    numbers = check_attention(case, DEVICE)
    assert numbers["error"] <= LARGEST_ERROR
    assert numbers["lse"] <= LARGEST_LSE
    assert numbers["loss"] <= LARGEST_LOSS


@on_cases
def test_buffers_of_a_kept_history_get_the_same_bits(case: Case) -> None:
    check_buffers(case, DEVICE)


def test_a_graph_repeats_the_same_bits() -> None:
    given = draw(CASES[1], DEVICE)
    first = run(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(given)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))

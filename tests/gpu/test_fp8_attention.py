"""Attention in 8-bit floats against the plain way with the same casts, and codes against plain codes, which
`TRITON_INTERPRET=1` compares without a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from tests.bench.fp8_attention import (
    CASES,
    LARGEST_ERROR,
    LARGEST_LOSS,
    LARGEST_LSE,
    VARIANTS,
    Case,
    check_coding,
    compare,
    draw,
    run,
)
from workers.coded_tiles import SCALE_QK, SCALE_V, CodedTiles, code_queries_plain, code_tiles_plain, to_e4m3
from workers.kernels.fp8_tiles import code_queries, code_tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")]
on_hopper = pytest.mark.skipif(not HAS_GPU, reason="needs compute capability 9.0")
SOME = [case for case in CASES if case.queries <= 300]


@on_hopper
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_codes_are_the_plain_ones(case: Case) -> None:
    check_coding(case, torch.device("cuda"))


@pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs a CUDA device")
@pytest.mark.parametrize("mass", [False, True])
def test_codes_of_what_fits_are_the_plain_ones(mass: bool) -> None:
    """The interpreter rounds to 8 bits in a way of its own."""
    device = torch.device("cpu" if INTERPRETED else "cuda")
    q, k, v, _ = draw(Case("", 200, 333, None, 2, mass=mass, absent=0.1), device, torch.float32)
    q[..., :128], k[..., :128] = (to_e4m3(x[..., :128], SCALE_QK).float() / SCALE_QK for x in (q, k))
    v = to_e4m3(v, SCALE_V).float() / SCALE_V
    assert torch.equal(code_queries(q), code_queries_plain(q))
    for name, found, expected in zip(CodedTiles._fields, code_tiles(k, v), code_tiles_plain(k, v), strict=True):
        assert torch.allclose(found.float(), expected.float(), atol=1e-5, rtol=0), name


@on_hopper
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_kernel_does_what_plain_torch_does(name: str, case: Case) -> None:
    given = draw(case, torch.device("cuda"))
    numbers = compare(case, given, run(given, VARIANTS[name]))
    assert numbers["error"] <= LARGEST_ERROR
    assert numbers["lse"] <= LARGEST_LSE
    assert numbers["loss"] <= LARGEST_LOSS


@on_hopper
@pytest.mark.parametrize("split", [False, True])
def test_a_graph_repeats_the_same_bits(split: bool) -> None:
    given = draw(CASES[1], torch.device("cuda"))
    cut = VARIANTS["queries held"]._replace(split=split)
    first = run(given, cut)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(given, cut)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))

"""Sines and cosines of the table's kernels; `TRITON_INTERPRET=1` runs them on a CPU."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
sin_cos = pytest.importorskip("workers.cache.triton_rows").sin_cos
sin_cos_by_unit = pytest.importorskip("workers.cache.triton_rows").sin_cos_by_unit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _both(x, sin, cos, N: tl.constexpr, BY_UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    if BY_UNIT:
        a, b = sin_cos_by_unit(tl.load(x + at))
    else:
        a, b = sin_cos(tl.load(x + at))
    tl.store(sin + at, a)
    tl.store(cos + at, b)


@pytest.mark.parametrize(("by_unit", "most"), [(False, 3e-7)] if INTERPRETED else [(False, 3e-7), (True, 2e-6)])
def test_they_are_those_of_double_precision(by_unit: bool, most: float) -> None:
    x = torch.cat([torch.linspace(-9000, 9000, 2048), torch.linspace(-4, 4, 2047), torch.zeros(1)]).to(DEVICE)
    found = torch.empty(2, len(x), device=DEVICE)
    _both[(1,)](x, *found, N=len(x), BY_UNIT=by_unit)
    exact = torch.stack([x.double().sin(), x.double().cos()])
    assert float((found - exact).abs().max()) < most
    assert found[:, -1].tolist() == [0, 1]

"""Triton kernels around the products of the model, against their plain forms; `TRITON_INTERPRET=1` runs them on a CPU."""

import os

import pytest
import torch
import torch.nn.functional as F

from workers.model.rope import grid_positions, make_rotation, rotate_in_parts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float32)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("per_head", [False, True])
def test_rope_in_one_pass(dtype: torch.dtype, head_dim: int, per_head: bool) -> None:
    from workers.model.fused import rotate_into

    pytest.importorskip("triton")
    torch.manual_seed(0)
    batch, tokens, heads = (2, 45, 3)
    position = grid_positions(torch.arange(3, device=DEVICE), 3, 5)
    if per_head:
        position = torch.rand(batch, tokens, heads, 3, device=DEVICE) * 50
    rotation = make_rotation(position, head_dim, 10_000.0)
    x = torch.randn(batch, tokens, 2, heads, head_dim, device=DEVICE).to(dtype)[:, :, 1]  # strides of a fused product
    room = torch.zeros(batch, tokens + 15, heads, head_dim, device=DEVICE, dtype=dtype)
    rotate_into(room[:, 7 : 7 + tokens], x, *rotation)
    expected = rotate_in_parts(x, rotation)
    torch.testing.assert_close(room[:, 7 : 7 + tokens], expected, atol=0 if dtype != torch.float32 else 1e-6, rtol=8e-3)
    assert not room[:, :7].any()
    assert not room[:, 7 + tokens :].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("channels", [96, 384])
def test_norm_and_silu_in_one_pass(dtype: torch.dtype, silu: bool, channels: int) -> None:
    from workers.model.fused import normalise_into

    torch.manual_seed(1)
    x = torch.randn(3, 5, 7, channels, device=DEVICE).to(dtype)
    gamma = torch.rand(channels, device=DEVICE).to(dtype)
    out = torch.empty_like(x)
    normalise_into(out, x, gamma, silu=silu)
    expected = F.normalize(x.float(), dim=-1).to(dtype) * channels**0.5 * gamma
    expected = F.silu(expected) if silu else expected
    tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2  # two roundings of bfloat16
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)

"""Triton kernels of the model, against their plain forms; `TRITON_INTERPRET=1` runs them on a CPU."""

import os

import pytest
import torch
import torch.nn.functional as F

from workers.model.rope import grid_positions, make_rotation, rotate_in_parts
from workers.model.static_layers import Targets, norm_rotate_plain

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
    room = torch.zeros(3, 7, 9, channels, device=DEVICE, dtype=dtype)
    out = room[:, 1:-1, 1:-1]
    normalise_into(out, x, gamma, silu=silu)
    assert not room[:, 0].any()
    assert not room[:, :, -1].any()
    expected = F.normalize(x.float(), dim=-1).to(dtype) * channels**0.5 * gamma
    expected = F.silu(expected) if silu else expected
    tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2  # two roundings of bfloat16
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "out_channels"), [(32, 96), (96, 192), (192, 384)])
@pytest.mark.parametrize("has_beside", [False, True])
def test_a_causal_convolution_as_one_product(
    dtype: torch.dtype, channels: int, out_channels: int, has_beside: bool
) -> None:
    from workers.model.fused_conv import convolve, flatten_weight, takes

    torch.manual_seed(2)
    num, height, width = 2, 5, 13
    room = torch.randn(num + 2, height + 2, width + 2, channels, device=DEVICE).to(dtype)
    weight = torch.randn(out_channels, channels, 3, 3, 3, device=DEVICE).to(dtype) / (27 * channels) ** 0.5
    bias = torch.randn(out_channels, device=DEVICE).to(dtype)
    beside = torch.randn(num, height, width, out_channels, device=DEVICE).to(dtype) if has_beside else None
    assert takes(channels, out_channels)
    out = convolve(room, flatten_weight(weight), bias, beside)
    exact = F.conv3d(room.movedim(-1, 0)[None].double(), weight.double(), bias.double())[0].movedim(0, -1)
    exact = exact if beside is None else exact + beside.double()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 40), (12, 128), (1, 16)])
@pytest.mark.parametrize("cut", [(), (1, 2, True), (4, 4)])
def test_norm_and_rope_of_queries_and_keys_in_one_pass(
    dtype: torch.dtype, heads: int, head_dim: int, cut: tuple[int, ...]
) -> None:
    pytest.importorskip("triton")
    from workers.model.fused_rotate import Launch, norm_rotate

    torch.manual_seed(2)
    dim, tokens = heads * head_dim, 30
    rotation = make_rotation(grid_positions(torch.arange(2, device=DEVICE) + 40, 3, 5)[None], head_dim, 10_000.0)
    qkv = torch.randn(tokens, 3 * dim, device=DEVICE).to(dtype) * 3
    norms = (torch.rand(dim, device=DEVICE).to(dtype), torch.rand(dim, device=DEVICE).to(dtype))
    rooms = []
    for way in (norm_rotate, None):
        q = torch.zeros(tokens, heads, head_dim + 16, device=DEVICE, dtype=dtype)
        k, v = (torch.zeros(heads, tokens + 9, head_dim + extra, device=DEVICE, dtype=dtype) for extra in (16, 0))
        to = Targets(q[..., :head_dim], k[:, 4 : 4 + tokens, :head_dim], v[:, 4 : 4 + tokens])
        if way is None:
            norm_rotate_plain(qkv, *norms, rotation, 1e-6, to)
        else:
            way(qkv, norms, rotation, 1e-6, to, launch=Launch(*cut))
        rooms.append((q, k, v))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2  # a rounding of bfloat16 may fall otherwise
    for found, expected in zip(*rooms, strict=True):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)

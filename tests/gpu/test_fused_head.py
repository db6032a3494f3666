"""The decoder's last convolution and its attention in Triton, against plain ones.

`TRITON_INTERPRET=1` runs them on a CPU.
"""

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.wan_decode_weights import lay_out_places

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (IS_HOPPER or INTERPRETED), reason="needs a GPU of compute capability 9.0"),
]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def plain_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """In float64."""
    return F.silu(F.normalize(x.double(), dim=-1) * x.shape[-1] ** 0.5 * gamma.double())


def plain_head(normed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In float64, of two frames before and the others."""
    x = normed.double().movedim(-1, 0)[None]
    return F.conv3d(x, weight.double(), bias.double(), padding=(0, 1, 1))[0].movedim(0, -1)


@pytest.mark.parametrize("by_tanh", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num", "height", "width", "channels"), [(1, 5, 7, 96), (3, 9, 37, 96), (4, 11, 16, 48)])
@pytest.mark.parametrize("has_before", [False, True])
def test_three_channels_of_the_norm_of_frames(
    num: int, height: int, width: int, channels: int, has_before: bool, kind: torch.dtype, by_tanh: bool
) -> None:
    pytest.importorskip("triton")
    from workers.model.fused_head import convolve

    torch.manual_seed(0)
    weight, bias, gamma = draw(3, channels, 3, 3, 3) / (27 * channels) ** 0.5, draw(8), draw(channels)
    before = draw(2, height, width, channels) if has_before else None
    x = draw(num, height, width, channels) * 3
    places = lay_out_places(weight, gamma)
    given: dict[str, Any] = {"kind": kind, "by_tanh": by_tanh}
    out, last = convolve(before, x, *places, bias, **given)
    frames = torch.cat((x.new_zeros(2, *x.shape[1:]).double() if before is None else before, plain_norm(x, gamma)))
    tolerance = (1e-4 if kind == torch.float32 else 2e-3) if INTERPRETED else 2e-2
    exact = plain_head(frames, weight, bias[:3])
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(last.double(), frames[-2:].double(), atol=tolerance, rtol=tolerance)
    again, kept = convolve(before, x, *places, bias, **given)
    assert torch.equal(again, out)
    assert torch.equal(kept, last)


def test_pictures_do_not_depend_on_where_a_video_is_cut() -> None:
    pytest.importorskip("triton")
    from workers.model.fused_head import convolve

    torch.manual_seed(1)
    weight, bias, gamma = draw(3, 96, 3, 3, 3) / 50, draw(3), draw(96)
    x, places = draw(6, 6, 11, 96), lay_out_places(weight, gamma)
    exact = plain_head(F.pad(plain_norm(x, gamma), (0, 0, 0, 0, 0, 0, 2, 0)), weight, bias)
    found = []
    for sizes in ([6], [1, 5], [2, 1, 3], [1] * 6):
        before, pieces = None, []
        for piece in x.split(sizes):
            pictures, before = convolve(before, piece, *places, bias)
            pieces.append(pictures)
        found.append(torch.cat(pieces))
    torch.testing.assert_close(found[0].double(), exact, atol=2e-2, rtol=2e-2)
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_pixel_of_zeros_and_a_large_one_come_out() -> None:
    pytest.importorskip("triton")
    from workers.model.fused_head import convolve

    torch.manual_seed(2)
    x, weight, gamma = draw(1, 3, 3, 96), draw(3, 96, 3, 3, 3) / 50, draw(96) * 30
    x[0, 1, 1] = 0.0
    x[0, 0, 2] = 0.0
    x[0, 0, 2, :2] = torch.tensor([1e4, -1e4])
    _, last = convolve(None, x, *lay_out_places(weight, gamma), draw(3))
    # tanh is off by 2^-11 of what is nearly 200 here.
    torch.testing.assert_close(last[1].double(), plain_norm(x, gamma)[0], atol=0.2, rtol=1e-2)
    assert not last[0].any()


def test_weights_that_could_leave_float16_are_refused() -> None:
    pytest.importorskip("triton")
    from workers.model.fused_head import fits

    assert fits(*lay_out_places(draw(3, 96, 3, 3, 3), draw(96)))
    assert not fits(*lay_out_places(draw(3, 96, 3, 3, 3), draw(96) * 1000))


@pytest.mark.parametrize(("channels", "queries", "keys"), [(96, 16, 16), (48, 64, 32), (384, 128, 32)])
@pytest.mark.parametrize("shares", [1, 3, 50])
def test_attention_of_one_head(channels: int, queries: int, keys: int, shares: int) -> None:
    pytest.importorskip("triton")
    from workers.model.wide_attention import Cut, attend

    torch.manual_seed(3)
    qkv = draw(3, 77, 3 * channels)
    qkv[:, :, :channels] *= 3
    cut = Cut(queries, keys, shares, warps=8 if queries == 128 else 4)
    found = attend(qkv, cut)
    q, k, v = qkv.double()[:, None].chunk(3, -1)
    exact = F.scaled_dot_product_attention(q, k, v)[:, 0]
    tolerance = 1e-4 if INTERPRETED else 2e-2
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)
    assert torch.equal(found, torch.cat([attend(frame[None], cut) for frame in qkv]))

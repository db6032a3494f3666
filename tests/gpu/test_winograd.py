"""Convolutions of two frames by four products: float64 beside them, and norms as one by one.

`TRITON_INTERPRET=1` runs the norm on the CPU; CUDA has no interpreter.
"""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.wan_files import TINY
from workers.model.backbones import WanVaeSizes
from workers.model.wan_vae import WanVae, make_wan_vae

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"),
]
needs_hopper = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs compute capability 9.0",
)


def draw(*size: int) -> Tensor:
    return torch.randn(size, device=DEVICE).bfloat16()


@pytest.mark.parametrize("num", [1, 2, 3, 6])
@pytest.mark.parametrize("channels", [32, 96, 384])
@pytest.mark.parametrize("has_before", [False, True])
def test_norms_come_out_in_sums_and_differences(num: int, channels: int, has_before: bool) -> None:
    pytest.importorskip("triton")
    from workers.model.fused import normalise_into
    from workers.model.fused_pairs import norm_pairs
    from workers.model.pair_conv import transform_frames

    torch.manual_seed(0)
    before = draw(2, 3, 5, channels) if has_before else None
    x, gamma = draw(num, 3, 5, channels), draw(channels)
    found, last = norm_pairs(x, before, gamma)
    normed = torch.empty_like(x)
    normalise_into(normed, x, gamma, silu=True)
    torch.testing.assert_close(found, transform_frames(before, normed), atol=4e-3, rtol=4e-3)
    frames = torch.cat((torch.zeros_like(x[:1]).repeat(2, 1, 1, 1) if before is None else before, normed))
    torch.testing.assert_close(last, frames[-2:], atol=1.6e-2, rtol=1.6e-2)
    assert torch.equal(found, norm_pairs(x, before, gamma)[0])


@needs_hopper
@pytest.mark.parametrize(("channels", "out_channels"), [(96, 96), (192, 384), (384, 192)])
@pytest.mark.parametrize(("tile", "rows", "columns"), [(96, 16, 16), (96, 8, 32), (192, 8, 16)])
@pytest.mark.parametrize(("num", "has_before"), [(1, False), (4, True), (5, True)])
def test_a_convolution_of_pairs(
    channels: int, out_channels: int, tile: int, rows: int, columns: int, num: int, has_before: bool
) -> None:
    from workers.model.halo_conv import Cut
    from workers.model.pair_conv import convolve, convolve_plain, pack_pairs, transform_frames, transform_weight

    if out_channels % tile:
        pytest.skip("these channels do not divide into such tiles")
    torch.manual_seed(1)
    height, width = 21, 45
    weight, bias = draw(out_channels, channels, 3, 3, 3) / (27 * channels) ** 0.5, draw(out_channels)
    before = draw(2, height, width, channels) if has_before else None
    new = draw(num, height, width, channels)
    beside = draw(num, height, width, out_channels) if has_before else None
    inputs, cut = transform_frames(before, new), Cut(tile, rows, columns, 3, 4)
    out = convolve(inputs, num, pack_pairs(weight, cut), bias, beside, cut)
    plain = convolve_plain(inputs.double(), transform_weight(weight).double(), num).double() + bias.double()
    frames = torch.cat((new.new_zeros(2, *new.shape[1:]) if before is None else before, new)).double()
    room = F.pad(frames.movedim(-1, 0)[None], (1, 1, 1, 1))
    exact = F.conv3d(room, weight.double())[0].movedim(0, -1) + bias.double()
    for expected in (plain, exact):
        whole = expected if beside is None else expected + beside.double()
        torch.testing.assert_close(out.double(), whole, atol=2e-2, rtol=2e-2)
    assert torch.equal(out, convolve(inputs, num, pack_pairs(weight, cut), bias, beside, cut))


@needs_hopper
def test_pixels_do_not_depend_on_where_a_video_is_cut_and_are_those_of_the_library() -> None:
    pytest.importorskip("triton")
    torch.manual_seed(2)
    module = make_wan_vae(replace(TINY, wan_vae=WanVaeSizes(dim=96))).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, max(1, parameter[0].numel()) ** -0.5)
    latents = torch.randn(1, 7, 16, 2, 3)
    exact = WanVae(module, fast=False).stream().decode(latents)
    module.to("cuda", torch.bfloat16)
    plain, pairs = WanVae(module, fast=False), WanVae(module, fast=True, route="pairs")

    def decode(vae: WanVae, cuts: list[int]) -> Tensor:
        stream = vae.stream()
        return torch.cat([stream.decode(piece) for piece in latents.split(cuts, 1)], 1).float().cpu()

    library, found = decode(plain, [1, 3, 3]), decode(pairs, [1, 3, 3])
    assert torch.equal(found, decode(pairs, [2, 4, 1]))
    assert (found - exact).std() < 1.2 * (library - exact).std()

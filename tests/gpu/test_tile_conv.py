"""Convolutions by tiles that the copy engine brings, against plain ones; `TRITON_INTERPRET=1` runs them on a CPU."""

import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.wan_files import TINY
from workers.model.backbones import WanVaeSizes
from workers.model.wan_decode_weights import Route
from workers.model.wan_vae import WanVae, make_wan_vae

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
TOLERANCE = 1e-4 if INTERPRETED else 2e-2
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (IS_HOPPER or INTERPRETED), reason="needs a GPU of compute capability 9.0"),
]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(DTYPE)


def plain(frames_THWC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """In float64, pictures bordered by zeros; no frames are added."""
    padding = (0, *(size // 2 for size in weight.shape[3:]))
    x = frames_THWC.movedim(-1, 0)[None].double()
    return F.conv3d(x, weight.double(), bias.double(), padding=padding)[0].movedim(0, -1)


def copies(beside: Tensor | None) -> list[Tensor | None]:
    """Two, as results are added in place."""
    return [None if beside is None else beside.clone() for _ in range(2)]


CUTS = [
    (1, 8, 32, 128, 0, 32, True),
    (2, 4, 16, 64, 64, 32, True),
    (1, 8, 16, 64, 32, 32, False),
    (4, 2, 16, 128, 0, 32, False),
]
"""Frames, rows, columns, channels of a program in two parts, channels of a step, whether weights are on the left."""


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("channels", "out_channels"), [(32, 96), (96, 192)])
@pytest.mark.parametrize(("has_before", "has_beside"), [(False, False), (True, True)])
def test_a_causal_convolution(
    cut: tuple[int, int, int, int, int, int, bool], channels: int, out_channels: int, has_before: bool, has_beside: bool
) -> None:
    pytest.importorskip("triton")
    from workers.model.tile_conv import Tiles, convolve, line_up

    torch.manual_seed(0)
    num, height, width = 3, 9, 37
    frames, rows, columns, wide, narrow, block_k, turned = cut
    tiles = Tiles(frames, rows, columns, wide, narrow, block_k, turned=turned)
    weight, bias = draw(out_channels, channels, 3, 3, 3) / (27 * channels) ** 0.5, draw(out_channels)
    before = draw(2, height, width, channels) if has_before else None
    new = draw(num, height, width, channels)
    beside = draw(num, height, width, out_channels) if has_beside else None
    out = convolve(before, new, line_up(weight), bias, beside, tiles=tiles)
    exact = plain(
        torch.cat((new.new_zeros(2, height, width, channels) if before is None else before, new)), weight, bias
    )
    exact = exact if beside is None else exact + beside.double()
    torch.testing.assert_close(out.double(), exact, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("channels", "out_channels"), [(64, 96), (96, 64), (192, 192)])
def test_an_enlargement(channels: int, out_channels: int) -> None:
    pytest.importorskip("triton")
    from workers.model.tile_conv import convolve, line_up
    from workers.model.wan_decode_weights import fold_enlargement

    torch.manual_seed(1)
    weight, bias = draw(out_channels, channels, 3, 3) / (9 * channels) ** 0.5, draw(out_channels)
    x = draw(2, 9, 19, channels)
    folded = fold_enlargement(weight)
    out = convolve(None, x, line_up(folded[:, :, None]), bias.repeat(4), size=(1, 2, 2), result="enlarged")
    large = F.interpolate(x.movedim(-1, 1).double(), scale_factor=2.0, mode="nearest-exact")
    exact = F.conv2d(large, weight.double(), bias.double(), padding=1).movedim(1, -1)
    torch.testing.assert_close(out.double(), exact, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("has_before", [False, True])
def test_a_doubling_of_frames(has_before: bool) -> None:
    pytest.importorskip("triton")
    from workers.model.tile_conv import convolve, line_up

    torch.manual_seed(2)
    channels, num, height, width = 64, 3, 5, 7
    weight, bias = draw(2 * channels, channels, 3, 1, 1) / (3 * channels) ** 0.5, draw(2 * channels)
    before = draw(2, height, width, channels) if has_before else None
    new = draw(num, height, width, channels)
    out = convolve(before, new, line_up(weight), bias, size=(3, 1, 1), result="doubled")
    all_frames = torch.cat((new.new_zeros(2, height, width, channels) if before is None else before, new))
    pairs = plain(all_frames, weight, bias).unflatten(-1, (2, channels))
    exact = pairs.movedim(-2, 1).flatten(0, 1)
    torch.testing.assert_close(out.double(), exact, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_same_twice() -> None:
    pytest.importorskip("triton")
    from workers.model.tile_conv import convolve, line_up

    torch.manual_seed(3)
    before, new, weight, bias = draw(2, 20, 40, 96), draw(3, 20, 40, 96), draw(96, 96, 3, 3, 3), draw(96)
    once, again = (convolve(before, new, line_up(weight), bias) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("route", ["tma"] if INTERPRETED else ["tma", "halo", "pairs", "fours"])
def test_a_decoder_by_tiles_makes_the_pixels_of_the_plain_one(route: Route) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(4)
    backbone = replace(TINY, wan_vae=WanVaeSizes(dim=32 if INTERPRETED else 96))
    module = make_wan_vae(backbone).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        fan_in = max(1, parameter[0].numel())
        parameter.data.normal_(0.0, fan_in**-0.5, generator=generator)
    latents = torch.randn(1, 3, 16, 2, 3)
    exact = WanVae(module, fast=False).stream().decode(latents)
    module.to(DEVICE, DTYPE)
    plain_vae, by_tiles = WanVae(module, fast=False), WanVae(module, fast=True, route=route)
    found, library = (
        torch.cat([stream.decode(chunk) for chunk in latents.split([1, 2], 1)], 1).float().cpu()
        for stream in (by_tiles.stream(), plain_vae.stream())
    )
    assert found.shape == exact.shape
    assert exact.std() > 0.01
    if INTERPRETED:
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=0)
    else:
        assert (found - exact).std() < 1.2 * (library - exact).std()


@pytest.mark.skipif(INTERPRETED, reason="CUDA has no interpreter")
@pytest.mark.parametrize(("channels", "out_channels"), [(96, 96), (192, 384), (384, 192)])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (8, 16), (8, 32)])
@pytest.mark.parametrize("has_before", [False, True])
def test_a_causal_convolution_that_reads_inputs_once(
    channels: int, out_channels: int, rows: int, columns: int, has_before: bool
) -> None:
    from workers.model.halo_conv import choose_cut, convolve, pack_weight

    torch.manual_seed(5)
    num, height, width = 3, 21, 45
    weight, bias = draw(out_channels, channels, 3, 3, 3) / (27 * channels) ** 0.5, draw(out_channels)
    before = draw(2, height, width, channels) if has_before else None
    new = draw(num, height, width, channels)
    beside = draw(num, height, width, out_channels) if has_before else None
    # With more slots the larger tiles would not fit into shared memory.
    cut = choose_cut(out_channels)._replace(rows=rows, columns=columns, slots_a=2, slots_b=2)
    packed = pack_weight(weight, cut.channels)
    pieces = [new[:1], new[1:]] if has_before else [new]
    out, again = (convolve(before, pieces, packed, bias, room, cut) for room in copies(beside))
    exact = plain(torch.cat((new.new_zeros(2, *new.shape[1:]) if before is None else before, new)), weight, bias)
    exact = exact if beside is None else exact + beside.double()
    torch.testing.assert_close(out.double(), exact, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(out, again)
    if beside is not None:
        assert torch.equal(out, beside + convolve(before, pieces, packed, bias, None, cut))

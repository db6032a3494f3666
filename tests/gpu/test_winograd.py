"""Convolutions of several frames by fewer products: float64 beside them, and whole decoders."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.wan_files import TINY
from workers.model.backbones import WanVaeSizes
from workers.model.wan_decode_weights import Route
from workers.model.wan_vae import WanVae, make_wan_vae

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs compute capability 9.0",
    ),
]


def draw(*size: int) -> Tensor:
    return torch.randn(size, device="cuda").bfloat16()


@pytest.mark.parametrize(("channels", "out_channels"), [(96, 96), (192, 384), (384, 192)])
@pytest.mark.parametrize(
    ("at_once", "tile", "rows", "columns"),
    [(2, 96, 16, 16), (2, 96, 8, 32), (2, 192, 8, 16), (4, 96, 8, 16), (4, 96, 16, 8)],
)
@pytest.mark.parametrize(("num", "has_before"), [(1, False), (4, True), (5, True), (8, False)])
def test_a_convolution_of_several_frames(
    channels: int, out_channels: int, at_once: int, tile: int, rows: int, columns: int, num: int, has_before: bool
) -> None:
    from workers.model import winograd
    from workers.model.halo_conv import Cut

    if out_channels % tile:
        pytest.skip("these channels do not divide into such tiles")
    torch.manual_seed(1)
    height, width = 21, 45
    way = winograd.choose_way(at_once)
    assert way is not None
    weight, bias = draw(out_channels, channels, 3, 3, 3) / (27 * channels) ** 0.5, draw(out_channels)
    before = F.silu(draw(2, height, width, channels)) if has_before else None
    new = F.silu(draw(num, height, width, channels))
    beside = draw(num, height, width, out_channels) if has_before else None
    inputs, cut = winograd.transform_frames(before, new, way), Cut(tile, rows, columns, 3, 3)
    packed = winograd.pack_products(weight, cut, way)
    rooms = [None if beside is None else beside.clone() for _ in range(2)]
    out, again = (winograd.convolve(inputs, num, packed, bias, way, room, cut) for room in rooms)
    transformed = winograd.transform_weight(weight, way).double()
    plain = winograd.convolve_plain(inputs.double(), transformed, num, way).double() + bias.double()
    frames = torch.cat((new.new_zeros(2, *new.shape[1:]) if before is None else before, new)).double()
    room = F.pad(frames.movedim(-1, 0)[None], (1, 1, 1, 1))
    exact = F.conv3d(room, weight.double())[0].movedim(0, -1) + bias.double()
    for expected in (plain, exact):
        whole = expected if beside is None else expected + beside.double()
        torch.testing.assert_close(out.double(), whole, atol=2e-2, rtol=2e-2)
    assert torch.equal(out, again)
    if beside is not None:
        assert torch.equal(out, beside + winograd.convolve(inputs, num, packed, bias, way, None, cut))


@pytest.mark.parametrize("route", ["halo", "pairs", "fours"])
def test_pixels_do_not_depend_on_where_a_video_is_cut_and_are_those_of_the_library(route: Route) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(2)
    module = make_wan_vae(replace(TINY, wan_vae=WanVaeSizes(dim=96))).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, max(1, parameter[0].numel()) ** -0.5)
    latents = torch.randn(1, 7, 16, 2, 3)
    exact = WanVae(module, fast=False).stream().decode(latents)
    module.to("cuda", torch.bfloat16)
    plain, fast = WanVae(module, fast=False), WanVae(module, fast=True, route=route)

    def decode(vae: WanVae, cuts: list[int]) -> Tensor:
        stream = vae.stream()
        return torch.cat([stream.decode(piece) for piece in latents.split(cuts, 1)], 1).float().cpu()

    library, found = decode(plain, [1, 3, 3]), decode(fast, [1, 3, 3])
    assert torch.equal(found, decode(fast, [2, 4, 1]))
    assert (found - exact).std() < 1.2 * (library - exact).std()

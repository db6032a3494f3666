"""The fast decoder of Wan's VAE on a GPU: the library's pixels up to the rounding of bfloat16."""

import pytest
import torch

from tests.wan_files import TINY, make_vae_tensors
from workers.model.wan_decode_route import find_route
from workers.model.wan_decode_weights import Route
from workers.model.wan_vae import WanVae, make_wan_vae

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("route", [None, "triton", "cudnn"])
@pytest.mark.parametrize("size", [(4, 6), (8, 14)])
def test_pixels_are_those_of_the_library(size: tuple[int, int], route: Route | None) -> None:
    if route == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(1)
    latents = torch.randn(1, 9, 16, *size)
    module = make_wan_vae(TINY).eval().requires_grad_(False)
    module.load_state_dict(make_vae_tensors())
    exact = WanVae(module).stream().decode(latents)
    module.to("cuda", torch.bfloat16)
    plain, fast = WanVae(module, fast=False).stream(), WanVae(module, fast=True, route=route).stream()
    by_library, by_us = (
        torch.cat([stream.decode(chunk) for chunk in latents.split(3, 1)], 1).float().cpu() for stream in (plain, fast)
    )
    error = (by_library - exact).std()
    assert (by_us - exact).std() < 1.2 * error
    assert (by_us - by_library).std() < 1.5 * error


def test_what_is_chosen_here_is_the_fastest_of_this_gpu() -> None:
    pytest.importorskip("triton")
    compute = torch.cuda.get_device_capability()
    weight = torch.zeros(1, device="cuda", dtype=torch.bfloat16)
    expected = "fours" if compute[0] == 9 else "triton" if compute >= (8, 0) else "cudnn"
    assert find_route(weight).route == expected
    assert find_route(weight.float()).route == "cudnn"

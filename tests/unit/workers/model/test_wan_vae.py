"""Wan's VAE: chunks decode to the same pixels as all at once, in constant memory; latents are normalised."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.wan_files import TINY, make_vae_tensors
from workers.model.wan_decode_weights import fold_enlargement, lay_out_places
from workers.model.wan_vae import WanVae, make_wan_vae

SIZE = (4, 6)


@pytest.fixture(scope="module")
def vae() -> WanVae:
    module = make_wan_vae(TINY).eval().requires_grad_(False)
    module.load_state_dict(make_vae_tensors())
    return WanVae(module)


@pytest.fixture(scope="module")
def wide() -> WanVae:
    """In float64, so that differences are mistakes."""
    module = make_wan_vae(TINY).eval().requires_grad_(False)
    module.load_state_dict(make_vae_tensors())
    return WanVae(module.double())


@pytest.fixture(scope="module")
def latents() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 12, 16, *SIZE)


@pytest.fixture(scope="module")
def at_once(vae: WanVae, latents: Tensor) -> Tensor:
    """What the library decodes."""
    with torch.inference_mode():
        return vae.module.decode(vae.denormalise(latents)).sample.transpose(1, 2)  # type: ignore[operator,no-any-return]


@pytest.fixture(scope="module")
def exact(wide: WanVae, latents: Tensor) -> Tensor:
    """The same in float64."""
    return wide.stream().decode(latents)


@pytest.mark.parametrize("sizes", [(12,), (3, 3, 3, 3), (1,) * 12, (2, 5, 1, 4)])
def test_chunks_decode_to_the_same_pixels_as_the_library_decodes_all_at_once(
    vae: WanVae, latents: Tensor, at_once: Tensor, sizes: tuple[int, ...]
) -> None:
    stream = vae.stream()
    frames = torch.cat([stream.decode(chunk) for chunk in latents.split(list(sizes), 1)], 1)
    assert frames.shape == (1, 45, 3, 8 * SIZE[0], 8 * SIZE[1])  # 1, then 4 for each latent frame
    assert torch.equal(frames, at_once)
    assert frames.std() > 0.01
    assert frames.abs().max() <= 1


def test_streams_do_not_meet_in_the_network(vae: WanVae, latents: Tensor) -> None:
    one, two = vae.stream(), vae.stream()
    first, second = [], []
    for chunk in latents.split(3, 1):
        first.append(one.decode(chunk))
        second.append(two.decode(-chunk))
    assert torch.equal(torch.cat(first, 1), vae.stream().decode(latents))
    assert torch.equal(torch.cat(second, 1), vae.stream().decode(-latents))


def test_memory_does_not_grow_with_the_video(vae: WanVae, latents: Tensor) -> None:
    stream = vae.stream()
    held = []
    for chunk in latents.split(3, 1):
        stream.decode(chunk)
        held.append(stream.num_bytes)
    assert held[0] > 0
    assert held[1:] == held[1:2] * 3


@pytest.mark.parametrize("sizes", [(12,), (2, 5, 1, 4)])
def test_the_fast_decoder_makes_the_pixels_of_the_library(
    wide: WanVae, latents: Tensor, exact: Tensor, sizes: tuple[int, ...]
) -> None:
    stream = WanVae(wide.module, fast=True).stream()
    frames = torch.cat([stream.decode(chunk) for chunk in latents.split(list(sizes), 1)], 1)
    torch.testing.assert_close(frames, exact, atol=1e-6, rtol=0)


def test_the_fast_decoder_rounds_as_the_library_in_float32(
    vae: WanVae, latents: Tensor, at_once: Tensor, exact: Tensor
) -> None:
    frames = WanVae(vae.module, fast=True).stream().decode(latents)
    assert (frames - exact).abs().max() < 3 * (at_once - exact).abs().max()
    assert (frames - exact).std() < 1.5 * (at_once - exact).std()


def test_the_fast_decoder_rounds_as_the_library_in_bfloat16(latents: Tensor) -> None:
    module = make_wan_vae(TINY).eval().requires_grad_(False)
    module.load_state_dict(make_vae_tensors())
    few = latents[:, :4]  # a CPU is slow in bfloat16
    exact = WanVae(module).stream().decode(few)
    module.bfloat16()
    plain, fast = (WanVae(module, fast=fast).stream().decode(few).float() for fast in (False, True))
    assert (fast - exact).std() < 1.2 * (plain - exact).std()
    assert (fast - plain).std() < 1.5 * (plain - exact).std()


def test_streams_of_the_fast_decoder_do_not_meet_and_do_not_grow(vae: WanVae, latents: Tensor) -> None:
    fast = WanVae(vae.module, fast=True)
    one, two = fast.stream(), fast.stream()
    first, held = [], []
    for chunk in latents.split(3, 1):
        first.append(one.decode(chunk))
        two.decode(-chunk)
        held.append(one.num_bytes)
    assert torch.equal(torch.cat(first, 1), fast.stream().decode(latents))
    assert held[0] > 0
    assert held[1:] == held[1:2] * 3


def test_an_enlargement_is_folded_into_its_convolution() -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    folded = F.conv2d(x, fold_enlargement(weight), padding=1).unflatten(1, (2, 2, 5))
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"), weight, padding=1)
    for row in range(2):
        for column in range(2):
            phase = folded[:, row, column, :, row : row + 4, column : column + 6]
            torch.testing.assert_close(phase, expected[:, :, row::2, column::2])


def test_a_route_that_needs_another_gpu_is_refused(vae: WanVae) -> None:
    with pytest.raises(ValueError, match=r"needs compute capability 9\.0"):
        WanVae(vae.module, fast=True, route="halo")


def test_latents_are_normalised_both_ways(vae: WanVae) -> None:
    torch.manual_seed(2)
    frames = torch.rand(1, 9, 3, 32, 48) * 2 - 1
    latents = vae.encode(frames)
    assert latents.shape == (1, 3, 16, 4, 6)
    with torch.inference_mode():
        mean = vae.module.encode(frames.transpose(1, 2)).latent_dist.mean  # type: ignore[operator]
    torch.testing.assert_close(vae.denormalise(latents), mean, atol=1e-5, rtol=1e-5)
    # Section 3 of the description of Wan: channel 0 has mean -0.7571 and standard deviation 2.8184.
    torch.testing.assert_close(latents[0, :, 0] * 2.8184 - 0.7571, mean[0, 0], atol=1e-5, rtol=1e-5)


def test_frames_that_would_be_dropped_are_refused(vae: WanVae) -> None:
    with pytest.raises(ValueError, match="8 video frames: expected 1, 5, 9"):
        vae.encode(torch.zeros(1, 8, 3, 32, 32))


def test_a_product_with_all_places_adds_up_to_a_convolution() -> None:
    torch.manual_seed(3)
    weight, frames = torch.randn(3, 12, 3, 3, 3, dtype=torch.float64), torch.randn(3, 5, 7, 12, dtype=torch.float64)
    places = lay_out_places(weight, torch.full((12,), 2.0))
    product = sum(frame @ moment for frame, moment in zip(frames, places.weight_TCN, strict=True))
    assert isinstance(product, Tensor)
    assert not product[..., 27:].any()
    room = F.pad(product[..., :27], (0, 0, 1, 1, 1, 1)).unflatten(-1, (3, 3, 3))
    found = sum(room[row : row + 5, column : column + 7, row, column] for row in range(3) for column in range(3))
    expected = F.conv3d(frames.movedim(-1, 0)[None], weight, padding=(0, 1, 1))[0, :, 0].movedim(0, -1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(places.factor_C, torch.full((12,), 2 * 12**0.5))

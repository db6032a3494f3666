"""The video VAE: what is coded does not depend on what surrounds it, and a stream is the video."""

from __future__ import annotations

import pytest
import torch

from workers.model.vae import LATENT_CHANNELS, VideoVAE, to_pictures


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE().eval()


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.rand(2, 12, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_four_frames_of_8x8_pixels_are_one_cell(vae: VideoVAE, frames: torch.Tensor) -> None:
    latents = vae.encode(frames)
    assert latents.shape == (2, 3, LATENT_CHANNELS, 4, 6)
    assert vae.decode(latents).shape == frames.shape


@torch.no_grad()
def test_a_chunk_is_coded_the_same_alone_and_in_its_video(vae: VideoVAE, frames: torch.Tensor) -> None:
    torch.testing.assert_close(vae.encode(frames[:, 4:8])[:, 0], vae.encode(frames)[:, 1])


@torch.no_grad()
@pytest.mark.parametrize("piece", [1, 2])
def test_a_stream_decodes_what_decoding_at_once_does(vae: VideoVAE, frames: torch.Tensor, piece: int) -> None:
    latents = vae.encode(frames)
    stream = vae.stream()
    parts = [stream.decode(part) for part in latents.split(piece, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), vae.decode(latents))


@torch.no_grad()
def test_the_decoder_sees_the_latent_frame_before(vae: VideoVAE, frames: torch.Tensor) -> None:
    latents = vae.encode(frames)
    begins, goes_on = vae.decode(latents[:, 1:2]), vae.decode(latents[:, 1:2], latents[:, 0])
    assert not torch.allclose(begins, goes_on)


def test_pictures_are_whole_bytes_with_colours_last() -> None:
    pictures = to_pictures(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(5, 1, 1, 1).expand(5, 3, 2, 4))
    assert pictures.shape == (5, 2, 4, 3)
    assert pictures.dtype == torch.uint8
    assert pictures[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]

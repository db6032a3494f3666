"""The bundled video VAE: 4 video frames of 8x8 pixels become one cell of 16 numbers, with mean 0 and variance 1.

The encoder codes each group of 4 video frames on its own, so the latents of a chunk are the same whether it was cut
out or coded within its video. The decoder also sees the latent frame before, for smooth motion; that one latent frame
is all that a stream has to remember, whatever the length.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 16
TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8


class PictureStream(Protocol):
    """Decodes one video, from its start on, as its latents come."""

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """The next frames [B, F, 3, H, W], about [-1, 1]; all frames are those of decoding all latents at once."""
        ...


class PictureDecoder(Protocol):
    """What a rollout asks of a VAE."""

    @property
    def version(self) -> str:
        """Who decodes, where pixels depend on it, for the manifest; else empty."""
        ...

    def stream(self) -> PictureStream:
        """A decoder for one video."""
        ...


class _Residual(nn.Module):
    """Two 3x3 convolutions beside the identity; begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(cast(Tensor, self.outer.bias))

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.outer(F.silu(self.inner(F.silu(x)))))


class VideoVAE(nn.Module):
    """Video frames to normalised latents and back."""

    version = ""  # see `PictureDecoder`

    def __init__(self) -> None:
        super().__init__()
        width = 192
        self.frame_encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            _Residual(64),
            nn.Conv2d(64, 128, 3, 2, 1),
            _Residual(128),
        )
        self.group_encoder = nn.Sequential(
            nn.Conv2d(TEMPORAL_STRIDE * 128, width, 1),
            _Residual(width),
            nn.SiLU(),
            nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1),
        )
        # In training the batch's own mean and variance, afterwards the running ones: latents come normalised.
        self.normalise = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02)
        self.group_decoder = nn.Sequential(
            nn.Conv2d(2 * LATENT_CHANNELS, width, 3, padding=1),
            _Residual(width),
            nn.Conv2d(width, TEMPORAL_STRIDE * 96, 1),
        )
        self.frame_decoder = nn.Sequential(
            _Residual(96),
            nn.Conv2d(96, 320, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(80),
            nn.Conv2d(80, 192, 3, padding=1),
            nn.PixelShuffle(2),
            _Residual(48),
            nn.SiLU(),
            nn.Conv2d(48, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def encode(self, frames_BFCHW: Tensor) -> Tensor:
        """Latents [B, F / 4, 16, H / 8, W / 8] in float32 of RGB frames in [-1, 1]; F divides by 4, H and W by 8."""
        batch, num_frames = frames_BFCHW.shape[:2]
        flat = frames_BFCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        coded = self.frame_encoder(flat)
        groups = coded.reshape(batch * num_frames // TEMPORAL_STRIDE, -1, *coded.shape[-2:])
        latents = self.normalise(self.group_encoder(groups).float())
        return cast(Tensor, latents.unflatten(0, (batch, -1)))

    def decode(self, latents_BTCHW: Tensor, previous_BCHW: Tensor | None = None) -> Tensor:
        """RGB frames [B, 4 * T, 3, 8 * H, 8 * W], about [-1, 1].

        Args:
            latents_BTCHW: Normalised latents.
            previous_BCHW: The latent frame before the first one; without it the first one stands in for it, which is
                how every video begins.
        """
        first = latents_BTCHW[:, 0] if previous_BCHW is None else previous_BCHW
        before = torch.cat([first[:, None], latents_BTCHW[:, :-1]], 1)
        coded = self.group_decoder(torch.cat([latents_BTCHW, before], 2).flatten(0, 1))
        frames = coded.reshape(coded.shape[0] * TEMPORAL_STRIDE, -1, *coded.shape[-2:])
        return cast(Tensor, self.frame_decoder(frames).unflatten(0, (latents_BTCHW.shape[0], -1)))

    def stream(self) -> DecodeStream:
        """A decoder for latents that come chunk by chunk."""
        return DecodeStream(self)


class DecodeStream:
    """Decodes one video piece by piece; its frames equal those of decoding all latents at once."""

    def __init__(self, vae: VideoVAE) -> None:
        self._vae = vae
        self._previous_BCHW: Tensor | None = None

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """The next 4 * T frames, as `VideoVAE.decode` returns them."""
        frames = self._vae.decode(latents_BTCHW, self._previous_BCHW)
        self._previous_BCHW = latents_BTCHW[:, -1].clone()
        return frames


def to_pictures(frames_FCHW: Tensor) -> Tensor:
    """RGB in [-1, 1] as uint8 [F, H, W, 3], the form that is encoded and shown."""
    scaled = (frames_FCHW.float() + 1) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()

"""Wan's VAE through diffusers, which is loaded when it is needed: latents to pictures chunk by chunk, and back.

A causal convolution remembers the last two inputs of its own; with that memory, which does not grow, pictures that come
chunk by chunk are those of decoding all latents at once. Latents outside are normalised, as the transformer sees them.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from workers.model.backbones import Backbone
from workers.model.umt5 import import_library
from workers.model.wan_decode_route import find_route
from workers.model.wan_decode_weights import Route
from workers.model.wan_fast_decode import FastWanDecoder

logger = logging.getLogger(__name__)


def make_wan_vae(backbone: Backbone) -> nn.Module:
    """The network without weights of its own; build it on the meta device."""
    assert backbone.wan_vae is not None, f"{backbone.name} has another VAE"
    sizes = backbone.wan_vae
    library = import_library("diffusers.models.autoencoders.autoencoder_kl_wan")
    return cast(
        nn.Module,
        library.AutoencoderKLWan(
            base_dim=sizes.dim,
            z_dim=backbone.latent_channels,
            dim_mult=list(sizes.multipliers),
            num_res_blocks=sizes.num_units,
            temperal_downsample=[False, True, True],
        ),
    )


class WanVae:
    """Video frames to normalised latents and back.

    Args:
        module: `make_wan_vae` with weights, in evaluation mode.
        fast: Decode with `FastWanDecoder`: the same pixels up to rounding, made for a GPU. None: where there is one.
        route: Who convolves in the fast decoder; None: the fastest that can run here, said in one line.
    """

    def __init__(self, module: nn.Module, *, fast: bool | None = None, route: Route | None = None) -> None:
        self.module = module
        network = cast(Any, module)
        weight = network.post_quant_conv.weight
        self.device, self.dtype = weight.device, weight.dtype
        shape = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(network.config.latents_mean, device=self.device).view(shape)
        self._std = torch.tensor(network.config.latents_std, device=self.device).view(shape)
        is_fast = self.device.type == "cuda" if fast is None else fast
        if is_fast and route is None:
            route, line = find_route(weight)
            logger.info(line)
        self._fast = FastWanDecoder(module, route=route) if is_fast and route is not None else None

    @property
    def version(self) -> str:
        """See `PictureDecoder`."""
        return "" if self._fast is None else f"VAE by {self._fast.route}"

    def stream(self) -> WanDecodeStream | FastDecodeStream:
        """A decoder for latents that come chunk by chunk, from the start of a video."""
        return WanDecodeStream(self) if self._fast is None else FastDecodeStream(self, self._fast)

    @torch.inference_mode()
    def encode(self, frames_BFCHW: Tensor) -> Tensor:
        """Latents [B, T, C, H / 8, W / 8] in float32 of RGB frames in [-1, 1].

        Frames count in groups of 1, 4, 4, ...; those of an unfinished group would be dropped by the network, so F must
        be 1 more than a multiple of 4.
        """
        if frames_BFCHW.shape[1] % 4 != 1:
            raise ValueError(f"{frames_BFCHW.shape[1]} video frames: expected 1, 5, 9, ...; the rest would be dropped")
        pixels = frames_BFCHW.transpose(1, 2).to(self.device, self.dtype)
        mean_BCTHW = cast(Any, self.module).encode(pixels).latent_dist.mode().float()
        return cast(Tensor, ((mean_BCTHW - self._mean) / self._std).transpose(1, 2))

    def denormalise(self, latents_BTCHW: Tensor) -> Tensor:
        """What the network decodes, [B, C, T, H, W]."""
        latents = latents_BTCHW.transpose(1, 2).to(self.device, torch.float32)
        return (latents * self._std + self._mean).to(self.dtype)


class WanDecodeStream:
    """Decodes one video piece by piece, by the library; its frames equal those of decoding all latents at once."""

    def __init__(self, vae: WanVae) -> None:
        self._vae = vae
        self._network = cast(Any, vae.module)
        self._is_first = True
        # One slot for each convolution: its own two last inputs. Ours, so that streams do not meet in the network.
        num_slots = self._network._cached_conv_counts["decoder"]
        self._memory: list[Any] = [None] * num_slots

    @torch.inference_mode()
    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """The next frames [B, F, 3, 8 * H, 8 * W] in [-1, 1]: 4 for each latent frame, 1 for the very first."""
        z_BCTHW = self._network.post_quant_conv(self._vae.denormalise(latents_BTCHW))
        pieces = []
        for index in range(z_BCTHW.shape[2]):
            pieces.append(
                self._network.decoder(
                    z_BCTHW[:, :, index : index + 1],
                    feat_cache=self._memory,
                    feat_idx=[0],
                    first_chunk=self._is_first,
                )
            )
            self._is_first = False
        return torch.cat(pieces, 2).clamp(-1, 1).transpose(1, 2)

    @property
    def num_bytes(self) -> int:
        """What it remembers."""
        return sum(slot.nbytes for slot in self._memory if isinstance(slot, Tensor))


class FastDecodeStream:
    """The same through `FastWanDecoder`."""

    def __init__(self, vae: WanVae, decoder: FastWanDecoder) -> None:
        self._vae, self._decoding = vae, decoder.stream()

    @torch.inference_mode()
    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """See `WanDecodeStream.decode`; a batch of one."""
        (z_CTHW,) = self._vae.denormalise(latents_BTCHW)
        return self._decoding.decode(z_CTHW)[None].clamp(-1, 1)

    @property
    def num_bytes(self) -> int:
        """What it remembers."""
        return self._decoding.num_bytes

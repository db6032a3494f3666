"""What one clip of LongVie 2 is made from: noise, first picture, depth and track maps, history, prompts.

The channel layout of the published model is built here and nowhere else. Latents come from a VAE that the caller
brings; they are normalised, [1, T, 16, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.contracts import PromptKeys
from workers.denoise import add_noise
from workers.model.backbones import Backbone
from workers.model.control_branch import ControlBranch, ControlPrompt
from workers.model.dit import CausalDiT

HISTORY_PICTURES = 8
"""Newest pictures of a clip that the next one is given."""
SEEN_HISTORY_PICTURES = 5
"""Those of them that the VAE takes, as it counts 1 + 4 + 4 ...: two latent frames; the newest three are lost."""
HISTORY_SIGMA = 0.925926
"""Noise level at which the first latent frame of a later clip starts from the last of the history."""


@dataclass(frozen=True)
class ClipPrompt:
    """A prompt with the clip's image tokens, as keys of the DiT and of the control branch."""

    keys: list[PromptKeys]
    control: ControlPrompt | None


@dataclass(frozen=True, eq=False)
class ClipInputs:
    """Everything of one clip; tensors on the device of the model."""

    noise_BTCHW: Tensor
    """Float32; the published model draws it once and uses it in every clip."""
    prompts: tuple[ClipPrompt, ...]
    """The prompt and, with guidance, the negative prompt."""
    condition_BTCHW: Tensor
    """`condition_of`: the channels beside the noisy latents."""
    dense_BTCHW: Tensor | None = None
    sparse_BTCHW: Tensor | None = None
    """`control_of` depth and track videos; None for models without a control branch."""
    history_BTCHW: Tensor | None = None
    """Latents of the last pictures of the clip before; None in the first clip."""

    def first_latents(self) -> Tensor:
        """Where sampling starts: noise; in later clips the first latent frame begins from the last of the history."""
        latents = self.noise_BTCHW.float().clone()
        if self.history_BTCHW is not None:
            latents[:, 0] = add_noise(self.history_BTCHW[:, -1].float(), latents[:, 0], HISTORY_SIGMA)
        return latents


def project_clip_prompt(
    dit: CausalDiT,
    branch: ControlBranch | None,
    text_BPE: Tensor,
    image_BPE: Tensor | None,
    log_mass_BP: Tensor | None = None,
) -> ClipPrompt:
    """Cross-attention keys of a clip's prompt and image tokens.

    Args:
        dit, branch: Whose layers they are for.
        text_BPE: With zero rows as padding, or with one that stands for all of them.
        image_BPE: Tokens of the clip's first picture.
        log_mass_BP: What each row counts for, where padding was folded.
    """
    text, image = dit.embed_prompt(text_BPE, image_BPE)
    keys = [layer.cross_attn.project(text, log_mass_BP, image) for layer in dit.layers]
    return ClipPrompt(keys, None if branch is None else branch.project_prompt(text, log_mass_BP, image))


def history_pictures(pictures_BFCHW: Tensor) -> Tensor:
    """Of a finished clip's pictures those that the next clip's history is encoded from, 8 bits a channel.

    Args:
        pictures_BFCHW: In [-1, 1], as the VAE decodes them.
    """
    newest = as_eight_bits(pictures_BFCHW[:, -HISTORY_PICTURES:])
    return newest[:, :SEEN_HISTORY_PICTURES]


def as_eight_bits(pictures_BFCHW: Tensor) -> Tensor:
    """Pictures in [-1, 1] as they come back from 8 bits, truncated and not rounded: what the next clip gets to see."""
    whole = ((pictures_BFCHW.float() + 1) * 127.5).clamp(0, 255).floor()
    return whole / 127.5 - 1


def keep_first(pictures_BFCHW: Tensor) -> Tensor:
    """The video whose first picture is this one's and whose others are grey: what conditions are encoded from."""
    alone = torch.zeros_like(pictures_BFCHW)
    alone[:, 0] = pictures_BFCHW[:, 0]
    return alone


def condition_of(first_latents_BTCHW: Tensor, backbone: Backbone) -> Tensor:
    """[mask | latent]: the channels beside the noisy latents, from the latents of `keep_first`.

    The mask is 1 in the first latent frame and 0 elsewhere, once for each picture of a latent frame.
    """
    x = first_latents_BTCHW
    mask = x.new_zeros((*x.shape[:2], backbone.temporal_stride, *x.shape[3:]))
    mask[:, 0] = 1
    return torch.cat((mask, x), dim=2)


def control_of(video_latents_BTCHW: Tensor, first_latents_BTCHW: Tensor, backbone: Backbone) -> Tensor:
    """[latent | mask | latent of the first picture alone]: all input channels, of a depth or track video."""
    return torch.cat((video_latents_BTCHW, condition_of(first_latents_BTCHW, backbone)), dim=2)


def history_of(history_BTCHW: Tensor, backbone: Backbone) -> Tensor:
    """[ones | latent]: history as input of the model, ones where noise and mask would be."""
    missing = backbone.in_channels - history_BTCHW.shape[2]
    ones = history_BTCHW.new_ones((*history_BTCHW.shape[:2], missing, *history_BTCHW.shape[3:]))
    return torch.cat((ones, history_BTCHW), dim=2)

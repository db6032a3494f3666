"""From control files to the inputs of each clip, and from its latents to pictures: LongVie 2's loop around the model.

A clip is decoded by itself. Its last picture is the first of the next clip, and its last eight become history, both as
8-bit pictures. All clips of a video share one noise, as published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from workers.model.backbones import Backbone
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT
from workers.model.text_encoder import FoldedText
from workers.model.vae import PictureStream
from workers.rollout import CleanChunk
from workers.rollouts.clip_inputs import (
    ClipInputs,
    as_eight_bits,
    condition_of,
    control_of,
    history_pictures,
    keep_first,
    project_clip_prompt,
)
from workers.video.control_clips import ControlClips
from workers.video.encode import Frames


class EncodesPictures(Protocol):
    """A VAE both ways."""

    def encode(self, frames_BFCHW: Tensor) -> Tensor:
        """Normalised latents of RGB pictures in [-1, 1]."""
        ...

    def stream(self) -> PictureStream:
        """A decoder for one clip."""
        ...


class EncodesImage(Protocol):
    """An image encoder."""

    def encode(self, pictures_BCHW: Tensor) -> Tensor:
        """Tokens of RGB pictures in [-1, 1]."""
        ...


@dataclass(frozen=True)
class ClipModels:
    """The networks that a clip goes through."""

    dit: CausalDiT
    branch: ControlBranch | None
    vae: EncodesPictures
    image_encoder: EncodesImage
    read_text: Callable[[str], FoldedText]
    """A prompt's rows, padding folded into one."""
    device: torch.device


@dataclass(frozen=True)
class ClipWishes:
    """What a take asks for."""

    clips: ControlClips
    noise_BTCHW: Tensor
    negative_prompt: str | None
    """None without guidance."""
    width: int
    height: int


class ClipSource:
    """Inputs and pictures of one video's clips, in order: `read` a clip, roll it out, `decode` it, then the next.

    Args:
        models: All in evaluation mode on one device.
        wishes: Of one take.
    """

    def __init__(self, models: ClipModels, wishes: ClipWishes) -> None:
        self._models, self._wishes = models, wishes
        self._backbone: Backbone = models.dit.backbone
        self._pictures: Tensor | None = None  # of the clip before, [1, F, 3, H, W] in [-1, 1]

    @torch.inference_mode()
    def read(self, index: int, before: CleanChunk | None) -> ClipInputs:
        """Everything of a clip; the clip before must have been decoded."""
        wishes, models, backbone = self._wishes, self._models, self._backbone
        clip = wishes.clips.clips[index]
        first = self._first_picture(before)
        depth, track = (
            self._encode_control(pictures)
            for pictures in (
                clip.read_depth(wishes.width, wishes.height),
                clip.read_track(wishes.width, wishes.height),
            )
        )
        num_pictures = backbone.num_video_frames(backbone.chunk_latent_frames)
        condition = keep_first(first[:, None].expand(-1, num_pictures, -1, -1, -1))
        history = None
        if before is not None:
            assert self._pictures is not None
            history = models.vae.encode(history_pictures(self._pictures))
        image = models.image_encoder.encode(first)
        texts = (clip.text,) if wishes.negative_prompt is None else (clip.text, wishes.negative_prompt)
        rows = [models.read_text(text) for text in texts]
        return ClipInputs(
            noise_BTCHW=wishes.noise_BTCHW.to(models.device),
            prompts=tuple(
                project_clip_prompt(models.dit, models.branch, row.text_BPE, image, row.log_mass_BP) for row in rows
            ),
            condition_BTCHW=condition_of(models.vae.encode(condition), backbone),
            dense_BTCHW=depth,
            sparse_BTCHW=track,
            history_BTCHW=history,
        )

    @torch.inference_mode()
    def decode(self, clip: CleanChunk) -> Tensor:
        """New pictures of a clip [1, F, 3, H, W] in [-1, 1]: later clips begin with one that was there already."""
        self._pictures = self._models.vae.stream().decode(clip.latents_BTCHW)
        return self._pictures if clip.index == 0 else self._pictures[:, 1:]

    def _first_picture(self, before: CleanChunk | None) -> Tensor:
        """[1, 3, H, W] in [-1, 1]: the given one, or the last of the clip before as it comes back from 8 bits."""
        if before is None:
            wishes = self._wishes
            return self._as_model_pictures(wishes.clips.read_first(wishes.width, wishes.height)[None])[:, 0]
        assert self._pictures is not None, "the clip before is decoded first"
        return as_eight_bits(self._pictures[:, -1])

    def _encode_control(self, frames_FHWC: Frames) -> Tensor:
        pictures = self._as_model_pictures(frames_FHWC)
        vae = self._models.vae
        return control_of(vae.encode(pictures), vae.encode(keep_first(pictures)), self._backbone)

    def _as_model_pictures(self, frames_FHWC: Frames) -> Tensor:
        """[1, F, 3, H, W] in [-1, 1]."""
        pictures = torch.from_numpy(np.ascontiguousarray(frames_FHWC)).to(self._models.device)
        return pictures.permute(0, 3, 1, 2)[None].float() / 127.5 - 1

"""Image tokens of I2V models: the vision tower of CLIP ViT-H/14 through transformers, up to its last layer but one.

The picture is squeezed whole to the tower's square, bicubic and without antialiasing, as Wan's models were trained.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.model.backbones import Backbone
from workers.model.umt5 import import_library

# CLIP's own, of pictures in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def make_image_encoder(backbone: Backbone) -> nn.Module:
    """The tower without weights of its own; build it on the meta device."""
    assert backbone.image_encoder is not None, f"{backbone.name} takes no image"
    sizes = backbone.image_encoder
    library = import_library("transformers.models.clip.modeling_clip")
    config = import_library("transformers.models.clip.configuration_clip").CLIPVisionConfig(
        hidden_size=backbone.image_dim,
        intermediate_size=sizes.ffn_dim,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        image_size=sizes.picture,
        patch_size=sizes.patch,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
    )
    return cast(nn.Module, library.CLIPVisionModel(config))


class ImageEncoder:
    """Pictures to tokens.

    Args:
        module: `make_image_encoder` with weights, in evaluation mode.
    """

    def __init__(self, module: nn.Module, backbone: Backbone) -> None:
        assert backbone.image_encoder is not None
        self.module = module
        self._picture = backbone.image_encoder.picture
        embeddings = cast(Any, module).embeddings
        weight = embeddings.patch_embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        # A counter that no file holds: a module built on the meta device has none.
        num_tokens = embeddings.position_embedding.weight.shape[0]
        embeddings.position_ids = torch.arange(num_tokens, device=self.device)[None]

    @torch.inference_mode()
    def encode(self, pictures_BCHW: Tensor) -> Tensor:
        """Tokens [B, 257, E] of RGB pictures in [-1, 1], of any size."""
        pixels = self.prepare(pictures_BCHW).to(self.dtype)
        states = self.module(pixel_values=pixels, output_hidden_states=True).hidden_states
        return cast(Tensor, states[-2])

    def prepare(self, pictures_BCHW: Tensor) -> Tensor:
        """What the tower sees: float32, its size and its scale."""
        size = (self._picture, self._picture)
        pixels = F.interpolate(
            pictures_BCHW.to(self.device, torch.float32), size=size, mode="bicubic", align_corners=False
        )
        mean = torch.tensor(MEAN, device=self.device).view(1, 3, 1, 1)
        std = torch.tensor(STD, device=self.device).view(1, 3, 1, 1)
        return ((pixels * 0.5 + 0.5) - mean) / std

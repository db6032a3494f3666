"""Where the camera looks, as maps on the latent grid: this is what lets a model know that it has been here before.

Each latent cell gets Fourier features of the world coordinates of its centre and the motion of the pictures inside its
latent frame. Nothing bounds the world: the longest wave decides when coordinates repeat (octave 12: 16384 pixels).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.model.backbones import Backbone

CUT_PX = 24.0
"""Farther than any move takes the camera within a latent frame (4 video frames of at most 4 pixels): it has cut."""


def group_camera(camera_BF2: Tensor, backbone: Backbone) -> Tensor:
    """Camera positions of video frames [B, frames, 2] as those of latent frames, [B, T, temporal_stride, 2].

    The last position is repeated until the latent frames are whole chunks; where the first latent frame stands for
    one picture, its position is repeated.
    """
    stride = backbone.temporal_stride
    head = camera_BF2[:, :1].expand(-1, stride - backbone.first_video_frames, -1)
    chunks = backbone.num_chunks(camera_BF2.shape[1])
    missing = chunks * backbone.chunk_latent_frames * stride - head.shape[1] - camera_BF2.shape[1]
    tail = camera_BF2[:, -1:].expand(-1, missing, -1)
    camera_BF2 = torch.cat((head, camera_BF2, tail), dim=1)
    return camera_BF2.view(camera_BF2.shape[0], -1, stride, 2)


def chunks_after_cuts(camera_TS2: Tensor, backbone: Backbone) -> frozenset[int]:
    """Chunks, by index, that begin at another place than the latent frame before them has shown.

    None for a model without a camera, nor for one whose videos begin with fewer pictures: it cannot start in between.

    Args:
        camera_TS2: Of whole chunks of latent frames.
    """
    if not backbone.control_channels or backbone.first_video_frames != backbone.temporal_stride:
        return frozenset()
    num = backbone.chunk_latent_frames
    first_K2, before_K2 = camera_TS2[num::num, 0], camera_TS2[num - 1 : -1 : num, 0]
    is_cut_K = (first_K2 - before_K2).abs().amax(1) > CUT_PX
    return frozenset((is_cut_K.nonzero()[:, 0] + 1).tolist())


def control_maps(camera_BTS2: Tensor, width: int, height: int, backbone: Backbone) -> Tensor:
    """Control maps [B, T, control_channels, H, W] in float32, on the device of the camera.

    Args:
        camera_BTS2: World position (x, y) in pixels of the upper left corner of each picture, [B, T, stride, 2]. Use
            float64 where positions pass 10^5 pixels, else the shortest waves lose their phase.
        width, height: Picture size in pixels.
    """
    latent_h, latent_w = backbone.latent_size(width, height)
    pitch = backbone.spatial_stride
    corner_BT2 = camera_BTS2.mean(dim=2)
    # Waves begin at the size of a cell: a shorter one could not be told from a longer one on this grid.
    octave = torch.arange(backbone.control_octaves, device=camera_BTS2.device, dtype=camera_BTS2.dtype)
    wave_number = 2 * math.pi / (pitch * 2.0**octave)
    features = []
    for axis, cells in ((0, latent_w), (1, latent_h)):
        centre = (torch.arange(cells, device=camera_BTS2.device, dtype=camera_BTS2.dtype) + 0.5) * pitch
        phase = (corner_BT2[..., axis, None, None] + centre[:, None]) * wave_number  # [B, T, cells, octaves]
        wave = torch.cat((phase.sin(), phase.cos()), dim=-1).movedim(-1, 2)
        wave = wave[..., None, :] if axis == 0 else wave[..., None]
        features.append(wave.expand(-1, -1, -1, latent_h, latent_w))
    motion = ((camera_BTS2 - corner_BT2[:, :, None]) / pitch).flatten(2)[..., None, None]
    features.append(motion.expand(-1, -1, -1, latent_h, latent_w))
    return torch.cat(features, dim=2).float()


def world_origin(camera_BTS2: Tensor, backbone: Backbone) -> Tensor:
    """Upper left corner of each latent frame in tokens, [B, T, 2]: for `grid_positions` of a `world_rope` model."""
    return camera_BTS2.mean(dim=2) / (backbone.spatial_stride * backbone.patch[2])

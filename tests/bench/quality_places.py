"""Held-out worlds of the quality bench: places that are left and seen again, and long walks with the truth known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from workers.model.vae import VideoVAE
from workers.quality.revisit import Away, plan_revisit
from workers.training.measure import STILL_AIR
from workers.training.vae_train import HELD_OUT_SEED
from workers.worlds.camera import CameraMove, Positions
from workers.worlds.captions import write_caption
from workers.worlds.clips import VIEW_SIZE, Difficulty, Worlds, build_worlds, draw_path, draw_spec, render_clip
from workers.worlds.terrain import WORLD_SIZE

_STRETCH = 192  # video frames rendered and encoded at once


@dataclass(frozen=True)
class Group:
    """A kind of world and of camera."""

    difficulty: Difficulty
    away: Away = "straight"


GROUPS: dict[str, Group] = {
    "still": Group(STILL_AIR),
    "movers": Group(Difficulty(max_movers=6, mover_share=1.0)),
    "dense texture": Group(replace(STILL_AIR, density=(0.75, 0.95))),
    "two biomes": Group(replace(STILL_AIR, second_biome=1.0)),
    "fast camera": Group(STILL_AIR, "fast"),
    "cuts": Group(STILL_AIR, "cuts"),
}
"""In all but the last two the camera goes one straight way: 0.5 pixels a frame at 159 latent frames."""


@dataclass(frozen=True, eq=False)
class Place:
    """A path through a world: its true latents, and the true views of its last chunk."""

    latents_BTCHW: Tensor
    camera_BTS2: Tensor
    truth_BFCHW: Tensor
    caption: str

    @property
    def num_chunks(self) -> int:
        return self.camera_BTS2.shape[1] // 3


def left_and_seen_again(
    vae: VideoVAE, device: torch.device, distance: int, indices: Sequence[int], group: Group
) -> Iterator[Place]:
    """Paths whose last chunk shows again what chunk 5 showed; an index is the same place in every run."""
    for index in indices:
        rng = np.random.default_rng([distance, index])
        spec = draw_spec(HELD_OUT_SEED + 7000 + index, group.difficulty)
        path = plan_revisit(distance, rng, WORLD_SIZE, VIEW_SIZE, cut=True, away=group.away)
        caption = write_caption(spec.scene, CameraMove("wander", 0, 2.0), rng)
        yield _place(vae, build_worlds([spec], device), path.positions_F2, caption, device)


def long_walk(vae: VideoVAE, device: torch.device, index: int, num_frames: int) -> Place:
    """A camera that wanders on and on through a world that stands still."""
    rng = np.random.default_rng([index, num_frames])
    move = CameraMove("wander", 0, 2.0)
    spec = draw_spec(HELD_OUT_SEED + 30_000 + index, STILL_AIR)
    caption = write_caption(spec.scene, move, rng)
    return _place(vae, build_worlds([spec], device), draw_path(move, num_frames, rng), caption, device)


@torch.no_grad()
def _place(vae: VideoVAE, worlds: Worlds, positions_F2: Positions, caption: str, device: torch.device) -> Place:
    positions = torch.from_numpy(positions_F2)[None].to(device)
    times = torch.arange(positions.shape[1], device=device, dtype=torch.float32)[None]
    latents = []
    for start in range(0, positions.shape[1], _STRETCH):
        part = slice(start, start + _STRETCH)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents.append(vae.encode(render_clip(worlds, positions[:, part], times[:, part])).float())
    truth = render_clip(worlds, positions[:, -12:], times[:, -12:])
    return Place(torch.cat(latents, 1), positions.unflatten(1, (-1, 4)) + 512, truth, caption)

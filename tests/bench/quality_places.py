"""Held-out worlds of the quality bench, several side by side: long walks in which every place is seen exactly once.

The camera sweeps the world row by row, so a hard cut back to any place of the walk returns to something that was seen
once, a known number of latent frames ago. Nothing but memory can tell what it looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.model.vae import VideoVAE
from workers.training.measure import STILL_AIR
from workers.training.vae_train import HELD_OUT_SEED
from workers.worlds.camera import CameraMove, Positions
from workers.worlds.captions import write_caption
from workers.worlds.clips import PATH_BOX, VIEW_SIZE, Difficulty, Worlds, build_worlds, draw_spec, render_clip

CHUNK_FRAMES = 12
CHUNK_LATENTS = 3
DISTANCES = (42, 135, 228, 321, 414, 507, 600)
"""Latent frames between leaving a place and returning to it: evenly from 40 to 600."""
_STRETCH = 96  # video frames rendered and encoded at once
_SHOT_FRAMES = 48
_ROWS = 7
"""Of a sweep: neighbouring rows are farther apart than a view is high."""


@dataclass(frozen=True)
class Group:
    """A kind of world and of camera."""

    difficulty: Difficulty = STILL_AIR
    speed: float = 2.0
    """Pixels a video frame."""
    cuts: bool = False
    """The sweep comes in shots of 4 seconds in a random order."""


GROUPS: dict[str, Group] = {
    "still": Group(),
    "slow camera": Group(speed=1.0),
    "fast camera": Group(speed=4.0),
    "movers": Group(Difficulty(max_movers=6, mover_share=1.0)),
    "dense texture": Group(replace(STILL_AIR, density=(0.75, 0.95))),
    "sparse texture": Group(replace(STILL_AIR, density=(0.0, 0.2))),
    "two biomes": Group(replace(STILL_AIR, second_biome=1.0)),
    "cuts": Group(cuts=True),
}


@dataclass(frozen=True, eq=False)
class Walks:
    """Paths through as many worlds; index b of every tensor and list is one of them."""

    worlds: Worlds
    positions_BF2: Tensor
    latents_BTCHW: Tensor
    """Of the true views."""
    captions: list[str]
    seeds: list[int]
    """What their noise is drawn from."""

    @property
    def num_chunks(self) -> int:
        return self.positions_BF2.shape[1] // CHUNK_FRAMES

    def camera(self, chunk: int) -> Tensor:
        """Positions of a chunk's video frames in the model's coordinates, camera_BTS2."""
        return self._grouped(self._frames_of(chunk))

    def camera_back(self, chunk: int) -> Tensor:
        """The same with the views in reverse order: how a place is seen again."""
        return self._grouped(self._frames_of(chunk).flip(1))

    def truth_back(self, place: int, now: int) -> Tensor:
        """True views of a place that is seen again in the time of chunk `now`, frames_BFCHW."""
        start = now * CHUNK_FRAMES
        times = torch.arange(start, start + CHUNK_FRAMES, device=self.positions_BF2.device, dtype=torch.float32)
        frames = self._frames_of(place).flip(1)
        return render_clip(self.worlds, frames, times.expand(len(frames), -1))

    def _frames_of(self, chunk: int) -> Tensor:
        return self.positions_BF2[:, chunk * CHUNK_FRAMES : (chunk + 1) * CHUNK_FRAMES]

    def _grouped(self, positions_BF2: Tensor) -> Tensor:
        return positions_BF2.unflatten(1, (-1, 4)) + 512


def place_before(chunk: int, distance: int) -> int:
    """The chunk that shows the place `distance` latent frames before this one; negative where the walk was not yet."""
    return chunk - 1 - distance // CHUNK_LATENTS


def take_walks(vae: VideoVAE, device: torch.device, indices: Sequence[int], num_frames: int, group: Group) -> Walks:
    """Walks through held-out worlds; an index is the same walk in every run and for every policy.

    Args:
        vae: Encodes the true views.
        device: Of the worlds and of the VAE.
        indices: Which worlds.
        num_frames: Video frames, a multiple of a chunk's.
        group: What kind of worlds and camera.
    """
    specs = [draw_spec(HELD_OUT_SEED + 30_000 + index, group.difficulty) for index in indices]
    rngs = [np.random.default_rng([index, 5]) for index in indices]
    paths = [sweep(num_frames, group, rng) for rng in rngs]
    move = CameraMove("wander", 0, group.speed)
    captions = [write_caption(spec.scene, move, rng) for spec, rng in zip(specs, rngs, strict=True)]
    worlds = build_worlds(specs, device)
    positions = torch.from_numpy(np.stack(paths)).to(device)
    return Walks(worlds, positions, _encode(vae, worlds, positions), captions, [index + 1 for index in indices])


def sweep(num_frames: int, group: Group, rng: np.random.Generator) -> Positions:
    """A path that shows every place once: rows to and fro, from a random point on, in one of eight orientations."""
    low, high = PATH_BOX
    gap = (high - low) / (_ROWS - 1)
    assert gap >= VIEW_SIZE, "rows of views must not overlap"
    corners = [(high if (row + end) % 2 else low, low + row * gap) for row in range(_ROWS) for end in (0, 1)]
    path = _walk(np.array(corners), group.speed)
    start = int(rng.integers(max(1, len(path) - num_frames)))
    if len(path) < num_frames:
        raise ValueError(f"a sweep at {group.speed} pixels a frame has {len(path)} frames, not {num_frames}")
    path = path[start : start + num_frames]
    if rng.random() < 0.5:
        path = path[:, ::-1]
    for axis in (0, 1):
        if rng.random() < 0.5:
            path = path.copy()
            path[:, axis] = low + high - path[:, axis]
    if group.cuts:
        shots = [path[at : at + _SHOT_FRAMES] for at in range(0, num_frames, _SHOT_FRAMES)]
        path = np.concatenate([shots[index] for index in rng.permutation(len(shots))])
    return np.ascontiguousarray(np.rint(path), dtype=np.float32)


def _walk(corners: NDArray[np.float64], speed: float) -> NDArray[np.float64]:
    """Along a polyline from its first corner to its last."""
    lengths = np.abs(np.diff(corners, axis=0)).max(1)
    reached = np.concatenate([[0.0], np.cumsum(lengths)])
    at = np.arange(0.0, reached[-1], speed)
    return np.stack([np.interp(at, reached, corners[:, axis]) for axis in (0, 1)], axis=1)


@torch.no_grad()
def _encode(vae: VideoVAE, worlds: Worlds, positions_BF2: Tensor) -> Tensor:
    batch, num_frames = positions_BF2.shape[:2]
    device = positions_BF2.device
    times = torch.arange(num_frames, device=device, dtype=torch.float32).expand(batch, -1)
    latents = []
    for start in range(0, num_frames, _STRETCH):
        part = slice(start, start + _STRETCH)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents.append(vae.encode(render_clip(worlds, positions_BF2[:, part], times[:, part])).float())
    return torch.cat(latents, 1)

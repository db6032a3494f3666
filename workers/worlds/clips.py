"""From a seed to a world, and from a world and a camera path to a clip whose every view can be rendered again.

`WorldSpec` is all that a seed decides; `Difficulty` says from what it is drawn, so that one cause of failure can be
studied at a time. Views are RGB in [-1, 1], the range that the video VAE reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.worlds.camera import KINDS, CameraMove, Positions, trace
from workers.worlds.captions import Scene, write_caption
from workers.worlds.terrain import BIOMES, WATER, WORLD_SIZE, Noise, draw_noise, draw_terrain
from workers.worlds.things import (
    COLOURS,
    MOVERS,
    NOUNS,
    Landmark,
    Mover,
    Species,
    Tables,
    cell_tables,
    paint_landmarks,
    paint_movers,
    place_landmarks,
    standing,
)

VIEW_SIZE = 128
PATH_BOX = (8.0, float(WORLD_SIZE - VIEW_SIZE - 8))  # a few pixels from the rim, where shading has no neighbour


@dataclass(frozen=True)
class Difficulty:
    """From what worlds and paths are drawn.

    Attributes:
        second_biome: Probability that a world has two biomes.
        max_movers: Greatest number of movers in a world that has any.
        mover_share: Probability that a world has movers.
        density: Least and greatest probability that a cell holds a landmark.
        speeds: Camera speeds in pixels a video frame.
        cuts: Probability that a path has hard cuts.
        texture: How much the fine detail of the ground counts: 0 is smooth, 1 as usual, 2 rough.
    """

    second_biome: float = 0.2
    max_movers: int = 3
    mover_share: float = 0.2
    density: tuple[float, float] = (0.3, 0.75)
    speeds: tuple[float, ...] = (0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 3.0, 4.0)
    cuts: float = 0.08
    texture: float = 1.0


@dataclass(frozen=True)
class WorldSpec:
    """All that decides a world."""

    seed: int
    biomes: tuple[int, int]
    water: int
    species: tuple[Species, ...]
    density: float
    movers: tuple[Mover, ...]
    texture: float = 1.0

    @property
    def scene(self) -> Scene:
        """The words that a caption of this world may use."""
        grounds = tuple(BIOMES[index].words for index in dict.fromkeys(self.biomes))
        things = tuple((COLOURS[one.colour][0], NOUNS[one.kind][1]) for one in self.species)
        movers = tuple((COLOURS[one.colour][0], MOVERS[one.kind][1]) for one in self.movers)
        return Scene(grounds, self.water, things, self.density > 0.52, movers)


@dataclass(frozen=True)
class Worlds:
    """Several worlds, drawn.

    Attributes:
        specs: One a world.
        pictures_BCHW: The whole worlds, RGB in [-1, 1], float32.
        levels_BHW: Palette level of every pixel, uint8: what is water and what is land.
    """

    specs: tuple[WorldSpec, ...]
    pictures_BCHW: Tensor
    levels_BHW: Tensor


def _stream(seed: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), purpose]))


def draw_spec(seed: int, difficulty: Difficulty = Difficulty()) -> WorldSpec:
    """What world a seed means."""
    rng = _stream(seed, 1)
    first = int(rng.integers(len(BIOMES)))
    other = int(rng.integers(len(BIOMES)))
    second = other if rng.random() < difficulty.second_biome else first
    kinds = rng.permutation(len(NOUNS))[: int(rng.integers(2, 4))]
    species = tuple(Species(int(kind), int(rng.integers(len(COLOURS)))) for kind in kinds)
    density = float(rng.uniform(*difficulty.density))
    movers: tuple[Mover, ...] = ()
    if rng.random() < difficulty.mover_share and difficulty.max_movers:
        kind, colour = int(rng.integers(len(MOVERS))), int(rng.integers(len(COLOURS)))
        heading = rng.uniform(-2, 2, size=2)
        movers = tuple(
            Mover(kind, colour, (float(x), float(y)), (float(heading[0]), float(heading[1])))
            for x, y in rng.uniform(0, WORLD_SIZE, size=(int(rng.integers(1, difficulty.max_movers + 1)), 2))
        )
    water = int(rng.integers(len(WATER)))
    return WorldSpec(seed, (first, second), water, species, density, movers, difficulty.texture)


@dataclass(frozen=True)
class WorldPlan:
    """A world before it is drawn: all that is decided on the CPU, small enough to be sent between processes."""

    spec: WorldSpec
    noise: Noise
    layers: list[list[Landmark]]
    tables: Tables


def plan_world(spec: WorldSpec) -> WorldPlan:
    """Draw the random numbers of a world."""
    layers = place_landmarks(_stream(spec.seed, 3), spec.species, spec.density)
    noise = draw_noise(_stream(spec.seed, 2), spec.biomes, spec.texture)
    return WorldPlan(spec, noise, layers, cell_tables(layers))


@torch.no_grad()
def draw_worlds(plans: list[WorldPlan], device: torch.device) -> Worlds:
    """Paint worlds; a millisecond each on a GPU, under a second on a CPU core."""
    specs = tuple(plan.spec for plan in plans)
    biomes, water = [spec.biomes for spec in specs], [spec.water for spec in specs]
    terrain = draw_terrain([plan.noise for plan in plans], biomes, water, device)
    pictures = terrain.pictures_BCHW
    paint_landmarks(pictures, terrain.levels_BHW, [plan.tables for plan in plans])
    return Worlds(specs, pictures.clamp(0, 1) * 2 - 1, terrain.levels_BHW.to(torch.uint8))


def build_worlds(specs: list[WorldSpec], device: torch.device) -> Worlds:
    """Plan and draw worlds."""
    return draw_worlds([plan_world(spec) for spec in specs], device)


def landmarks_of(spec: WorldSpec, levels_HW: Tensor) -> list[Landmark]:
    """All landmarks that stand in a world."""
    layers = place_landmarks(_stream(spec.seed, 3), spec.species, spec.density)
    return [mark for layer in layers for mark in standing(layer, levels_HW)]


@torch.no_grad()
def render_views(pictures_BCHW: Tensor, positions_BF2: Tensor, size: int = VIEW_SIZE) -> Tensor:
    """Cut the views out of worlds.

    Args:
        pictures_BCHW: Worlds.
        positions_BF2: Top left corner (x, y) of each view, whole numbers inside the world.
        size: Side of a view in pixels.
    Returns:
        [B, F, C, size, size] in the range of the worlds; channels lie innermost in memory.
    """
    span = torch.arange(size, device=pictures_BCHW.device)
    corner = positions_BF2.long()
    rows = (corner[..., 1, None] + span)[..., :, None]
    columns = (corner[..., 0, None] + span)[..., None, :]
    batch = torch.arange(len(corner), device=corner.device)[:, None, None, None]
    return pictures_BCHW[batch, :, rows, columns].movedim(-1, 2)


@torch.no_grad()
def render_clip(worlds: Worlds, positions_BF2: Tensor, times_BF: Tensor) -> Tensor:
    """Views with everything that flies over them at these video frame indices, in [-1, 1]."""
    frames = render_views(worlds.pictures_BCHW, positions_BF2)
    flocks = [spec.movers for spec in worlds.specs]
    if any(flocks):
        frames = paint_movers(frames / 2 + 0.5, positions_BF2, times_BF, flocks) * 2 - 1
    return frames


def draw_move(rng: np.random.Generator, difficulty: Difficulty = Difficulty()) -> CameraMove:
    """A scripted camera move: mostly exploring, often coming back."""
    shares = np.array([0.04, 0.3, 0.2, 0.12, 0.34, 0.0])
    kind = "cut" if rng.random() < difficulty.cuts else str(rng.choice(KINDS, p=shares))
    return CameraMove(kind, int(rng.integers(8)), float(rng.choice(difficulty.speeds)))


def draw_path(move: CameraMove, num_frames: int, rng: np.random.Generator) -> Positions:
    """A path of this move from anywhere in a world, [num_frames, 2]."""
    x, y = rng.uniform(*PATH_BOX, size=2)
    return trace(move, num_frames, (float(x), float(y)), PATH_BOX, rng)


@dataclass(frozen=True)
class Clip:
    """One clip with all that is known about it; equal seeds give equal clips."""

    spec: WorldSpec
    move: CameraMove
    positions_F2: Positions
    caption: str

    def render(self, device: torch.device) -> Tensor:
        """The true pictures, [F, 3, 128, 128] in [-1, 1]."""
        at = torch.from_numpy(self.positions_F2)[None].to(device)
        times = torch.arange(len(self.positions_F2), device=device, dtype=torch.float32)[None]
        return render_clip(build_worlds([self.spec], device), at, times)[0]


def draw_clip(seed: int, num_frames: int, difficulty: Difficulty = Difficulty()) -> Clip:
    """World, path and caption of a seed."""
    spec = draw_spec(seed, difficulty)
    rng = _stream(seed, 4)
    move = draw_move(rng, difficulty)
    return Clip(spec, move, draw_path(move, num_frames, rng), write_caption(spec.scene, move, rng))

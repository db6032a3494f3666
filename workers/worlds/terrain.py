"""Ground of the procedural worlds: ten biomes, smooth random heights, crisp contours and hill shading.

A world is decided by its `WorldSpec` alone; its random numbers come from NumPy on the CPU, so that the same seed gives
the same world on every device. Pictures are drawn by batched torch wherever the caller wants them. What stands on the
ground is in `things.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

WORLD_SIZE = 1024
"""Side of a world in pixels: 64 views of 128 pixels, enough to go far away and come back."""

OCTAVES = ((4, 1.0), (8, 0.6), (16, 0.34), (32, 0.18), (64, 0.08))
"""Cells per side and amplitude. Nothing finer than 16 pixels: finer noise is lost in a latent and costs its bits."""

FINE_CELLS = 32
"""Octaves from here on are texture."""

BORDER = ((3, 1.0), (12, 0.25))
"""The same for the field whose sign parts two biomes."""

NUM_LEVELS = 6
FIRST_LAND_LEVEL = 2


@dataclass(frozen=True)
class Biome:
    """A named palette: deep water, shallow water, shore, low, middle and high ground, as RGB in [0, 255]."""

    name: str
    words: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]


BIOMES: tuple[Biome, ...] = (
    Biome(
        "meadow",
        ("green meadow", "grassy valley", "lush green countryside", "spring meadow"),
        ((28, 84, 150), (66, 142, 190), (226, 208, 142), (122, 184, 76), (78, 146, 62), (48, 108, 56)),
    ),
    Biome(
        "desert",
        ("sandy desert", "orange desert", "dry land of dunes", "sun-baked desert"),
        ((40, 128, 140), (98, 184, 176), (246, 226, 170), (234, 188, 112), (214, 146, 76), (170, 96, 56)),
    ),
    Biome(
        "snow",
        ("snowy plain", "frozen white land", "arctic landscape", "winter land of snow and ice"),
        ((44, 72, 122), (128, 172, 210), (206, 222, 236), (244, 248, 252), (222, 232, 244), (164, 182, 206)),
    ),
    Biome(
        "moor",
        ("violet moor", "purple heath", "lavender hills", "land of purple heather"),
        ((58, 42, 104), (112, 92, 164), (214, 176, 206), (176, 128, 196), (136, 88, 168), (94, 58, 132)),
    ),
    Biome(
        "lava",
        ("volcanic land", "black lava field", "scorched land of lava", "burnt volcanic waste"),
        ((196, 52, 18), (248, 132, 30), (92, 66, 62), (62, 52, 56), (44, 40, 46), (92, 84, 88)),
    ),
    Biome(
        "autumn",
        ("autumn forest", "red and orange woodland", "land in autumn colours", "fall forest"),
        ((38, 80, 104), (86, 136, 142), (224, 186, 116), (226, 142, 44), (196, 92, 36), (140, 54, 36)),
    ),
    Biome(
        "savanna",
        ("yellow savanna", "golden grassland", "land of dry yellow grass", "golden steppe"),
        ((50, 110, 122), (104, 162, 150), (216, 190, 130), (232, 208, 92), (206, 174, 64), (158, 130, 56)),
    ),
    Biome(
        "tropics",
        ("tropical islands", "turquoise lagoon", "palm green islands in a turquoise sea", "tropical coast"),
        ((10, 122, 164), (62, 204, 206), (252, 238, 188), (86, 206, 118), (30, 160, 98), (16, 116, 84)),
    ),
    Biome(
        "swamp",
        ("dark swamp", "misty marsh", "murky wetland", "olive green bog"),
        ((34, 52, 48), (66, 92, 74), (128, 122, 82), (104, 118, 62), (76, 92, 52), (54, 68, 46)),
    ),
    Biome(
        "moon",
        ("grey moon", "barren grey world", "moonlike land of dust", "lifeless grey plain"),
        ((36, 36, 46), (70, 70, 84), (150, 148, 152), (182, 180, 182), (136, 134, 140), (98, 96, 106)),
    ),
)

WATER = (("dry", 0.75), ("some water", 0.25), ("much water", -0.35))
"""How the sea level is called and by how many standard deviations the ground is raised above its middle."""


@dataclass(frozen=True)
class Terrain:
    """Pictures of the bare ground and what the things need to know of it.

    Attributes:
        pictures_BCHW: RGB in [0, 1], float32.
        levels_BHW: Which of the six palette levels lies there, 0 (deep water) to 5 (high ground).
    """

    pictures_BCHW: Tensor
    levels_BHW: Tensor


Noise = tuple[NDArray[np.float32], ...]
"""Random grids of one world: one an octave of the ground, and two of the border between its biomes if it has two."""


def draw_noise(rng: np.random.Generator, biomes: tuple[int, int], texture: float = 1.0) -> Noise:
    """The random numbers of a world's ground; consumed in a fixed order, so equal seeds give equal grounds.

    The octaves of `FINE_CELLS` cells and more count `texture` times: below 1 the ground is smooth, above it is rough.
    """
    noise = tuple(rng.standard_normal((cells, cells), dtype=np.float32) for cells, _ in OCTAVES)
    if texture != 1.0:
        fine = [np.float32(texture if cells >= FINE_CELLS else 1.0) for cells, _ in OCTAVES]
        noise = tuple(grid * factor for grid, factor in zip(noise, fine, strict=True))
    border = BORDER if biomes[0] != biomes[1] else ()
    return noise + tuple(rng.standard_normal((cells, cells), dtype=np.float32) for cells, _ in border)


def draw_terrain(noises: list[Noise], biomes: list[tuple[int, int]], water: list[int], device: torch.device) -> Terrain:
    """Draw the ground of several worlds at once.

    Args:
        noises: The random grids of each world.
        biomes: First and second biome of each world (equal when the world has one only).
        water: Index into `WATER` for each world.
        device: Where the pictures are drawn.
    """
    heights = _heights([noise[: len(OCTAVES)] for noise in noises], OCTAVES, device)
    heights = (heights - heights.mean((1, 2), keepdim=True)) / heights.std((1, 2), keepdim=True)
    raise_B = torch.tensor([WATER[index][1] for index in water], device=device)
    level = (heights + raise_B[:, None, None]) * 1.15 + NUM_LEVELS / 2 - 0.5
    level = level.clamp(0.01, NUM_LEVELS - 0.01)
    colours = _colours(level, _palettes([pair[0] for pair in biomes], device))
    mixed = [index for index, pair in enumerate(biomes) if pair[0] != pair[1]]
    if mixed:
        other = _colours(level[mixed], _palettes([biomes[index][1] for index in mixed], device))
        field = _heights([noises[index][len(OCTAVES) :] for index in mixed], BORDER, device)
        side = (field * 6 + 0.5).clamp(0, 1)[:, None]  # broad regions with a soft edge of some ten pixels
        colours[mixed] = torch.lerp(colours[mixed], other, side)
    shade = (1 + 2.2 * (heights - torch.roll(heights, (3, 3), (1, 2)))).clamp(0.82, 1.18)
    return Terrain((colours * shade[:, None]).clamp(0, 1), level.floor().clamp(0, NUM_LEVELS - 1))


def _heights(noises: list[Noise], octaves: tuple[tuple[int, float], ...], device: torch.device) -> Tensor:
    total = torch.zeros(len(noises), 1, WORLD_SIZE, WORLD_SIZE, device=device)
    for index, (_, amplitude) in enumerate(octaves):
        grid = torch.from_numpy(np.stack([noise[index] for noise in noises])[:, None]).to(device)
        size = (WORLD_SIZE, WORLD_SIZE)
        total += amplitude * F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return total[:, 0]


def _palettes(indices: list[int], device: torch.device) -> Tensor:
    return torch.tensor([BIOMES[index].palette for index in indices], device=device, dtype=torch.float32) / 255


def _colours(level: Tensor, palettes_BLC: Tensor) -> Tensor:
    """Flat colours with contours of constant width: blend by the distance in pixels to the nearest level boundary."""
    slope_y = (torch.roll(level, -1, 1) - torch.roll(level, 1, 1)) / 2
    slope_x = (torch.roll(level, -1, 2) - torch.roll(level, 1, 2)) / 2
    slope = (slope_x.square() + slope_y.square()).sqrt().clamp(min=1e-4)
    boundary = level.round().clamp(1, NUM_LEVELS - 1)
    distance_px = (level - boundary) / slope
    blend = (distance_px / 2 + 0.5).clamp(0, 1)
    flat = boundary.long().flatten(1)[..., None].expand(-1, -1, 3)
    below, above = palettes_BLC.gather(1, flat - 1), palettes_BLC.gather(1, flat)
    colours = torch.lerp(below, above, blend.flatten(1)[..., None])
    foam = ((2.2 - distance_px.abs()) * 0.5).clamp(0, 0.45) * (boundary == FIRST_LAND_LEVEL)
    colours = colours + (1 - colours) * foam.flatten(1)[..., None]
    return colours.view(*level.shape, 3).permute(0, 3, 1, 2)

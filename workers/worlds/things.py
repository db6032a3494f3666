"""What stands and flies in the procedural worlds: landmarks of ten kinds in eight colours, and movers in the air.

Landmarks are painted into the world once, 18 pixels across or more (smaller ones blur in the video VAE). Movers are
painted into each video frame, where they are at that time. All shapes are signed distances, so edges are crisp.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.worlds.terrain import FIRST_LAND_LEVEL, WORLD_SIZE

COLOURS: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("red", (214, 44, 44)),
    ("blue", (40, 84, 214)),
    ("yellow", (246, 208, 48)),
    ("white", (246, 246, 246)),
    ("black", (32, 32, 38)),
    ("purple", (150, 54, 178)),
    ("green", (26, 132, 62)),
    ("orange", (244, 130, 30)),
)

NOUNS: tuple[tuple[str, str], ...] = (
    ("pine tree", "pine trees"),
    ("round tree", "round trees"),
    ("house", "houses"),
    ("tower", "towers"),
    ("tent", "tents"),
    ("crystal", "crystals"),
    ("windmill", "windmills"),
    ("mushroom", "mushrooms"),
    ("stone ring", "stone rings"),
    ("rock", "rocks"),
)

MOVERS: tuple[tuple[str, str], ...] = (("bird", "birds"), ("balloon", "balloons"), ("airship", "airships"))

LAYERS = ((64, 9.0, 12.0), (128, 15.0, 20.0))
"""Side of a cell that holds at most one landmark, and its least and greatest radius; all in pixels."""

Tables = tuple[NDArray[np.float32], ...]

MOVER_PERIOD = 320.0
"""A mover stands for a flock: it is seen again every so many pixels in both directions."""

OUTLINE = 0.28
"""How bright the outline is in parts of the colour inside."""


@dataclass(frozen=True)
class Species:
    """All landmarks of a world that look alike: index into `NOUNS`, index into `COLOURS`."""

    kind: int
    colour: int


@dataclass(frozen=True)
class Mover:
    """A thing in the air: index into `MOVERS`, colour, place at video frame 0 and velocity, in world pixels."""

    kind: int
    colour: int
    start: tuple[float, float]
    velocity: tuple[float, float]


@dataclass(frozen=True)
class Landmark:
    """One landmark of a world: its species and where its middle is, in world pixels."""

    species: Species
    x: float
    y: float
    radius: float


def place_landmarks(rng: np.random.Generator, species: tuple[Species, ...], density: float) -> list[list[Landmark]]:
    """Scatter landmarks over a world, one list a layer; those that fall on water are left out when painted."""
    layers = []
    for cell, least, greatest in LAYERS:
        landmarks = []
        cells = WORLD_SIZE // cell
        uniform = rng.random((cells, cells, 5))
        for row in range(cells):
            for column in range(cells):
                present, along_x, along_y, size, which = (float(value) for value in uniform[row, column])
                if present > density:
                    continue
                radius = least + (greatest - least) * size
                margin = radius * 1.1 + 2
                x = column * cell + margin + along_x * (cell - 2 * margin)
                y = row * cell + margin + along_y * (cell - 2 * margin)
                landmarks.append(Landmark(species[int(which * len(species))], x, y, radius))
        layers.append(landmarks)
    return layers


def paint_landmarks(pictures_BCHW: Tensor, levels_BHW: Tensor, tables: list[Tables]) -> None:
    """Paint into the pictures, in place, the landmarks of every world that stand on land.

    Args:
        pictures_BCHW: Bare ground, RGB in [0, 1].
        levels_BHW: Palette level of every pixel.
        tables: `cell_tables` of each world.
    """
    for index, (cell, _, _) in enumerate(LAYERS):
        _paint_layer(pictures_BCHW, levels_BHW, np.stack([world[index] for world in tables]), cell)


def standing(landmarks: list[Landmark], levels_HW: Tensor) -> list[Landmark]:
    """Those landmarks whose foot is on land, which are the ones that were painted."""
    return [mark for mark in landmarks if levels_HW[int(mark.y), int(mark.x)] >= FIRST_LAND_LEVEL]


def cell_tables(layers: list[list[Landmark]]) -> Tables:
    """For each layer and cell of a world: radius (0 when empty), x, y, kind, colour."""
    tables = []
    for (cell, _, _), landmarks in zip(LAYERS, layers, strict=True):
        cells = WORLD_SIZE // cell
        table = np.zeros((cells, cells, 5), dtype=np.float32)
        for mark in landmarks:
            row = table[int(mark.y // cell), int(mark.x // cell)]
            row[:] = (mark.radius, mark.x, mark.y, mark.species.kind, mark.species.colour)
        tables.append(table)
    return tuple(tables)


def _paint_layer(pictures: Tensor, levels: Tensor, table: NDArray[np.float32], cell: int) -> None:
    """All cells of one kind at a time: each shape is computed only where it stands."""
    batch, cells = table.shape[:2]
    grid = pictures.view(batch, 3, cells, cell, cells, cell)
    for kind in range(len(NOUNS)):
        world, row, column = np.nonzero((table[..., 0] > 0) & (table[..., 3] == kind))
        if not len(world):
            continue
        marks = torch.from_numpy(table[world, row, column]).to(pictures.device)
        size, x, y = (marks[:, index, None, None] for index in range(3))
        at = [torch.from_numpy(index).to(pictures.device) for index in (world, row, column)]
        on_land = levels[at[0], marks[:, 2].long(), marks[:, 1].long()] >= FIRST_LAND_LEVEL
        span = torch.arange(cell, device=pictures.device) + 0.5
        u = (span[None, None, :] + at[2][:, None, None] * cell - x) / size
        v = (span[None, :, None] + at[1][:, None, None] * cell - y) / size
        body, accent = signed_distances(u, v, kind)
        shadow, _ = signed_distances(u - 0.25, v - 0.25, kind)
        there = on_land[:, None, None].float()
        dark = ((shadow * size + 0.5).clamp(0, 1) * there * 0.4)[:, None]
        paint = _two_tones(_colour_table(pictures.device)[marks[:, 4].long()], kind, accent * size)
        paint = paint * (OUTLINE + (1 - OUTLINE) * (body * size - 1.0).clamp(0, 1)[:, None])
        opacity = ((body * size + 0.5).clamp(0, 1) * there)[:, None]
        grid[at[0], :, at[1], :, at[2]] = torch.lerp(grid[at[0], :, at[1], :, at[2]] * (1 - dark), paint, opacity)


def signed_distances(u: Tensor, v: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Distance to the edge of the body and of its accent, positive inside, in parts of the radius.

    Args:
        u, v: Place relative to the middle of the landmark, in parts of its radius; v grows downwards.
        kind: Index into `NOUNS`.
    """
    return _SHAPES[kind](u, v)


def _wedge(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(0.85 - v, (v + 1 - 1.5 * u.abs()) * 0.55)


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return (u * u + v * v).sqrt()


def _pine(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _wedge(u, v), torch.minimum(0.1 - v, (v + 1 - 1.5 * u.abs()) * 0.55)


def _tree(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return 0.95 - _disc(u, v), 0.5 - _disc(u + 0.25, v + 0.25)


def _house(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    walls = torch.minimum(torch.minimum(0.9 - v, v + 0.15), 0.68 - u.abs())
    roof = torch.minimum(0.05 - v, (v + 1 - 0.95 * u.abs()) * 0.7)
    return torch.maximum(walls, roof), walls


def _tower(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    d = _disc(u, v)
    return 0.95 - d, torch.maximum(0.3 - d, 0.1 - (d - 0.7).abs())


def _tent(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _wedge(u, v), torch.minimum(0.85 - v, (v + 0.1 - 2.2 * u.abs()) * 0.4)


def _crystal(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    diamond = (1 - u.abs() * 1.35 - v.abs()) * 0.6
    return diamond, torch.minimum(diamond, -u)


def _windmill(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    sails = torch.maximum(0.24 - (u - v).abs() * 0.7, 0.24 - (u + v).abs() * 0.7)
    return torch.minimum(sails, 1.0 - _disc(u, v)), 0.3 - _disc(u, v)


def _mushroom(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    cap = torch.minimum(0.95 - _disc(u, v), 0.2 - v)
    stem = torch.minimum(0.95 - v, torch.minimum(v - 0.1, 0.32 - u.abs()))
    spots = torch.maximum(0.22 - _disc(u.abs() - 0.42, v + 0.2), 0.2 - _disc(u, v + 0.6))
    return torch.maximum(cap, stem), torch.maximum(spots, torch.minimum(stem, v - 0.2))


def _ring(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return 0.26 - (_disc(u, v) - 0.7).abs(), torch.full_like(u, -1.0)


def _rock(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    au, av = u.abs(), v.abs()
    octagon = 0.9 - torch.maximum(torch.maximum(au, av * 1.15), (au + av) * 0.74)
    return octagon, torch.minimum(octagon - 0.25, -0.1 - v - 0.3 * u)


_SHAPES = (_pine, _tree, _house, _tower, _tent, _crystal, _windmill, _mushroom, _ring, _rock)
_CREAM_ACCENT = (2, 7)  # walls and stems
_DARK_ACCENT = (3, 4)  # battlements and doors


def _two_tones(colour_MC: Tensor, kind: int, accent_px: Tensor) -> Tensor:
    """The colour itself, and on the accent a lighter tone, cream for walls and stems, near black for doors."""
    tone = colour_MC * 0.5 + 0.5
    if kind in _CREAM_ACCENT:
        tone = colour_MC.new_tensor((0.96, 0.92, 0.80)).expand_as(colour_MC)
    elif kind in _DARK_ACCENT:
        tone = colour_MC.new_tensor((0.14, 0.12, 0.14)).expand_as(colour_MC)
    return torch.lerp(colour_MC[..., None, None], tone[..., None, None], (accent_px + 0.5).clamp(0, 1)[:, None])


def _colour_table(device: torch.device) -> Tensor:
    return torch.tensor([rgb for _, rgb in COLOURS], device=device, dtype=torch.float32) / 255


def paint_movers(
    frames_BFCHW: Tensor, origins_BF2: Tensor, times_BF: Tensor, movers: list[tuple[Mover, ...]]
) -> Tensor:
    """Paint what flies over the views.

    Args:
        frames_BFCHW: Views of B worlds at F video frames, RGB in [0, 1].
        origins_BF2: World pixel of each view's top left corner, (x, y).
        times_BF: Video frame index of each view, which says where a mover is.
        movers: Those of each world; worlds may have different numbers of them.
    """
    most = max((len(flock) for flock in movers), default=0)
    height, width = frames_BFCHW.shape[-2:]
    device = frames_BFCHW.device
    column = torch.arange(width, device=device) + 0.5
    row = torch.arange(height, device=device) + 0.5
    for index in range(most):
        owners = [b for b, flock in enumerate(movers) if len(flock) > index]
        flock = [movers[b][index] for b in owners]
        at = frames_BFCHW.new_tensor([mover.start + mover.velocity for mover in flock])
        place = at[:, None, :2] + at[:, None, 2:] * times_BF[owners][..., None] - origins_BF2[owners]
        place = (place + MOVER_PERIOD / 4) % MOVER_PERIOD - MOVER_PERIOD / 4
        u = (column - place[..., 0, None])[:, :, None, :]
        v = (row - place[..., 1, None])[:, :, :, None]
        body = _mover_distance(u, v, [mover.kind for mover in flock], times_BF[owners])
        colour = _colour_table(device)[[mover.colour for mover in flock]][:, None, :, None, None]
        paint = colour * (OUTLINE + (1 - OUTLINE) * (body - 1).clamp(0, 1))[:, :, None]
        opacity = (body + 0.5).clamp(0, 1)[:, :, None]
        frames_BFCHW[owners] = torch.lerp(frames_BFCHW[owners], paint, opacity)
    return frames_BFCHW


def _mover_distance(u: Tensor, v: Tensor, kinds: list[int], times_BF: Tensor) -> Tensor:
    """Distance to the edge in pixels, positive inside: a bird beats its wings, a balloon and an airship do not."""
    au = u.abs()
    beat = 3.0 * torch.sin(times_BF * 0.8)[..., None, None]
    bird = torch.minimum(2.8 - (v + beat * (au / 9) - 1).abs(), 10 - au)
    balloon = torch.maximum(9 - (u * u + v * v).sqrt(), torch.minimum(2.5 - au, 3 - (v - 12).abs()))
    airship = 7 - (u * u / 4 + v * v).sqrt()
    kind = torch.tensor(kinds, device=u.device)[:, None, None, None]
    return torch.where(kind == 0, bird, torch.where(kind == 1, balloon, airship))

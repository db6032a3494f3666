"""Is it still the same thing? Landmarks of a returned view, recognised by comparing patches.

A patch of the generated picture is compared with the true patch, with patches of the world's other kinds of landmarks
and with bare ground nearby; the nearest one says what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.worlds.clips import VIEW_SIZE, Worlds, landmarks_of
from workers.worlds.terrain import WORLD_SIZE
from workers.worlds.things import Landmark

_CORE = 0.7  # the patch is this part of the radius, so that it holds mostly the landmark
_OTHERS = 3  # patches of each other kind


@dataclass(frozen=True)
class Quiz:
    """Questions about one view.

    Attributes:
        places: Row, column and half size of each patch in the view.
        candidates: For each place the true patch first, then what else it could be.
    """

    places: tuple[tuple[int, int, int], ...]
    candidates: tuple[tuple[Tensor, ...], ...]

    def ask(self, picture_CHW: Tensor) -> tuple[int, int]:
        """How many landmarks are recognised in a picture of the view, and how many there are."""
        right = 0
        for (row, column, half), patches in zip(self.places, self.candidates, strict=True):
            patch = _cut(picture_CHW, row, column, half)
            errors = torch.stack([(patch - candidate).square().mean() for candidate in patches])
            right += int(errors.argmin() == 0)
        return right, len(self.places)


def make_quizzes(worlds: Worlds, corners_B2: Tensor) -> list[Quiz]:
    """One quiz for each world, about the view with this top left corner."""
    quizzes = []
    for index, spec in enumerate(worlds.specs):
        picture = ((worlds.pictures_BCHW[index] + 1) * 127.5).byte().cpu()  # a quarter of the bytes to move
        levels = worlds.levels_BHW[index].cpu()
        marks = landmarks_of(spec, levels)
        x0, y0 = (int(value) for value in corners_B2[index].tolist())
        places, candidates = [], []
        for mark in marks:
            column, row, half = int(mark.x) - x0, int(mark.y) - y0, max(3, int(mark.radius * _CORE))
            if half < row < VIEW_SIZE - half - 1 and half < column < VIEW_SIZE - half - 1:
                places.append((row, column, half))
                candidates.append(_candidates(picture, mark, marks, half))
        quizzes.append(Quiz(tuple(places), tuple(candidates)))
    return quizzes


def _candidates(picture_CHW: Tensor, mark: Landmark, marks: list[Landmark], half: int) -> tuple[Tensor, ...]:
    x, y = int(mark.x), int(mark.y)
    patches = [_colours(_cut(picture_CHW, y, x, half))]
    away = int(mark.radius * 2.2)
    spots = [(y + away, x), (y - away, x), (y, x + away), (y, x - away)]
    found: dict[object, int] = {}
    for other in marks:
        if other.species != mark.species and found.get(other.species, 0) < _OTHERS and other.radius >= half:
            found[other.species] = found.get(other.species, 0) + 1
            spots.append((int(other.y), int(other.x)))
    inside = [spot for spot in spots if all(half < value < WORLD_SIZE - half - 1 for value in spot)]
    return (*patches, *(_colours(_cut(picture_CHW, row, column, half)) for row, column in inside))


def _cut(picture_CHW: Tensor, row: int, column: int, half: int) -> Tensor:
    return picture_CHW[:, row - half : row + half + 1, column - half : column + half + 1]


def _colours(patch_CHW: Tensor) -> Tensor:
    return patch_CHW.float() / 127.5 - 1

"""Does a model remember a place? Camera paths that leave a place and come back to it, so that the truth is known.

The place lies in chunk 5, more than one view away from the first chunk, which every windowed cache keeps. The way back
is either a hard cut (the context can then be true without giving the place away) or a walk out and back, all generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LEAD_LATENT_FRAMES = 15
PLACE_LATENT_FRAMES = 3
STRIDE = 4
_LEAD_PACE = 3  # pixels a video frame: 180 pixels in all, a view is 128
_REACH = 330.0  # how far the camera goes away from the place, at most
_MAX_PACE = 3.5
_FAST_PACE = 4.0
_NO_OVERLAP = 200.0  # at this distance a view shares no pixel with the place, whatever the direction
_SHOT_FRAMES = 48

Away = Literal["straight", "fast", "cuts"]
"""How the camera spends its time away: on one way, to and fro at 4 pixels a frame, or in shots of 3 seconds."""


@dataclass(frozen=True)
class RevisitPath:
    """Camera of one test.

    Attributes:
        positions_F2: Whole pixels of the world, one a video frame.
        distance: Latent frames between leaving the place and returning to it.
    """

    positions_F2: NDArray[np.float32]
    distance: int

    @property
    def num_latent_frames(self) -> int:
        return len(self.positions_F2) // STRIDE

    @property
    def first_free_latent_frame(self) -> int:
        """From here on a rollout generates; before it the views are given."""
        return LEAD_LATENT_FRAMES + PLACE_LATENT_FRAMES


def plan_revisit(
    distance: int,
    rng: np.random.Generator,
    world_size: int,
    view: int,
    *,
    cut: bool,
    shift: int = 0,
    away: Away = "straight",
) -> RevisitPath:
    """A path that leads to a place, stays away for ``distance`` latent frames and shows it again.

    Args:
        distance: Latent frames away; divides by the chunk of 3.
        rng: Draws direction, place and shift.
        world_size, view: Pixels.
        cut: Go away one way and cut back, instead of walking out and back.
        shift: The return is displaced by up to so many pixels on each axis.
        away: What happens in between, for a way that ends with a cut.
    """
    angle = rng.uniform(0, 2 * np.pi)
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    centre = (world_size - view) / 2 + rng.uniform(-30, 30, size=2)
    lead = centre - (np.arange(LEAD_LATENT_FRAMES * STRIDE, 0, -1) * _LEAD_PACE)[:, None] * along
    place = centre + np.arange(PLACE_LATENT_FRAMES * STRIDE)[:, None] * across
    num_away = distance * STRIDE
    if away == "fast":
        walk = place[-1] + _to_and_fro(num_away)[:, None] * across
    elif away == "cuts":
        walk = _shots(centre, num_away, rng)
    else:
        steps = np.arange(1, num_away + 1)
        farthest = num_away if cut else num_away / 2
        pace = min(_MAX_PACE, _REACH / farthest)
        walk = place[-1] + ((steps if cut else np.minimum(steps, num_away + 1 - steps)) * pace)[:, None] * across
    back = place[::-1] + rng.integers(-shift, shift + 1, size=2)
    return RevisitPath(np.rint(np.concatenate([lead, place, walk, back])).astype(np.float32), distance)


def seen_before(positions_F2: NDArray[np.float32], returned: int, view: int) -> NDArray[np.bool_]:
    """Which pixels of the last views show land that an earlier view of the path has shown.

    A return that is displaced shows a strip that may never have been in view: no memory can know it.

    Args:
        positions_F2: Whole pixels, one corner a video frame.
        returned: So many frames at the end are the return.
        view: Side of a view in pixels.
    Returns:
        [returned, view, view].
    """
    corners = positions_F2.astype(np.int64)
    earlier = np.unique(corners[:-returned], axis=0)
    seen = np.zeros((returned, view, view), dtype=np.bool_)
    for mask, corner in zip(seen, corners[-returned:], strict=True):
        for x, y in (earlier - corner)[np.abs(earlier - corner).max(1) < view].tolist():
            mask[max(0, y) : view + min(0, y), max(0, x) : view + min(0, x)] = True
    return seen


def _to_and_fro(num_frames: int) -> NDArray[np.float64]:
    """How far away the camera is: straight out, then between two marks of which none shows the place."""
    way = np.arange(1, num_frames + 1) * _FAST_PACE
    span = _REACH - _NO_OVERLAP
    beyond = np.maximum(0.0, way - _REACH)
    return np.asarray(np.where(way <= _REACH, way, _NO_OVERLAP + np.abs(beyond % (2 * span) - span)))


def _shots(centre_2: NDArray[np.float64], num_frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Slow pans with hard cuts between them, none of which shows the place."""
    frames = np.arange(num_frames)
    shot, within = frames // _SHOT_FRAMES, frames % _SHOT_FRAMES
    num_shots = int(shot[-1]) + 1
    where, pan = rng.uniform(0, 2 * np.pi, size=(2, num_shots))
    far = rng.uniform(_NO_OVERLAP + _SHOT_FRAMES, _REACH, size=num_shots)
    begin = centre_2 + far[:, None] * np.stack([np.cos(where), np.sin(where)], 1)
    return np.asarray(begin[shot] + within[:, None] * np.stack([np.cos(pan), np.sin(pan)], 1)[shot])

"""Does a model remember a place? Camera paths that leave a place and come back to it, so that the truth is known.

The place lies in chunk 5, more than one view away from the first chunk, which every windowed cache keeps. The way back
is either a hard cut (the context can then be true without giving the place away) or a walk out and back, all generated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAD_LATENT_FRAMES = 15
PLACE_LATENT_FRAMES = 3
STRIDE = 4
_LEAD_PACE = 3  # pixels a video frame: 180 pixels in all, a view is 128
_REACH = 330.0  # how far the camera goes away from the place, at most
_MAX_PACE = 3.5


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
    distance: int, rng: np.random.Generator, world_size: int, view: int, *, cut: bool, shift: int = 0
) -> RevisitPath:
    """A path that leads to a place, stays away for ``distance`` latent frames and shows it again.

    Args:
        distance: Latent frames away; divides by the chunk of 3.
        rng: Draws direction, place and shift.
        world_size, view: Pixels.
        cut: Go away one way and cut back, instead of walking out and back.
        shift: The return is displaced by up to so many pixels on each axis.
    """
    angle = rng.uniform(0, 2 * np.pi)
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    centre = (world_size - view) / 2 + rng.uniform(-30, 30, size=2)
    lead = centre - (np.arange(LEAD_LATENT_FRAMES * STRIDE, 0, -1) * _LEAD_PACE)[:, None] * along
    place = centre + np.arange(PLACE_LATENT_FRAMES * STRIDE)[:, None] * across
    steps = np.arange(1, distance * STRIDE + 1)
    farthest = len(steps) if cut else len(steps) / 2
    pace = min(_MAX_PACE, _REACH / farthest)
    away = steps if cut else np.minimum(steps, len(steps) + 1 - steps)
    walk = place[-1] + (away * pace)[:, None] * across
    back = place[::-1] + rng.integers(-shift, shift + 1, size=2)
    return RevisitPath(np.rint(np.concatenate([lead, place, walk, back])).astype(np.float32), distance)

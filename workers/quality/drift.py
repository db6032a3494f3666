"""Does a long rollout stay what it was? Sharpness, contrast and colour of stretches of it, against an early stretch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from workers.quality.reference import sharpness

BANDS = {"sharpness": (0.4, 1.8), "contrast": (0.6, 1.8), "brightness": (-0.45, 0.5), "colour": (0.0, 0.93)}
"""What is still stable: ratios for the first two, differences (pictures in [-1, 1]) for the others.

Land differs from place to place: these are the limits within which 95% of 120 true walks of 3000 frames stay.
"""


@dataclass(frozen=True)
class Look:
    """Statistics of a stretch of video: mean gradient, spread within pictures, mean, and mean of each channel."""

    sharpness: float
    contrast: float
    brightness: float
    colour: tuple[float, float, float]


def measure_look(frames_FCHW: Tensor) -> Look:
    """Of RGB frames in [-1, 1]."""
    frames = frames_FCHW.float().clamp(-1, 1)
    red, green, blue = frames.mean((0, 2, 3)).tolist()
    contrast = frames.std((2, 3)).mean().item()
    return Look(sharpness(frames).mean().item(), contrast, frames.mean().item(), (red, green, blue))


def compare_looks(early: Look, late: Look) -> dict[str, float]:
    """How the late stretch differs, in the terms of `BANDS`; colour is the greatest difference of a channel's mean."""
    early_colour, late_colour = torch.tensor(early.colour), torch.tensor(late.colour)
    return {
        "sharpness": late.sharpness / max(early.sharpness, 1e-6),
        "contrast": late.contrast / max(early.contrast, 1e-6),
        "brightness": late.brightness - early.brightness,
        "colour": (late_colour - early_colour).abs().max().item(),
    }


def is_stable(change: dict[str, float]) -> bool:
    """Whether every change lies in its band."""
    return all(low <= change[name] <= high for name, (low, high) in BANDS.items())


def as_record(look: Look) -> dict[str, object]:
    """For JSON."""
    return asdict(look)

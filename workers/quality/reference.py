"""How near pictures are to a reference: PSNR and SSIM, and how sharp they are. Pictures are RGB in [-1, 1]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_RANGE = 2.0
_SSIM_WINDOW = 7
_MAX_PSNR_DB = 100.0


def psnr_db(pictures: Tensor, reference: Tensor, counts: Tensor | None = None) -> Tensor:
    """PSNR of each first index, over all its frames at once; equal pictures give 100.

    Args:
        pictures, reference: Of one shape.
        counts: Which pixels are judged, bool, broadcast over the others; all of them if not given.
    """
    error = (pictures.float().clamp(-1, 1) - reference.float()).square()
    if counts is not None:
        weight = counts.expand(error.shape).float()
        error = error * weight / weight.flatten(1).mean(1).view(-1, *[1] * (error.ndim - 1)).clamp(min=1e-9)
    error = error.flatten(1).mean(1)
    return (-10 * (error / _RANGE**2).log10()).clamp(max=_MAX_PSNR_DB)


def ssim(pictures_NCHW: Tensor, reference_NCHW: Tensor) -> Tensor:
    """Mean structural similarity of each picture, on grey values, with a 7x7 box window (Wang et al., 2004)."""
    x, y = (_grey(p.float().clamp(-1, 1)) for p in (pictures_NCHW, reference_NCHW))
    mean_x, mean_y = _box(x), _box(y)
    scale = _SSIM_WINDOW**2 / (_SSIM_WINDOW**2 - 1)
    var_x = (_box(x * x) - mean_x**2) * scale
    var_y = (_box(y * y) - mean_y**2) * scale
    both = (_box(x * y) - mean_x * mean_y) * scale
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    value = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    value = value / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return value.flatten(1).mean(1)


def sharpness(pictures: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, for each first index; edges raise it, blur lowers it."""
    p = pictures.float().clamp(-1, 1)
    across = (p[..., 1:] - p[..., :-1]).abs().flatten(1).mean(1)
    down = (p[..., 1:, :] - p[..., :-1, :]).abs().flatten(1).mean(1)
    return (across + down) / 2


def confidence_95(values: Tensor) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (normal approximation)."""
    spread = values.float().std().item() if len(values) > 1 else math.nan
    return values.float().mean().item(), 1.96 * spread / math.sqrt(len(values))


def _grey(pictures_NCHW: Tensor) -> Tensor:
    weights = pictures_NCHW.new_tensor((0.299, 0.587, 0.114))
    return torch.einsum("nchw,c->nhw", pictures_NCHW, weights)[:, None]


def _box(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, _SSIM_WINDOW, stride=1)

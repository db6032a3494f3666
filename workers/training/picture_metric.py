"""What stage 3 minimises: the error of pictures as an error of latents costs it, on a scale of decibels."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.model.vae import VideoVAE


def picture_metric(vae: VideoVAE, latents_BTCHW: Tensor, generator: torch.Generator, probes: int = 4) -> Tensor:
    """What an error of a latent cell costs in the picture: e' G e is its squared error, as a mean over its pixels.

    The mean of J'J over cells, J being the decoder's derivative: random pixel errors sent backwards have it as their
    covariance.

    Returns:
        [channels, channels], float32.
    """
    channels, device = latents_BTCHW.shape[2], latents_BTCHW.device
    total = torch.zeros(channels, channels, device=device)
    for _ in range(probes):
        latents = latents_BTCHW.detach().clone().requires_grad_()
        frames = vae.decode(latents)
        probe = torch.randn(frames.shape, device=device, generator=generator)
        grads = torch.autograd.grad(frames, latents, probe)[0].movedim(2, -1).flatten(0, -2)
        total += grads.mT @ grads / len(grads)
    pixels = frames[0].numel() / (latents_BTCHW[0].numel() / channels)
    return total / probes / pixels


def log_mean(error: Tensor, counts: Tensor, floor: float) -> Tensor:
    """Logarithm of each clip's mean error where it counts, averaged: a decibel is worth the same everywhere."""
    share_B = counts.flatten(1).float().mean(1)
    error_B = (error * counts).flatten(1).mean(1) / (share_B + 1e-4)
    return ((error_B + floor).log() * share_B).sum() / (share_B.sum() + 1e-4)

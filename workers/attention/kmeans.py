"""k-means of many heads at once: exact distances, every step a matrix product, so the same on every run.

Reference for the method: Lloyd's algorithm. Tokens are taken in slices, so that the room needed does not grow with
their number times that of the clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SLICE_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
"""Distances held at once: 64 MB in float32, and fewer launches where a launch is dear."""


class Clusters(NamedTuple):
    """Tokens by cluster; C of them in every head."""

    label_BNK: Tensor
    """int64."""
    centroid_BNCD: Tensor
    """Of the last update; labels are the nearest of these."""


def first_centroids(x_BKND: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Different tokens drawn at random, the same in every head: [B, N, C, D]."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randperm(x_BKND.shape[1], generator=generator)[:num_clusters]
    return x_BKND[:, pick.to(x_BKND.device)].transpose(1, 2)


def cluster(x_BKND: Tensor, centroid_BNCD: Tensor, num_iterations: int, weight_BNK: Tensor | None = None) -> Clusters:
    """Lloyd's algorithm from the centroids given; a cluster that loses all its tokens stays where it is.

    Args:
        x_BKND: Tokens.
        centroid_BNCD: Where to start.
        num_iterations: Updates of the centroids; 0 only labels.
        weight_BNK: How much each token pulls; None means 1.
    """
    x_BNKD = x_BKND.transpose(1, 2).to(centroid_BNCD.dtype)
    for _ in range(num_iterations):
        centroid_BNCD = _update(x_BNKD, centroid_BNCD, weight_BNK)
    labels = [_nearest(part, centroid_BNCD) for part in x_BNKD.split(_slice_tokens(x_BNKD, centroid_BNCD), 2)]
    return Clusters(torch.cat(labels, -1), centroid_BNCD)


def sum_by_cluster(weight_BNK: Tensor, label_BNK: Tensor, num_clusters: int) -> Tensor:
    """Sum of a number per token over each cluster, [B, N, C]; sorted first, so that the order of adding is fixed."""
    order = torch.argsort(label_BNK, dim=-1, stable=True)
    running = F.pad(weight_BNK.gather(-1, order).double().cumsum(-1), (1, 0))
    bounds = torch.arange(num_clusters + 1, device=label_BNK.device).expand(*label_BNK.shape[:2], -1).contiguous()
    edges = torch.searchsorted(label_BNK.gather(-1, order), bounds)
    return running.gather(-1, edges).diff(dim=-1).to(weight_BNK.dtype)


def _update(x_BNKD: Tensor, centroid_BNCD: Tensor, weight_BNK: Tensor | None) -> Tensor:
    total = torch.zeros_like(centroid_BNCD)
    count = centroid_BNCD.new_zeros(*centroid_BNCD.shape[:3])
    step = _slice_tokens(x_BNKD, centroid_BNCD)
    cluster_C = torch.arange(centroid_BNCD.shape[2], device=x_BNKD.device)
    for start in range(0, x_BNKD.shape[2], step):
        part = x_BNKD[:, :, start : start + step]
        member = (_nearest(part, centroid_BNCD)[..., None] == cluster_C).to(part.dtype)
        if weight_BNK is not None:
            member = member * weight_BNK[:, :, start : start + step, None].to(part.dtype)
        total = total + member.transpose(-1, -2) @ part
        count = count + member.sum(-2)
    return torch.where(count[..., None] > 0, total / count.clamp(min=1e-30)[..., None], centroid_BNCD)


def _nearest(x_BNKD: Tensor, centroid_BNCD: Tensor) -> Tensor:
    """Index of the nearest centroid: |x - c|^2 without the |x|^2 that all have in common."""
    score = x_BNKD @ centroid_BNCD.transpose(-1, -2) - centroid_BNCD.square().sum(-1)[:, :, None] / 2
    return score.argmax(-1)


def _slice_tokens(x_BNKD: Tensor, centroid_BNCD: Tensor) -> int:
    elements = _SLICE_ELEMENTS.get(x_BNKD.device.type, _SLICE_ELEMENTS["cpu"])
    return max(1, elements // max(1, x_BNKD.shape[0] * x_BNKD.shape[1] * centroid_BNCD.shape[2]))

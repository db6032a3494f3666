"""SparseVideoGen 2: tokens are put in order by meaning, and a query cluster sees the key clusters that matter to it.

Source: Yang et al., "Sparse VideoGen2" (arXiv 2505.18875), section 4.1 (semantic permutation by k-means of queries and
of keys, per head), 4.2 (top-p over the mass that centroids and cluster sizes predict) and 4.3 (centroid cache). A
smallest share of the key clusters is always seen, as in the published settings (top-p 0.9, at least 0.1).

Adapted to chunk-causal models. The cached keys do not change within a chunk, so their clusters are found once for it
and hold for all its steps, which is more than a warm start; queries start from their centroids of the step before.
Nothing is carried from chunk to chunk: a resumed rollout must equal an unbroken one, and a policy is no part of its
state. That costs nothing here: on the bundled model (48 latent frames) 2, 10 and 50 updates from random tokens give a
density of 0.806, 0.803 and 0.803. The numbers of clusters grow with the tokens (the paper fixes them for videos of one
length). The mass on sink, newest and own keys, which every query sees, counts as found. Kernels see tiles of one size,
so a key cluster is seen with the rest of the tiles that it reaches into: what is seen is what the tiles say, never less
than was chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workers.attention.history import DenseRegion, cut_tiles, plan_history
from workers.attention.kmeans import Clusters, cluster, first_centroids, sum_by_cluster
from workers.contracts import AttentionPlan, KeyValues, Moment, Tiles
from workers.rows import wide


@dataclass(frozen=True)
class Svg2Settings:
    """How fine the clusters are and how much mass is asked for."""

    dense: DenseRegion
    query_tile: int
    key_tile: int
    queries_per_cluster: int = 16
    keys_per_cluster: int = 64
    max_key_clusters: int = 1000
    top_p: float = 0.9
    """Share of the predicted attention mass that is seen, in (0, 1]; 1 sees everything."""
    min_share: float = 0.1
    """Share of the key clusters that is seen whatever their mass."""
    first_iterations: int = 2
    """Updates of centroids that start from random tokens."""
    later_iterations: int = 2
    """Updates of query centroids in the further steps of a chunk."""


@dataclass(frozen=True, eq=False)
class _KeyClusters:
    """Clusters of the history of one layer."""

    source: KeyValues
    clusters: Clusters
    log_size_BNC: Tensor
    """Log of the keys that a cluster stands for; -inf where it is empty."""
    order_BNK: Tensor
    is_in_tile_BNJC: Tensor
    """Float, 1 where a key tile holds a key of the cluster."""


class Svg2Attention:
    """Clusters live as long as the chunk."""

    plans_after_rope: Literal[True] = True

    def __init__(self, settings: Svg2Settings) -> None:
        self._settings = settings
        self._keys: dict[int, _KeyClusters] = {}
        self._query_centroids: dict[tuple[int, int], Tensor] = {}

    def begin_chunk(self, position_Q3: Tensor) -> None:
        self._keys.clear()
        self._query_centroids.clear()

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        settings = self._settings
        if cached is None:
            return plan_history(cached, own, None, None)
        span = settings.dense.history(cached.num_tokens)
        if span[0] == span[1]:
            return plan_history(cached, own, span, None)
        keys = self._cluster_keys(layer_index, cached, span)
        queries = self._cluster_queries(layer_index, moment, q_BQND)
        always = (cached.narrow(0, span[0]), cached.narrow(span[1], cached.num_tokens), own)
        chosen_BNAC = choose_clusters(
            queries.centroid_BNCD, keys, _log_mass_of(queries.centroid_BNCD, always), settings
        )
        query_order = torch.argsort(queries.label_BNK, dim=-1, stable=True)
        rows = _is_in_tile(queries.label_BNK, query_order, queries.centroid_BNCD.shape[2], settings.query_tile)
        visible = rows @ chosen_BNAC.float() @ keys.is_in_tile_BNJC.transpose(-1, -2) > 0
        tiles = Tiles(visible, settings.query_tile, settings.key_tile, query_order, keys.order_BNK)
        return plan_history(cached, own, span, tiles)

    def _cluster_keys(self, layer_index: int, cached: KeyValues, span: tuple[int, int]) -> _KeyClusters:
        held = self._keys.get(layer_index)
        if held is None or held.source is not cached:
            held = self._keys[layer_index] = _cluster_history(layer_index, cached, span, self._settings)
        return held

    def _cluster_queries(self, layer_index: int, moment: Moment, q_BQND: Tensor) -> Clusters:
        settings, key = self._settings, (layer_index, moment.branch)
        held = self._query_centroids.get(key)
        if held is None:
            num = -(-q_BQND.shape[1] // settings.queries_per_cluster)
            clusters = cluster(q_BQND, first_centroids(wide(q_BQND), num, layer_index), settings.first_iterations)
        else:
            clusters = cluster(q_BQND, held, settings.later_iterations)
        self._query_centroids[key] = clusters.centroid_BNCD
        return clusters


def choose_clusters(centroid_BNAD: Tensor, keys: _KeyClusters, log_known_BNA: Tensor, settings: Svg2Settings) -> Tensor:
    """Key clusters that each query cluster sees, bool [B, N, A, C].

    Args:
        centroid_BNAD: Of the queries, after RoPE.
        log_known_BNA: Log of the softmax mass on keys that are seen anyway.
    """
    if settings.top_p >= 1.0:
        return torch.ones_like(keys.log_size_BNC, dtype=torch.bool)[:, :, None].expand(
            -1, -1, centroid_BNAD.shape[2], -1
        )
    centroids = keys.clusters.centroid_BNCD
    logit = centroid_BNAD @ centroids.transpose(-1, -2) / math.sqrt(centroids.shape[-1])
    logit = torch.cat((log_known_BNA[..., None], logit + keys.log_size_BNC[:, :, None]), -1)
    known, mass = logit.softmax(-1).split((1, logit.shape[-1] - 1), -1)
    mass, order = mass.sort(dim=-1, descending=True, stable=True)
    found_before = known + mass.cumsum(-1) - mass
    rank = torch.arange(mass.shape[-1], device=mass.device)
    is_seen = (found_before < settings.top_p) | (rank < math.ceil(settings.min_share * mass.shape[-1]))
    return torch.zeros_like(is_seen).scatter(-1, order, is_seen)


def _cluster_history(
    layer_index: int, cached: KeyValues, span: tuple[int, int], settings: Svg2Settings
) -> _KeyClusters:
    history = cached.narrow(*span)
    num = min(settings.max_key_clusters, -(-history.num_tokens // settings.keys_per_cluster))
    start = first_centroids(wide(history.k_BKND), num, layer_index)
    mass = history.log_mass_BNK
    weight = None if mass is None else mass.isfinite().to(start.dtype)
    clusters = cluster(history.k_BKND, start, settings.first_iterations, weight)
    size = torch.ones_like(clusters.label_BNK, dtype=start.dtype) if mass is None else mass.to(start.dtype).exp()
    order = torch.argsort(clusters.label_BNK, dim=-1, stable=True)
    log_size = sum_by_cluster(size, clusters.label_BNK, num).clamp(min=0.0).log()
    is_in_tile = _is_in_tile(clusters.label_BNK, order, num, settings.key_tile)
    return _KeyClusters(cached, clusters, log_size, order, is_in_tile)


def _log_mass_of(centroid_BNAD: Tensor, always: tuple[KeyValues, ...]) -> Tensor:
    """Log-sum-exp of the logits between query centroids and keys, [B, N, A]."""
    logits = []
    for keys in always:
        logit = torch.einsum("bnad,bknd->bnak", centroid_BNAD, keys.k_BKND.to(centroid_BNAD.dtype))
        logit = logit / math.sqrt(centroid_BNAD.shape[-1])
        if keys.log_mass_BNK is not None:
            logit = logit + keys.log_mass_BNK[:, :, None].to(logit.dtype)
        logits.append(logit)
    return torch.cat(logits, -1).logsumexp(-1)


def _is_in_tile(label_BNK: Tensor, order_BNK: Tensor, num_clusters: int, tile: int) -> Tensor:
    """Float [B, N, tiles, C]: 1 where a tile of the ordered tokens holds one of the cluster."""
    label = cut_tiles(label_BNK.gather(-1, order_BNK).float(), tile, -1.0).long()
    held = torch.zeros(*label.shape[:3], num_clusters + 1, device=label.device)
    return held.scatter(-1, label.remainder(num_clusters + 1), 1.0)[..., :num_clusters]

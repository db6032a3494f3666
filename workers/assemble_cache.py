"""Configuration -> temporal cache: a number of latent frames becomes bytes, bytes become key groups."""

from __future__ import annotations

import torch

from workers.cache.audit import AuditSample
from workers.cache.budget import Geometry, count_groups
from workers.cache.temporal_merge import MergeSettings, TemporalCache
from workers.config import TemporalCacheConfig
from workers.errors import ConfigUnsupported
from workers.model.backbones import Backbone
from workers.search.select import make_search

AUDIT_TOKENS = 256
"""Absorbed keys per layer that a guard judges by: their error is below that of the few queries looked at."""


def temporal_settings(
    config: TemporalCacheConfig, backbone: Backbone, dtype: torch.dtype, frame_tokens: int, *, is_guarded: bool
) -> MergeSettings:
    """What a cache of this configuration keeps.

    Args:
        config: Budget and rules.
        backbone: Sizes.
        dtype: Of the uncompressed keys.
        frame_tokens: Tokens of a latent frame.
        is_guarded: Keep an audit sample; its bytes are part of the budget.
    Raises:
        ConfigUnsupported: The budget does not even hold the uncompressed latent frames and one more.
    """
    chunk = backbone.chunk_latent_frames
    sizes = backbone.num_layers, backbone.num_heads, backbone.head_dim
    geometry = Geometry(*sizes, frame_tokens, chunk * frame_tokens)
    budget = geometry.raw_bytes(config.budget_latent_frames * frame_tokens, torch.bfloat16)
    raw_tokens = (config.sink_latent_frames + config.recent_latent_frames) * frame_tokens
    audit = AUDIT_TOKENS if is_guarded else 0
    per_audit = backbone.num_layers * AuditSample.bytes_per_key(backbone.num_heads, backbone.dim, dtype)
    try:
        num_groups = count_groups(budget - audit * per_audit, raw_tokens, geometry, config.storage, dtype)
    except ValueError as error:
        raise ConfigUnsupported(f"cache.budget_latent_frames: {config.budget_latent_frames}: {error}") from error
    return MergeSettings(
        sink_tokens=config.sink_latent_frames * frame_tokens,
        recent_tokens=config.recent_latent_frames * frame_tokens,
        num_groups=num_groups,
        min_cosine=config.min_cosine,
        storage=config.storage,
        audit_tokens=audit,
    )


def make_temporal_cache(
    config: TemporalCacheConfig, settings: MergeSettings, num_layers: int, dtype: torch.dtype | None
) -> TemporalCache:
    """A fresh cache.

    Raises:
        KernelUnavailable: The search back end's package is not installed.
    """
    return TemporalCache(num_layers, settings, make_search(config.search).top1, dtype)

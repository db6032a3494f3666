"""Configuration -> attention policy, step reuse, quality guard: names become classes, latent frames become tokens."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from workers.attention.ann_cross import AnnPromptAttention
from workers.attention.ann_self import AnnSelfAttention, AnnSettings
from workers.attention.calibrate import read_calibration
from workers.attention.dense import DenseAttention
from workers.attention.estimate import RecallProbe
from workers.attention.gate import Gate, GatedAttention, GatedPromptAttention
from workers.attention.history import DenseRegion
from workers.attention.radial import RadialAttention, RadialSettings
from workers.attention.streaming import StreamingAttention
from workers.attention.svg import SvgAttention, SvgSettings
from workers.attention.svg2 import Svg2Attention, Svg2Settings
from workers.config import (
    AnnSelfAttentionConfig,
    AttentionConfig,
    DenseAttentionConfig,
    DensePromptConfig,
    GuardConfig,
    PatternConfig,
    PositionsConfig,
    PromptAttentionConfig,
    RadialAttentionConfig,
    StreamingAttentionConfig,
    Svg2AttentionConfig,
    SvgAttentionConfig,
)
from workers.config_reuse import NoReuseConfig, ReuseConfig, TeaCacheConfig
from workers.config_tiles import TileAttentionConfig
from workers.contracts import AttentionPolicy, AttentionProbe, Kernel, KVCache, PromptAttention, StepReuse, Tightens
from workers.errors import ConfigUnsupported
from workers.model.attend import Reindex, RelativeTime, RolloutAttention
from workers.model.backbones import Backbone
from workers.model.dit import attend_prompt_dense
from workers.model_limits import unknown_layer
from workers.quality.guard import RecallGuard
from workers.reuse.flowcache import FlowReuse
from workers.reuse.teacache import TeaCache, TeaCacheSettings
from workers.search.select import make_search

_QUERIES_TOGETHER = 192
"""Queries of small pictures that share their choice of keys: less is gathered, and a CPU reads what is in its cache for
three times as many queries."""
_CLEAN_SHARE = 1 / 3
_LARGEST_TILE = 128  # what tile-sparse kernels are made for


def make_policy(config: AttentionConfig, frame_tokens: int, num_layers: int) -> AttentionPolicy:
    """The policy of one take: what it learns of one must not reach another.

    Args:
        config: Kind and settings; a calibration file is `resolve_calibration`'s to read.
        frame_tokens: Tokens of a latent frame.
        num_layers: Layers of the model.
    Raises:
        ConfigUnsupported: A layer is named that the model does not have.
        KernelUnavailable: The search back end's package is not installed.
    """
    if isinstance(
        config, DenseAttentionConfig | TileAttentionConfig
    ):  # of tiles: where no table is left to choose from
        return DenseAttention()
    if isinstance(config, StreamingAttentionConfig):
        tokens = config.sink_latent_frames * frame_tokens, config.recent_latent_frames * frame_tokens
        return StreamingAttention(DenseRegion(*tokens))
    sparse_layers: Collection[int] | None
    if isinstance(config, PatternConfig):
        policy, sparse_layers = _make_baseline(config, frame_tokens), range(config.dense_layers, num_layers)
    else:
        policy, sparse_layers = _make_ann(config, frame_tokens), _check_layers(config, num_layers)
    return GatedAttention(policy, dense_step_share=config.dense_step_share, sparse_layers=sparse_layers)


def make_prompt_attention(config: PromptAttentionConfig) -> PromptAttention:
    """The cross-attention of one take.

    Raises:
        KernelUnavailable: The search back end's package is not installed.
    """
    if isinstance(config, DensePromptConfig):
        return attend_prompt_dense
    chosen = AnnPromptAttention(make_search(config.search), config.num_buckets)
    if config.dense_step_share == 0.0 and config.layers is None:
        return chosen
    return GatedPromptAttention(chosen, attend_prompt_dense, Gate(config.dense_step_share, config.layers))


def make_reindex(config: PositionsConfig) -> Reindex | None:
    """Times of cached keys; None keeps them as they were made."""
    if config.time == "absolute":
        return None
    if config.time == "relative":
        return RelativeTime()
    return lambda time, newest: newest - (newest - time).clamp(max=config.cap_latent_frames)


def make_reuse(config: ReuseConfig) -> StepReuse | None:
    """The reuse of one take; it holds the chunk in hand."""
    if isinstance(config, NoReuseConfig):
        return None
    if isinstance(config, TeaCacheConfig):
        return TeaCache(TeaCacheSettings(config.threshold, config.coefficients))
    return FlowReuse(TeaCacheSettings(config.threshold, first_steps=config.warmup_steps))


def make_attention(
    guard: GuardConfig,
    backbone: Backbone,
    cache: KVCache,
    policy: AttentionPolicy,
    kernel: Kernel,
    reindex: Reindex | None = None,
    *,
    probes: tuple[AttentionProbe, ...] = (),
) -> tuple[RolloutAttention, RecallGuard | None]:
    """Self-attention of one take, and its quality guard if one is wanted; `probes` look on besides it."""
    if not guard.enabled:
        return RolloutAttention(backbone, cache, policy, kernel, reindex=reindex, probes=probes), None
    probe = RecallProbe(cache, guard.num_queries)
    attention = RolloutAttention(backbone, cache, policy, kernel, reindex=reindex, probes=(*probes, probe))
    can_tighten = [part for part in (policy, cache) if isinstance(part, Tightens)]
    return attention, RecallGuard(guard, probe, attention, DenseAttention(), can_tighten)


def _make_baseline(config: PatternConfig, frame_tokens: int) -> AttentionPolicy:
    dense = DenseRegion(config.sink_latent_frames * frame_tokens, config.recent_latent_frames * frame_tokens)
    tile = config.tile or max(1, min(_LARGEST_TILE, frame_tokens // 4))
    if isinstance(config, RadialAttentionConfig):
        return RadialAttention(RadialSettings(dense, tile, config.decay))
    if isinstance(config, SvgAttentionConfig):
        return SvgAttention(SvgSettings(dense, tile, config.density, config.num_samples))
    assert isinstance(config, Svg2AttentionConfig)
    settings = Svg2Settings(
        dense,
        tile,
        tile,
        config.queries_per_cluster,
        config.keys_per_cluster,
        config.max_key_clusters,
        config.top_p,
        config.min_share,
    )
    return Svg2Attention(settings)


def _make_ann(config: AnnSelfAttentionConfig, frame_tokens: int) -> AttentionPolicy:
    return AnnSelfAttention(ann_settings(config, frame_tokens), make_search(config.search), None)


def ann_settings(config: AnnSelfAttentionConfig, frame_tokens: int) -> AnnSettings:
    """Latent frames become tokens; small pictures get tiles, and a way to choose them, of their own.

    Only where a fixed number is seen: with a recall target, queries of three latent frames that choose together lose
    what a slow camera comes back to (0.7 dB of one world, where 64 by 64 lose 0.3 with as many pairs).
    """
    sees_some = config.seen_latent_frames is not None and config.target_recall is None
    is_small = frame_tokens <= _QUERIES_TOGETHER // 2
    small = sees_some and is_small
    tile = config.tile or (max(8, frame_tokens // 2) if small else min(_LARGEST_TILE, frame_tokens))
    query_tile = config.query_tile or (_QUERIES_TOGETHER // frame_tokens * frame_tokens if small else tile)
    across_layers = config.seen_across == "model" and sees_some
    # Where later calls take what the first one saw, there is no second choice for layers to compete in.
    at_once = across_layers and (small or config.history_at is not None)
    looks_once = config.target_recall is not None and config.history_at is not None
    return AnnSettings(
        sink_tokens=config.sink_latent_frames * frame_tokens,
        recent_tokens=config.recent_latent_frames * frame_tokens,
        density=config.density,
        seen_keys=None if config.seen_latent_frames is None else config.seen_latent_frames * frame_tokens,
        across_layers=across_layers,
        at_once=at_once,
        clean_share=_clean_share(config, fewer=is_small and (at_once or looks_once)),
        target_recall=config.target_recall,
        query_tile=query_tile,
        key_tile=tile,
        # Few keys for many queries: more of the keys are looked at, by fewer of the queries, for the same work.
        sample_share=1 / 4 if query_tile > 2 * tile else 1 / 8,
        query_share=1 / 4 if query_tile > 2 * tile else 1 / 2,
        order=config.order,
        num_buckets=config.num_buckets,
        every_step=config.target_recall is not None,  # each noise level gets the density that it needs
        history_at=config.history_at,
    )


def _clean_share(config: AnnSelfAttentionConfig, *, fewer: bool) -> float:
    """Of what a step sees, unless configured all or `fewer`; a share of all keys is the same in every call."""
    if config.seen_latent_frames is None and config.target_recall is None:
        return 1.0
    return config.clean_pass_share or (_CLEAN_SHARE if fewer else 1.0)


def _check_layers(config: AnnSelfAttentionConfig, num_layers: int) -> tuple[int, ...] | None:
    unknown = unknown_layer("attention", config.layers, num_layers)
    if unknown:
        raise ConfigUnsupported(unknown)
    return config.layers


def resolve_calibration(config: AttentionConfig, backbone: Backbone, revision: str) -> AttentionConfig:
    """The layers of a calibration file in place of its name.

    Raises:
        ConfigUnsupported: The file cannot be read, or is of another model or of other weights.
    """
    if not isinstance(config, AnnSelfAttentionConfig) or config.calibration is None:
        return config
    path, num_layers = Path(config.calibration), backbone.num_layers
    file = read_calibration(path, backbone=backbone.name, revision=revision, num_layers=num_layers)
    return config.model_copy(update={"layers": file.sparse_layers, "calibration": None})

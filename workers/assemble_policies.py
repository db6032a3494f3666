"""Configuration -> attention policy, step reuse, quality guard: names become classes, latent frames become tokens."""

from __future__ import annotations

from workers.attention.dense import DenseAttention
from workers.attention.estimate import RecallProbe
from workers.attention.gate import GatedAttention
from workers.attention.history import DenseRegion
from workers.attention.radial import RadialAttention, RadialSettings
from workers.attention.streaming import StreamingAttention
from workers.attention.svg import SvgAttention, SvgSettings
from workers.attention.svg2 import Svg2Attention, Svg2Settings
from workers.config import (
    AttentionConfig,
    DenseAttentionConfig,
    GuardConfig,
    NoReuseConfig,
    PatternConfig,
    RadialAttentionConfig,
    ReuseConfig,
    StreamingAttentionConfig,
    Svg2AttentionConfig,
    SvgAttentionConfig,
    TeaCacheConfig,
)
from workers.contracts import AttentionPolicy, Kernel, KVCache, StepReuse, Tightens
from workers.errors import ConfigUnsupported
from workers.model.attend import Reindex, RolloutAttention
from workers.model.backbones import Backbone
from workers.quality.guard import RecallGuard
from workers.reuse.flowcache import FlowReuse
from workers.reuse.teacache import TeaCache, TeaCacheSettings

_LARGEST_TILE = 128  # what tile-sparse kernels are made for


def make_policy(config: AttentionConfig, frame_tokens: int, num_layers: int) -> AttentionPolicy:
    """The policy of one take.

    Args:
        config: Kind and settings.
        frame_tokens: Tokens of a latent frame.
        num_layers: Layers of the model.
    Raises:
        ConfigUnsupported: This kind is known by its configuration only.
    """
    if isinstance(config, DenseAttentionConfig):
        return DenseAttention()
    if isinstance(config, StreamingAttentionConfig):
        tokens = config.sink_latent_frames * frame_tokens, config.recent_latent_frames * frame_tokens
        return StreamingAttention(DenseRegion(*tokens))
    if isinstance(config, PatternConfig):
        sparse_layers = range(config.dense_layers, num_layers)
        policy = _make_baseline(config, frame_tokens)
        return GatedAttention(policy, dense_step_share=config.dense_step_share, sparse_layers=sparse_layers)
    raise ConfigUnsupported(f"attention.kind: {config.kind} cannot be built yet")


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
) -> tuple[RolloutAttention, RecallGuard | None]:
    """Self-attention of one take, and its quality guard if one is wanted; without, nothing looks on."""
    if not guard.enabled:
        return RolloutAttention(backbone, cache, policy, kernel, reindex=reindex), None
    probe = RecallProbe(cache, guard.num_queries)
    attention = RolloutAttention(backbone, cache, policy, kernel, reindex=reindex, probes=(probe,))
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

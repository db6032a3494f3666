"""What a render asks of its model that this model cannot do: known from sizes alone, so that a driver can refuse it
before an actor starts. Loads without torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from workers.config import (
    AnnPromptConfig,
    AnnSelfAttentionConfig,
    FlowCacheConfig,
    RenderConfig,
    TemporalCacheConfig,
)
from workers.kernel_limits import KERNEL_LIMITS
from workers.model.backbones import Backbone

_STORED = {"int8": 0.5, "int4": 0.25}
"""Of the bytes of a bfloat16 vector; scales and records, which come on top, are counted when the cache is made."""


def conflicts_with_model(config: RenderConfig, backbone: Backbone) -> Iterator[str]:
    """One message for each thing that does not go with the model, naming the field, its value and what is allowed."""
    yield from _rollout_conflicts(config, backbone)
    if config.cache.kind == "tiles":
        try:
            config.cache.chunks(backbone.chunk_latent_frames)
        except ValueError as error:
            yield str(error)
    yield from budget_conflicts(config, backbone)
    for field, part in (("attention", config.attention), ("prompt_attention", config.prompt_attention)):
        if isinstance(part, AnnSelfAttentionConfig | AnnPromptConfig):
            unknown = unknown_layer(field, part.layers, backbone.num_layers)
            if unknown:
                yield unknown


def kernel_conflict(config: RenderConfig, backbone: Backbone) -> str | None:
    """Why the kernel that was asked for cannot compute this model's attention on any hardware; None where it can."""
    name = config.kernel.name
    if name == "auto":
        return None
    merges = config.cache.kind == "temporal"
    reason = KERNEL_LIMITS[name].why_not(config.backbone.dtype, backbone.head_dim, merges=merges)
    return None if reason is None else f"kernel.name: {name!r} cannot run: {reason}"


def unknown_layer(field: str, layers: Collection[int] | None, num_layers: int) -> str | None:
    """A layer that is named and that the model does not have."""
    if not layers or max(layers) < num_layers:
        return None
    return f"{field}.layers: {max(layers)} is not a layer of this model: they go from 0 to {num_layers - 1}"


def budget_conflicts(config: RenderConfig, backbone: Backbone) -> Iterator[str]:
    """A hard limit of bytes that does not hold sink, newest latent frames and one chunk of this model."""
    cache, chunk = config.cache, backbone.chunk_latent_frames
    if not isinstance(cache, TemporalCacheConfig | FlowCacheConfig):
        return
    ends = cache.sink_latent_frames + cache.recent_latent_frames
    why = f"sink_latent_frames {cache.sink_latent_frames}, recent_latent_frames {cache.recent_latent_frames}"
    if isinstance(cache, FlowCacheConfig):
        least, why = ends + chunk, f"{why} and a chunk of {chunk}"
    else:
        wide = 2.0 if config.backbone.dtype == "float32" else 1.0
        # A table of groups holds a chunk and a latent frame more at least: cache/budget.py.
        least = math.ceil(wide * ends + _STORED.get(cache.storage, wide) * (chunk + 1))
        why = f"{why} in {config.backbone.dtype}, a chunk of {chunk} and one more in storage {cache.storage}"
    if cache.budget_latent_frames < least:
        yield f"cache.budget_latent_frames: {cache.budget_latent_frames} is below {least}, what {why} take at least"


def _rollout_conflicts(config: RenderConfig, backbone: Backbone) -> Iterator[str]:
    """What the way in which chunks follow one another cannot be combined with."""
    name = backbone.name
    if config.cache.kind == "native" and backbone.native is None:
        yield f"cache.kind: native: {name} has no window of its own"
    if backbone.rollout != "chunkwise" and config.reuse.kind != "none":
        yield f"reuse.kind: {config.reuse.kind} goes by the steps of one chunk; {name} denoises several at once"
    if not backbone.renders_alone:
        yield f"backbone.name: {name} takes a picture beside the noise; it is loaded as the base of others only"
    if backbone.rollout == "clipwise" and config.guard.enabled:
        yield f"guard.enabled: {name} makes whole clips, which no guard watches yet"
    if config.cache.kind == "tiles" and (backbone.rollout != "chunkwise" or backbone.image_dim):
        how = "takes pictures" if backbone.rollout == "chunkwise" else f"renders {backbone.rollout}"
        yield (
            f"cache.kind: tiles: its loop denoises one chunk at a time from text alone, and {name} {how}; "
            "take policy: fastar-quant"
        )

"""The attention that a published model was trained with, as a cache, a policy and times: what `native` means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.attention.dense import DenseAttention
from workers.attention.native_window import NativeWindow, NativeWindowAttention
from workers.cache.dense import DenseCache
from workers.cache.window import WindowCache
from workers.contracts import AttentionPolicy, KVCache
from workers.model.attend import Reindex
from workers.model.backbones import Backbone


@dataclass(frozen=True)
class NativeParts:
    """For one rollout; the cache is empty."""

    cache: KVCache
    policy: AttentionPolicy
    reindex: Reindex | None


def native_parts(backbone: Backbone, latent_size: tuple[int, int], dtype: torch.dtype | None = None) -> NativeParts:
    """The model's own window.

    Args:
        backbone: With `native` settings.
        latent_size: Height and width.
        dtype: Storage of the cache; None keeps that of the keys.
    """
    native = backbone.native
    assert native is not None, f"{backbone.name} has no native window"
    if backbone.rollout == "clipwise":  # nothing is remembered between clips
        return NativeParts(DenseCache(backbone.num_layers, dtype), DenseAttention(), None)
    frame_tokens = math.prod(backbone.token_grid(latent_size))
    attended, sink = native.attended_latent_frames, native.sink_latent_frames
    # A clean pass of one chunk looks back farthest; with a rolling window it may see more frames than the sink leaves.
    recent = attended - backbone.chunk_latent_frames
    is_rolling = backbone.rollout == "rolling"
    window = NativeWindow(attended * frame_tokens, sink * frame_tokens, clean_pass_sees_sink=not is_rolling)
    cache = WindowCache(
        backbone.num_layers, sink_tokens=sink * frame_tokens, recent_tokens=recent * frame_tokens, dtype=dtype
    )
    return NativeParts(cache, NativeWindowAttention(window), follow_recent(sink, attended) if is_rolling else None)


def follow_recent(sink_latent_frames: int, attended_latent_frames: int) -> Reindex:
    """Times of cached keys in Rolling-Forcing: the sink stands right before the oldest frame that is seen besides it.

    Then no query sees a key farther away than the model was trained with, however long the video is.
    """

    def reindex(time: Tensor, newest: float) -> Tensor:
        return torch.where(time < sink_latent_frames, time + max(0.0, newest + 1 - attended_latent_frames), time)

    return reindex

"""Rows of the native windows: Self-Forcing and Rolling-Forcing as published, plain and compiled; and 14B, bounded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from tests.bench.rollout_models import Stage, fill_cache, make_config, make_dit, make_vae
from tests.bench.rollout_rows import RowResult, Settings, row
from workers.assemble import TakeParts
from workers.config import NativeCacheConfig, TemporalCacheConfig
from workers.kernels.select import Hardware, KernelNeed, select_kernel
from workers.metrics import peak_gpu_bytes, reset_peak_gpu_bytes

_FRAME_300, _FRAME_600 = 300, 600
LARGE_BUDGET = 9
"""Latent frames' worth of keys of the 14B model, the least that its cache takes: 11.5 GB, and as much again decoded."""


def _before(place: int, num_chunks: int) -> list[int]:
    """The first chunk of the video and the newest ones before this."""
    return [0, *range(max(1, place - num_chunks), place)]


def measure_bounded(stage: Stage, *, with_vae: bool, num_fill: int = 7) -> RowResult:
    """A cache that is full after so many chunks: three places of the video, each with a cache as it is there."""
    settings, backbone = stage.settings, stage.settings.backbone
    last = settings.num_chunks - 9
    places = backbone.chunk_of_frame(_FRAME_300), backbone.chunk_of_frame(_FRAME_600), last
    num_timed = settings.timed_chunks, 1, settings.timed_chunks
    seconds, peaks, parts = [], [], stage.parts()
    reset_peak_gpu_bytes(settings.device)
    for place, num in zip(places, num_timed, strict=True):
        parts = stage.parts()
        fill_cache(parts.cache, settings, _before(place, num_fill))
        seconds.append(stage.seconds(parts, place, num))
        peaks.append(peak_gpu_bytes(settings.device) / 1e9)
    fps_with_vae, notes = None, ""
    if with_vae:
        fill = stage.parts()
        fill_cache(fill.cache, settings, _before(last, num_fill))
        fps_with_vae = settings.chunk_frames / stage.seconds_with_pictures(fill, last, settings.timed_chunks)
        notes = f"with pictures {peak_gpu_bytes(settings.device) / 1e9:.1f} GB at most"
    # Chunks before the window is full are cheaper; they are counted as full ones.
    return RowResult(
        "",
        fps_300_400=settings.chunk_frames / seconds[0],
        fps_last_100=settings.chunk_frames / seconds[-1],
        fps_with_vae=fps_with_vae,
        peak_gb_600=peaks[1],
        peak_gb_3000=peaks[-1],
        seconds_3000_frames=settings.num_chunks * (seconds[0] + seconds[-1]) / 2,
        cache_keys=parts.cache.num_tokens,
        notes=notes,
    )


def native_row(backbone: str | None, compiled: bool, settings: Settings, hardware: Hardware) -> RowResult:
    """The window that the model was trained with."""
    if backbone is not None:
        settings = settings.of(backbone)
    config = make_config(settings, compiled=compiled, cache=NativeCacheConfig())
    kernel = select_kernel("auto", settings.device, KernelNeed(settings.dtype, settings.backbone.head_dim))
    dit = make_dit(settings, compiled=compiled)
    vae, decoder = make_vae(settings)
    result = measure_bounded(Stage.of(settings, dit, config, kernel, vae), with_vae=True)
    native = settings.backbone.native
    assert native is not None
    frames = native.attended_latent_frames
    steps = f"{native.num_steps} steps and a clean pass" if native.window_chunks == 1 else "one window and a clean pass"
    notes = (
        f"{settings.backbone.name}, {steps} per chunk, {'compiled' if compiled else 'eager'}, {kernel.version}; begun "
        "at frames 300, 600 and 2900 with a full cache of random keys; a chunk's pictures are decoded beside the next "
        f"chunk and encoded by x264, {decoder}; peaks without VAE work, {result.notes}"
    )
    ever = settings.num_chunks * settings.backbone.chunk_latent_frames
    return replace(result, density=frames / ever, compression_share=0.0, notes=notes)


for _name, _backbone in (("self-forcing", "self-forcing-1.3b"), ("rolling-forcing", "rolling-forcing-1.3b")):
    row(f"{_name} native")(partial(native_row, _backbone, True))
    row(f"{_name} native eager")(partial(native_row, _backbone, False))


@row("wan2.1-14b bounded")
def large_row(settings: Settings, hardware: Hardware) -> RowResult:
    """A few chunks of the 14B model on one card with the temporal cache; its chunks go as Self-Forcing's do."""
    settings = replace(settings.of("wan2.1-t2v-14b"), timed_chunks=2)
    native = replace(settings.backbone, native=Settings.of(settings, "self-forcing-1.3b").backbone.native)
    settings = replace(settings, backbone=native)
    cache = TemporalCacheConfig(sink_latent_frames=3, recent_latent_frames=3, budget_latent_frames=LARGE_BUDGET)
    config = make_config(settings, compiled=False, cache=cache)
    need = KernelNeed(settings.dtype, settings.backbone.head_dim, log_mass=True)
    kernel = select_kernel("auto", settings.device, need)
    vae, decoder = make_vae(settings)
    stage = Stage.of(settings, make_dit(settings, compiled=False), config, kernel, vae)
    parts = stage.parts()
    place = settings.backbone.chunk_of_frame(_FRAME_300)
    reset_peak_gpu_bytes(settings.device)
    fill_cache(parts.cache, settings, _before(place, 5))
    seconds = stage.seconds(parts, place, settings.timed_chunks)
    peak, num_keys, num_bytes = peak_gpu_bytes(settings.device) / 1e9, parts.cache.num_tokens, parts.cache.num_bytes
    fps_with_vae, pictures = _large_pictures(stage, parts, place + 1 + settings.timed_chunks)
    weights = sum(p.nbytes for p in stage.model.dit.parameters()) / 1e9
    notes = (
        f"{settings.backbone.num_layers} layers, {weights:.1f} GB of weights, eager, {kernel.version}; temporal cache "
        f"of {cache.budget_latent_frames} latent frames' worth of bytes, {num_bytes / 1e9:.1f} GB in use; "
        f"{settings.timed_chunks} chunks from frame 300 on, at the full length the cache is no larger; {decoder}, "
        f"peak without VAE work, {pictures}"
    )
    return RowResult(
        "",
        fps_300_400=settings.chunk_frames / seconds,
        fps_with_vae=fps_with_vae,
        peak_gb_600=peak,
        cache_keys=num_keys,
        notes=notes,
    )


def _large_pictures(stage: Stage, parts: TakeParts, place: int) -> tuple[float | None, str]:
    """Frames per second with pictures from that chunk on, and the peak; what was measured before outlives a failure."""
    settings = stage.settings
    try:
        seconds = stage.seconds_with_pictures(parts, place, settings.timed_chunks)
    except torch.OutOfMemoryError as error:
        return None, f"no room for pictures: {str(error).strip()[:120]}"
    return settings.chunk_frames / seconds, f"with pictures {peak_gpu_bytes(settings.device) / 1e9:.1f} GB at most"

"""Rows of the rollout bench: what each says, how it is made, and that no failure takes another row along.

A row is a function of the settings and the hardware, registered by name in `ROWS`; modules `rollout_*.py` bring them.
The frame alone fills in the ratio, and only against a dense baseline that was measured in the same run.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from workers.kernels.select import Hardware
from workers.model.backbones import Backbone, find_backbone
from workers.model.wan_decode_weights import Route

BASELINE = "dense"
"""The row that ratios are taken against: full history with the fastest dense kernel of the run."""


@dataclass(frozen=True)
class Settings:
    """What every row is measured at."""

    backbone: Backbone
    width: int
    height: int
    device: torch.device
    dtype: torch.dtype
    num_frames: int = 3000
    timed_chunks: int = 8
    """Chunks of each figure; more for less spread."""
    compiled: bool = True
    """Compile the transformer around its attention, but in rows that say eager."""
    real_chunks: tuple[int, ...] = (8, 35, 51)
    """Histories that are kept whole; 51 chunks of Wan2.1-1.3B are 44 GB, and their keys after RoPE 22 GB more."""
    replayed_chunks: tuple[int, ...] = (131, 243)
    """Histories of which every layer reads the same keys. As 35 and 51, these leave whole tiles of 128 keys between the
    sink and the newest latent frames, which spares policies that see tiles a copy of everything."""
    flow_latent_frames: int = 40
    """FlowCache's budget."""
    vae_route: Route | None = None
    """How the VAE decodes; None is the product's choice."""
    has_flashinfer: bool = False
    """Its kernels are built, which takes over a minute."""
    ends_at: float = float("inf")
    """time.monotonic() after which no row is begun."""

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.backbone.latent_size(self.width, self.height)

    @property
    def frame_tokens(self) -> int:
        return self.backbone.tokens_per_latent_frame(self.width, self.height)

    @property
    def chunk_frames(self) -> int:
        """Video frames of a chunk that is not the first."""
        return self.backbone.chunk_latent_frames * self.backbone.temporal_stride

    @property
    def num_chunks(self) -> int:
        return self.backbone.num_chunks(self.num_frames)

    def of(self, backbone: str) -> Settings:
        """The same with another model."""
        return replace(self, backbone=find_backbone(backbone))


@dataclass(frozen=True)
class RowResult:
    """One line of the table; what was not measured is None, and `notes` says why."""

    policy: str
    fps_300_400: float | None = None
    """Video frames per second of denoising alone, over frames 300 to 400."""
    fps_last_100: float | None = None
    fps_with_vae: float | None = None
    """With VAE decode and H.264 encode beside the denoiser."""
    peak_gb_600: float | None = None
    """Most GPU memory in use so far (10^9 bytes) when 600 frames are made."""
    peak_gb_3000: float | None = None
    seconds_3000_frames: float | None = None
    """A whole rollout, denoising alone."""
    ratio_to_fastest_dense: float | None = None
    cache_keys: int | None = None
    """Keys per layer and head at the end."""
    density: float | None = None
    """Keys that a query sees at the end, its own chunk's included, over all that were ever made."""
    compression_share: float | None = None
    """Match, merge, hash, bucket upkeep and selection over the time of a chunk."""
    notes: str = ""


Row = Callable[[Settings, Hardware], RowResult]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    """Register the function that makes this row."""

    def register(make: Row) -> Row:
        assert name not in ROWS, f"two rows are called {name}"
        ROWS[name] = make
        return make

    return register


class BrokenDevice(Exception):
    """After this the process can no longer use its GPU; other rows need another process."""


def make_row(name: str, settings: Settings, hardware: Hardware, rows: dict[str, Row] = ROWS) -> RowResult:
    """One row; a failure becomes its note.

    Raises:
        BrokenDevice: With the failed row in `args[0]`.
    """
    if time.monotonic() > settings.ends_at:
        return RowResult(name, notes="not measured: the time given had run out")
    try:
        result = rows[name](settings, hardware)
    except Exception as error:
        traceback.print_exc()
        failed = RowResult(name, notes=f"failed: {type(error).__name__}: {str(error).strip()[:300]}")
        if is_device_broken(error):
            raise BrokenDevice(failed) from error
        result = failed
    release_memory(settings.device)
    return replace(result, policy=name)


def is_device_broken(error: Exception) -> bool:
    """Out of memory is not: what was allocated goes away with the row."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def with_ratios(results: Sequence[RowResult]) -> list[RowResult]:
    """Speed against the dense baseline among these very rows; without one there is none, whatever a row claims."""
    seconds = {result.policy: result.seconds_3000_frames for result in results}
    dense = seconds.get(BASELINE)

    def ratio(result: RowResult) -> float | None:
        own = result.seconds_3000_frames
        return dense / own if dense is not None and own else None

    return [replace(result, ratio_to_fastest_dense=ratio(result)) for result in results]


def as_table(results: Sequence[RowResult]) -> list[dict[str, Any]]:
    """For the result file; figures to four digits."""
    return [
        {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in asdict(result).items()}
        for result in with_ratios(results)
    ]

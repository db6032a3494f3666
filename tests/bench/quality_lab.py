"""Machinery of the quality bench: worlds with a place that is left and seen again, rolled out under a policy.

The history is the true one (clean passes of true latents through the policy's own cache), so that policies differ in
what they remember and in nothing else. The returned chunk is denoised with the same noise for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tests.bench.quality_places import Group, Place, left_and_seen_again, long_walk
from tests.bench.world_model import load
from workers.assemble import LoadedModel, TakeParts, load_model, prepare_take
from workers.assemble_cache import make_temporal_cache, temporal_settings
from workers.assemble_policies import make_attention
from workers.attention.measure import RecallMeter
from workers.config import GuardConfig, RenderConfig, TemporalCacheConfig
from workers.denoise import draw_noise
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.control import control_maps
from workers.quality.reference import psnr_db, ssim
from workers.rollout import Rollout, RolloutPlan

_QUERIES = 12  # looked at in each layer and step: the mean over all of them has an error of about 0.005


@dataclass
class Returned:
    """What one policy made of one place."""

    frames_BFCHW: Tensor
    psnr_db: float
    ssim: float
    recall: float
    kept_mass: float
    density: float
    kv_bytes: int
    tokens: int
    seconds: float
    guard: list[dict[str, object]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Forced:
    """One chunk made from a true history."""

    chunk: int
    frames_BFCHW: Tensor
    recall: float
    kept_mass: float
    density: float
    kv_bytes: int


class QualityLab:
    """The bundled model under one policy after another, on held-out worlds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lab, self.revision = load(device)

    def places(self, distance: int, indices: Sequence[int], group: Group) -> Iterator[Place]:
        """Held-out worlds; each index is the same place for every policy and in every run."""
        return left_and_seen_again(self._lab.vae, self.device, distance, indices, group)

    def walk(self, index: int, num_frames: int) -> Place:
        """A camera that wanders on and on."""
        return long_walk(self._lab.vae, self.device, index, num_frames)

    def plan(self, place: Place, model: LoadedModel) -> RolloutPlan:
        """The rollout of a place; noise is the same for every policy."""
        keys = self._lab.prompts([place.caption])
        shape = (1, 3, model.backbone.latent_channels, *model.latent_size)

        def control(chunk: int) -> Tensor:
            camera = place.camera_BTS2[:, 3 * chunk : 3 * chunk + 3]
            return control_maps(camera, model.config.video.width, model.config.video.height, model.backbone)

        return RolloutPlan(
            num_chunks=place.num_chunks,
            latent_size=model.latent_size,
            schedule=model.schedule,
            guidance=1.0,
            noise=lambda chunk, step: draw_noise(place.num_chunks, chunk, step, shape),
            prompt=lambda chunk: [keys],
            control=control,
        )

    @torch.inference_mode()
    def come_back(self, place: Place, model: LoadedModel) -> Returned:
        """Remember the true way, then make the last chunk."""
        parts, plan = _measurable(model, prepare_take(model, 0)), self.plan(place, model)
        meter = RecallMeter(parts.cache, num_queries=_QUERIES, every_chunks=place.num_chunks - 1, dtype=torch.float32)
        attention = RolloutAttention(
            model.backbone, parts.cache, parts.policy, model.kernel, reindex=parts.reindex, probes=(meter,)
        )
        rollout = Rollout(model.dit, attention, Stopwatch(self.device), parts.reuse, attend_prompt=parts.attend_prompt)
        started = time.perf_counter()
        for chunk in range(place.num_chunks - 1):
            rollout.remember(plan, chunk, place.latents_BTCHW[:, 3 * chunk : 3 * chunk + 3])
        meter.forget_readings()
        (made,) = rollout.run(plan, first_chunk=place.num_chunks - 1)
        frames = self._lab.decode(made.latents_BTCHW, place.latents_BTCHW[:, -4])
        return Returned(
            frames,
            psnr_db(frames, place.truth_BFCHW).item(),
            ssim(frames.flatten(0, 1), place.truth_BFCHW.flatten(0, 1)).mean().item(),
            meter.mean(),
            meter.mean_kept(),
            made.density,
            parts.cache.num_bytes,
            parts.cache.num_tokens,
            time.perf_counter() - started,
        )

    @torch.inference_mode()
    def follow(self, place: Place, model: LoadedModel, marks: Sequence[int]) -> list[Forced]:
        """Remember the true way, and make the chunks at `marks` beside it; none of them becomes history."""
        parts, plan = _measurable(model, prepare_take(model, 0)), self.plan(place, model)
        meter = RecallMeter(parts.cache, num_queries=_QUERIES, dtype=torch.float32)
        attention = RolloutAttention(
            model.backbone, parts.cache, parts.policy, model.kernel, reindex=parts.reindex, probes=(meter,)
        )
        rollout = Rollout(model.dit, attention, Stopwatch(self.device), parts.reuse, attend_prompt=parts.attend_prompt)
        found = []
        for chunk in range(max(marks) + 1):
            if chunk in marks:
                meter.forget_readings()
                (made,) = rollout.run(replace(plan, num_chunks=chunk + 1), first_chunk=chunk)
                frames = self._lab.decode(made.latents_BTCHW, place.latents_BTCHW[:, 3 * chunk - 1])
                recall, kept = meter.mean(), meter.mean_kept()
                found.append(Forced(chunk, frames, recall, kept, made.density, parts.cache.num_bytes))
            rollout.remember(plan, chunk, place.latents_BTCHW[:, 3 * chunk : 3 * chunk + 3])
        return found

    def vae_psnr(self, place: Place) -> float:
        """What the VAE alone makes of the returned view."""
        frames = self._lab.decode(place.latents_BTCHW[:, -3:], place.latents_BTCHW[:, -4])
        return psnr_db(frames, place.truth_BFCHW).item()

    def decode(self, latents_BTCHW: Tensor) -> Tensor:
        """Pictures of a stretch of a rollout."""
        return self._lab.decode(latents_BTCHW)


class Runner:
    """One free rollout, chunk by chunk, so that several can take turns and share the moods of the machine."""

    def __init__(self, lab: QualityLab, place: Place, model: LoadedModel, guard: GuardConfig | None = None) -> None:
        parts = prepare_take(model, 0)
        attention, judge = make_attention(
            guard or GuardConfig(), model.backbone, parts.cache, parts.policy, model.kernel, parts.reindex
        )
        self.cache, self.seconds, self.latents = parts.cache, list[float](), list[Tensor]()
        self.kv_bytes, self.density = list[int](), list[float]()
        rollout = Rollout(model.dit, attention, Stopwatch(lab.device), parts.reuse, judge, parts.attend_prompt)
        self._chunks = rollout.run(lab.plan(place, model))

    def step(self) -> None:
        """One chunk."""
        started = time.perf_counter()
        chunk = next(self._chunks)
        self.seconds.append(time.perf_counter() - started)
        self.latents.append(chunk.latents_BTCHW)
        self.kv_bytes.append(chunk.kv_bytes)
        self.density.append(chunk.density)


def full_bytes(model: LoadedModel, num_tokens: int) -> int:
    """What a full cache of so many tokens takes in bfloat16: what all shares are measured in."""
    return 2 * num_tokens * model.backbone.dim * model.backbone.num_layers * 2


def stored_bytes(model: LoadedModel, num_bytes: float) -> float:
    """Bytes of a cache as a bfloat16 render keeps it: uncompressed keys are float32 in a float32 one."""
    is_wide = model.dit.dtype == torch.float32 and model.config.cache.kind != "temporal"
    return num_bytes / 2 if is_wide else num_bytes


def mean_and_ci(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (0 for a single value)."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), 1.96 * spread / math.sqrt(len(values))


def model_of(policy: RenderConfig) -> LoadedModel:
    """A policy's model, ready to render."""
    return load_model(policy)


def _measurable(model: LoadedModel, parts: TakeParts) -> TakeParts:
    """The same parts; a temporal cache tracks what became of each key, which changes nothing that is read."""
    config = model.config.cache
    if not isinstance(config, TemporalCacheConfig):
        return parts
    tokens = model.backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)
    settings = temporal_settings(config, model.backbone, model.dit.dtype, tokens, is_guarded=False)
    tracking = replace(settings, track_owners=True)
    return replace(parts, cache=make_temporal_cache(config, tracking, model.backbone.num_layers, None))

"""Machinery of the quality bench: one model under one policy after another, on several worlds side by side.

On a walk the history is the true one (clean passes of true latents through the policy's own cache), so that policies
differ in what they remember and in nothing else. Every chunk that is made has the same noise under all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.bench.quality_places import CHUNK_LATENTS, DISTANCES, GROUPS, Walks, place_before, take_walks
from tests.plain_fp8 import RoundedAttention, round_linears
from tests.plain_tables import plain_table_parts
from workers.assemble import LoadedModel, TakeParts, load_model, prepare_take
from workers.assemble_cache import make_temporal_cache, temporal_settings
from workers.assemble_policies import make_attention
from workers.assemble_tiles import table_settings
from workers.attention.measure import RecallMeter
from workers.config import RenderConfig, TemporalCacheConfig
from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.contracts import Kernel
from workers.denoise import Schedule, add_noise, draw_noise
from workers.kernels.sdpa import SdpaKernel
from workers.metrics import Stopwatch
from workers.model.control import control_maps
from workers.model.dit import CausalDiT
from workers.model.fp8_linears import Fp8Linears
from workers.model.text_encoder import fold_padding
from workers.model.vae import VideoVAE
from workers.quality.reference import psnr_db, ssim
from workers.rollout import CleanChunk, Rollout, RolloutPlan

_QUERIES = 12  # looked at in each layer and step: the mean over all of them has an error of about 0.005
_NEXT, _PROBES = 1000, 2000  # chunk indices that no walk has: noise of their own for chunks that are tried out
_WALKS_KEPT = 2  # policies take turns on them
_ONE_STEP = 2  # the denoising step whose single-step error is taken


@dataclass(frozen=True, eq=False)
class Made:
    """One chunk made from a true history; index b is one world."""

    chunk: int
    distance: int | None
    """Latent frames since its place was last seen; None for the chunk that goes on with the walk."""
    latents_BTCHW: Tensor
    psnr_B: Tensor
    """Against the true views."""
    ssim_B: Tensor
    recall_B: Tensor
    strict_recall_B: Tensor
    density: float
    kv_bytes: float
    """Of one world."""
    guard: str | None = None
    """What the quality guard did."""

    @property
    def name(self) -> str:
        return f"{self.chunk}.{'next' if self.distance is None else self.distance}"


@dataclass(frozen=True, eq=False)
class Walked:
    """One policy on one set of walks."""

    made: list[Made]
    one_step: dict[int, Tensor]
    """Mark -> clean estimate of a single step from the noised truth."""


class QualityLab:
    """The model, and held-out worlds.

    Args:
        device: Where all is computed.
        dtype: Arithmetic of the transformer.
        weights: Folder of weights; None takes the bundled ones.
    """

    def __init__(self, device: torch.device, dtype: str = "float32", weights: Path | None = None) -> None:
        self.device = device
        self._backbone = {"dtype": dtype, "checkpoint": None if weights is None else str(weights)}
        self._base = load_model(RenderConfig.model_validate({"backbone": self._backbone}))
        assert isinstance(self._base.vae, VideoVAE)
        self._vae = self._base.vae
        self.revision, self.dtype = self._base.revision, dtype
        self._rounded: tuple[Fp8Linears, CausalDiT] = "none", self._base.dit
        self._walks: dict[tuple[str, tuple[int, ...], int], Walks] = {}

    def model(self, record: dict[str, object], *, as_served: bool = False) -> LoadedModel:
        """A policy's model.

        Args:
            record: Of the render.
            as_served: With the kernel that a render gets here; else one that does the same everywhere.
        """
        given = record.get("backbone", {})
        assert isinstance(given, dict)
        config = RenderConfig.model_validate(record | {"backbone": self._backbone | given})
        if as_served:
            return load_model(config)
        if self._rounded[0] != config.backbone.fp8:
            self._rounded = config.backbone.fp8, round_linears(self._base.dit, config.backbone.fp8)
        kernel: Kernel = SdpaKernel("flash")
        if isinstance(config.attention, TileAttentionConfig) and config.attention.fp8 != "none":
            kernel = RoundedAttention(kernel, self._rounded[1], config.attention.fp8)
        return replace(self._base, config=config, kernel=kernel, dit=self._rounded[1])

    def walks(self, group: str, indices: Sequence[int], num_frames: int) -> Walks:
        """Held-out worlds; an index is the same walk for every policy and in every run. The newest ones are kept."""
        key = group, tuple(indices), num_frames
        walks = self._walks.pop(key, None) or take_walks(self._vae, self.device, indices, num_frames, GROUPS[group])
        self._walks[key] = walks
        if len(self._walks) > _WALKS_KEPT:
            self._walks.pop(next(iter(self._walks)))
        return walks

    def plan(self, walks: Walks, model: LoadedModel) -> RolloutPlan:
        """The rollouts of some walks; noise depends on the world alone."""
        with torch.inference_mode():
            folded = fold_padding(model.text_encoder.encode(walks.captions), model.backbone.text_tokens)
            keys = model.dit.project_prompt(folded.text_BPE, folded.log_mass_BP)
        shape = (1, CHUNK_LATENTS, model.backbone.latent_channels, *model.latent_size)

        def noise(chunk: int, step: int) -> Tensor:
            return torch.cat([draw_noise(seed, chunk, step, shape) for seed in walks.seeds])

        return RolloutPlan(
            num_chunks=walks.num_chunks,
            latent_size=model.latent_size,
            schedule=model.schedule,
            guidance=1.0,
            noise=noise,
            prompt=lambda chunk: [keys],
            control=lambda chunk: _control(walks.camera(chunk), model),
        )

    @torch.inference_mode()
    def walk(self, walks: Walks, model: LoadedModel, marks: Sequence[int]) -> Walked:
        """Remember the true way; at each mark make the next chunk, and cut back to places seen before.

        Args:
            walks: Worlds and paths.
            model: With its policy.
            marks: Chunks that are made beside the walk; none of them becomes history.
        """
        run = Run(self, walks, model)
        made, one_step = [], {}
        for chunk in range(max(marks) + 1):
            true = walks.latents_BTCHW[:, CHUNK_LATENTS * chunk : CHUNK_LATENTS * (chunk + 1)]
            if chunk in marks:
                made += run.try_out(chunk)
                one_step[chunk] = run.single_step(chunk, true)
            if chunk < max(marks):
                run.remember(chunk)
        return Walked(made, one_step)

    def vae_psnr(self, walks: Walks, mark: int) -> Tensor:
        """What the VAE alone makes of the returned views, mean by world; empty where nothing can be returned to."""
        before = walks.latents_BTCHW[:, CHUNK_LATENTS * mark - 1]
        found = []
        for distance in distances_at(mark):
            truth = walks.truth_back(place_before(mark, distance), mark)
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, self._is_cuda):
                coded = self._vae.encode(truth).float()
            found.append(psnr_db(self.decode(coded, before), truth))
        return torch.stack(found).mean(0) if found else torch.zeros(0)

    def decode(self, latents_BTCHW: Tensor, before_BCHW: Tensor | None = None) -> Tensor:
        """Pictures of a stretch of a rollout, float32."""
        latents = latents_BTCHW.to(self.device, torch.float32)
        before = None if before_BCHW is None else before_BCHW.to(self.device, torch.float32)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, self._is_cuda):
            return self._vae.decode(latents, before).float()

    @property
    def _is_cuda(self) -> bool:
        return self.device.type == "cuda"


class Run:
    """One policy under way on some walks.

    Args:
        lab, walks, model: The model is that of the policy.
        parts: In place of the policy's own.
        meter: In place of one that sees the history grow; with `parts`, none is made.
    """

    def __init__(
        self,
        lab: QualityLab,
        walks: Walks,
        model: LoadedModel,
        parts: TakeParts | None = None,
        meter: RecallMeter | None = None,
    ) -> None:
        self._lab, self._walks, self._model = lab, walks, model
        if parts is None:
            parts = _measurable(model, _off_table(model, prepare_take(model, 0)))
            meter = RecallMeter(parts.cache, num_queries=_QUERIES, dtype=torch.float32)
        self._plan, self._cache, self._meter = lab.plan(walks, model), parts.cache, meter
        attention, self._judge = make_attention(
            model.config.guard,
            model.backbone,
            parts.cache,
            parts.policy,
            model.kernel,
            parts.reindex,
            probes=() if meter is None else (meter,),
        )
        self._rollout = Rollout(
            model.dit, attention, Stopwatch(lab.device), parts.reuse, self._judge, attend_prompt=parts.attend_prompt
        )

    def remember(self, chunk: int) -> None:
        """The true chunk becomes history."""
        true = self._walks.latents_BTCHW[:, CHUNK_LATENTS * chunk : CHUNK_LATENTS * (chunk + 1)]
        self._rollout.remember(self._plan, chunk, true)

    def single_step(self, chunk: int, true_BTCHW: Tensor) -> Tensor:
        """Clean estimate of one step, from the true chunk noised to the level of that step."""
        schedule = self._plan.schedule
        step = min(_ONE_STEP, schedule.num_steps - 1)
        sigma, timestep = schedule.sigmas[step], schedule.timesteps[step]

        def noised(index: int, _: int) -> Tensor:
            return add_noise(true_BTCHW, self._plan.noise(_NEXT + index, 0).to(true_BTCHW), sigma)

        plan = replace(self._plan, schedule=Schedule((sigma,), (timestep,)), noise=noised)
        return self._make(plan, chunk).latents_BTCHW

    def try_out(self, chunk: int, distances: Sequence[int] | None = None) -> Iterator[Made]:
        """The next chunk of the walk, and the places that are cut back to, all of them unless some are given."""
        walks, start = self._walks, CHUNK_LATENTS * chunk
        before = walks.latents_BTCHW[:, start - 1]
        truth = self._lab.decode(walks.latents_BTCHW[:, start : start + CHUNK_LATENTS], before)
        yield self._measured(self._plan, chunk, None, (truth, before))
        for turn, distance in enumerate(distances_at(chunk) if distances is None else distances):
            place = place_before(chunk, distance)
            plan = replace(
                self._plan,
                control=_always(_control(walks.camera_back(place), self._model)),
                noise=_shifted(self._plan.noise, _PROBES + 100 * turn),
            )
            yield self._measured(plan, chunk, distance, (walks.truth_back(place, chunk), before))

    def _measured(self, plan: RolloutPlan, chunk: int, distance: int | None, seen: tuple[Tensor, Tensor]) -> Made:
        truth, before = seen
        assert self._meter is not None
        self._meter.forget_readings()
        made = self._make(plan, chunk)
        frames = self._lab.decode(made.latents_BTCHW, before)
        batch = len(frames)
        return Made(
            chunk,
            distance,
            made.latents_BTCHW,
            psnr_db(frames, truth),
            ssim(frames.flatten(0, 1), truth.flatten(0, 1)).view(batch, -1).mean(1),
            *self._meter.mean_by_batch(),
            made.density,
            self._cache.num_bytes / batch,
            None if self._judge is None else self._judge.action,
        )

    def _make(self, plan: RolloutPlan, chunk: int) -> CleanChunk:
        (made,) = self._rollout.run(replace(plan, num_chunks=chunk + 1), first_chunk=chunk)
        return made


class Runner:
    """Free rollouts of some walks, chunk by chunk, so that several policies can take turns."""

    def __init__(self, lab: QualityLab, walks: Walks, model: LoadedModel) -> None:
        parts = _off_table(model, prepare_take(model, 0))
        attention, self.guard = make_attention(
            model.config.guard, model.backbone, parts.cache, parts.policy, model.kernel, parts.reindex
        )
        self.seconds, self.latents = list[float](), list[Tensor]()
        self.cpu_seconds = list[float]()
        """Of all threads of this process: what others do on the machine counts less."""
        self.kv_bytes, self.density = list[float](), list[float]()
        self.held_bytes = list[int]()
        """What the cache's tensors take of memory, free slots and what it hands out to readers included."""
        self._cache = parts.cache
        rollout = Rollout(model.dit, attention, Stopwatch(lab.device), parts.reuse, self.guard, parts.attend_prompt)
        self._chunks = rollout.run(lab.plan(walks, model))

    def step(self) -> None:
        """One chunk."""
        started, cpu_started = time.perf_counter(), time.process_time()
        chunk = next(self._chunks)
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu_started)
        self.latents.append(chunk.latents_BTCHW.half().cpu())
        self.kv_bytes.append(chunk.kv_bytes / len(chunk.latents_BTCHW))
        self.density.append(chunk.density)
        self.held_bytes.append(held_bytes(self._cache))


def distances_at(mark: int) -> tuple[int, ...]:
    """How long ago the places were seen that a walk has left behind at this chunk; the sink's is none of them."""
    return tuple(distance for distance in DISTANCES if place_before(mark, distance) >= 1)


def held_bytes(owner: object) -> int:
    """Of all tensors that can be reached from an object of ours, each piece of memory once."""
    pieces: dict[int, int] = {}
    seen, waiting = set[int](), [owner]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            pieces[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif type(one).__module__.partition(".")[0] == "workers":
            waiting += vars(one).values()
    return sum(pieces.values())


def full_bytes(model: LoadedModel, num_tokens: int) -> int:
    """What a full cache of so many tokens takes in bfloat16: what all shares are measured in."""
    return 2 * num_tokens * model.backbone.dim * model.backbone.num_layers * 2


def stored_bytes(model: LoadedModel, num_bytes: float, dtype: str) -> float:
    """Bytes of a cache as a bfloat16 render keeps it: uncompressed keys were float32 where it was measured so."""
    cache = model.config.cache
    if dtype == "float32" and isinstance(cache, TileCacheConfig) and cache.storage != "model":
        s = table_settings(cache, model.backbone, model.latent_size)
        ends, num = s.sink_chunks + s.recent_chunks, s.num_layers
        slots = (num_bytes / num - s.used_bytes(torch.float32, ends, 0)) / s.used_bytes(torch.float32, 0, 1)
        return num * (s.used_bytes(torch.bfloat16, ends, 0) + slots * s.used_bytes(torch.bfloat16, 0, 1))
    is_wide = dtype == "float32" and cache.kind != "temporal"
    return num_bytes / 2 if is_wide else num_bytes


def mean_and_ci(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (0 for a single value)."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), 1.96 * spread / math.sqrt(len(values))


def _control(camera_BTS2: Tensor, model: LoadedModel) -> Tensor:
    return control_maps(camera_BTS2, model.config.video.width, model.config.video.height, model.backbone)


def _always(maps: Tensor) -> Callable[[int], Tensor]:
    return lambda chunk: maps


def _shifted(noise: Callable[[int, int], Tensor], by: int) -> Callable[[int, int], Tensor]:
    return lambda chunk, step: noise(by + chunk, step)


def _measurable(model: LoadedModel, parts: TakeParts) -> TakeParts:
    """The same parts; a temporal cache tracks what became of each key, which changes nothing that is read."""
    config = model.config.cache
    if not isinstance(config, TemporalCacheConfig):
        return parts
    tokens = model.backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)
    is_guarded = model.config.guard.enabled
    settings = temporal_settings(config, model.backbone, model.dit.dtype, tokens, is_guarded=is_guarded)
    tracking = replace(settings, track_owners=True)
    return replace(parts, cache=make_temporal_cache(config, tracking, model.backbone.num_layers, None))


def _off_table(model: LoadedModel, parts: TakeParts) -> TakeParts:
    """The same parts; a tile table by the ordinary loop, which takes several worlds and lets probes look on."""
    if not parts.on_table:
        return parts
    cache, policy = plain_table_parts(model)
    return replace(parts, cache=cache, policy=policy, on_table=False)

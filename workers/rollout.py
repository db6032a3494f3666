"""The loop of one video: for each chunk, for each denoising step; then the clean pass that makes it history.

Yields clean latent chunks as they are finished. Everything random comes from `noise(chunk, step)`, so a rollout is a
function of its plan and of the model alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.contracts import ChunkJudge, Moment, PromptKeys, StepReuse
from workers.denoise import Schedule, step_euler, step_renoise, to_device
from workers.errors import NonFiniteLatents
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import Backbone
from workers.model.dit import AttendPrompt, CausalDiT, attend_prompt_dense
from workers.model.rope import grid_positions

Noise = Callable[[int, int], Tensor]
"""(chunk_index, step_index) -> float32 noise [1, T, C, H, W] of one chunk; step 0 is what the chunk starts from."""
ReadPrompt = Callable[[int], Sequence[Sequence[PromptKeys]]]
"""chunk_index -> keys of the prompt that holds there and, with guidance, of the negative prompt."""
ReadControl = Callable[[int], Tensor | None]
"""chunk_index -> control maps [1, T, control channels, H, W] of that chunk, or None for models without."""


@dataclass(frozen=True)
class RolloutPlan:
    """What is rolled out, given a model; tensors come from the three functions, chunk by chunk."""

    num_chunks: int
    latent_size: tuple[int, int]
    """Height and width."""
    schedule: Schedule
    guidance: float
    """1 means one call per step, with the prompt alone."""
    noise: Noise
    prompt: ReadPrompt
    control: ReadControl
    world_origin: Callable[[int], Tensor] | None = None
    """chunk_index -> corner of each latent frame in tokens [T, 2], for models whose RoPE lives in the world."""
    after_cut: frozenset[int] = frozenset()
    """Chunks that begin with a hard cut: their pictures owe nothing to those before."""


@dataclass(frozen=True)
class CleanChunk:
    """One finished chunk."""

    index: int
    latents_BTCHW: Tensor
    kv_bytes: int
    density: float
    """Keys that this chunk's queries saw (its own included) over all keys ever made: 1 for dense full history."""


class Rollout:
    """One video on one model.

    Args:
        model: In evaluation mode.
        attention: Fresh, with an empty cache, or with that of the chunks before `first_chunk`.
        stopwatch: Gets the stages "denoise" and "cache".
        reuse: Spares the layers in some denoising steps; of this rollout alone.
        judge: May have a chunk denoised again before it becomes history.
        attend_prompt: Cross-attention.
    """

    def __init__(
        self,
        model: CausalDiT,
        attention: RolloutAttention,
        stopwatch: Stopwatch,
        reuse: StepReuse | None = None,
        judge: ChunkJudge | None = None,
        attend_prompt: AttendPrompt = attend_prompt_dense,
    ) -> None:
        self._model, self._attention, self._stopwatch = model, attention, stopwatch
        self._reuse, self._judge, self._attend_prompt = reuse, judge, attend_prompt
        self._device = model.head.modulation.device
        attention.announce_to(attend_prompt)

    @torch.inference_mode()
    def run(self, plan: RolloutPlan, first_chunk: int = 0) -> Iterator[CleanChunk]:
        """Chunks from `first_chunk` on, in order.

        Raises:
            NonFiniteLatents: A chunk holds a NaN or an infinity; it is neither yielded nor remembered.
        """
        start = plan.noise(first_chunk, 0) if first_chunk < plan.num_chunks else torch.empty(0)
        for index in range(first_chunk, plan.num_chunks):
            with self._stopwatch.stage("denoise"):
                if self._judge is not None:
                    self._judge.begin_chunk()
                self._attention.begin_chunk(chunk_positions(plan, self._model.backbone, index, self._device))
                prompts = plan.prompt(index)
                maps = plan.control(index)
                control = None if maps is None else self._model.embed_control(maps.to(self._device))
                latents = self._denoise(plan, index, start, prompts, control)
                while self._judge is not None and self._judge.wants_again():
                    latents = self._denoise(plan, index, start, prompts, control)
                if not bool(torch.isfinite(latents).all()):
                    raise NonFiniteLatents(f"chunk {index} holds NaN or infinity after its last denoising step")
            with self._stopwatch.stage("cache"):
                if index + 1 < plan.num_chunks:  # nobody looks back at the last one
                    self._remember(plan, index, latents, prompts, control)
                    start = plan.noise(index + 1, 0)  # drawn by the host while a GPU is at the clean pass
                self._attention.end_chunk()
            num_own = latents.shape[1] * math.prod(self._model.backbone.token_grid(plan.latent_size))
            density = self._attention.take_mean_keys() / ((index + 1) * num_own)
            yield CleanChunk(index, latents, self._attention.cache.num_bytes, density)

    @torch.inference_mode()
    def remember(self, plan: RolloutPlan, index: int, latents_BTCHW: Tensor) -> None:
        """Take clean latents from elsewhere as a chunk of the past: the video goes on from them."""
        with self._stopwatch.stage("cache"):
            self._attention.begin_chunk(chunk_positions(plan, self._model.backbone, index, self._device))
            maps = plan.control(index)
            control = None if maps is None else self._model.embed_control(maps.to(self._device))
            self._remember(plan, index, latents_BTCHW.to(self._device), plan.prompt(index), control)
            self._attention.end_chunk()
            self._attention.take_mean_keys()  # no chunk was made: its keys count for none

    def _remember(
        self,
        plan: RolloutPlan,
        index: int,
        latents: Tensor,
        prompts: Sequence[Sequence[PromptKeys]],
        control: Tensor | None,
    ) -> None:
        """The clean pass."""
        moment = Moment(index, noise_level=0.0, is_clean_pass=True)
        self._flow(latents, 0.0, moment, prompts[:1], control, plan.guidance)

    def _denoise(
        self,
        plan: RolloutPlan,
        index: int,
        start: Tensor,
        prompts: Sequence[Sequence[PromptKeys]],
        control: Tensor | None,
    ) -> Tensor:
        """Clean latents of one chunk from the noise it starts from, float32."""
        schedule = plan.schedule
        latents = to_device(start, self._device)
        is_euler = self._model.backbone.sampler == "euler"
        for step, (sigma, timestep) in enumerate(zip(schedule.sigmas, schedule.timesteps, strict=True)):
            moment = Moment(index, step, len(schedule.sigmas), sigma)
            flow = self._flow(latents, timestep, moment, prompts, control, plan.guidance)
            next_sigma = schedule.next_sigma(step)
            if is_euler or next_sigma == 0.0:  # to level 0 both samplers take the clean estimate
                latents = step_euler(latents, flow, sigma, next_sigma)
            else:
                noise = to_device(plan.noise(index, step + 1), self._device)
                latents = step_renoise(latents, flow, sigma, next_sigma, noise)
        return latents

    def _flow(
        self,
        latents: Tensor,
        timestep: float,
        moment: Moment,
        prompts: Sequence[Sequence[PromptKeys]],
        control: Tensor | None,
        guidance: float,
    ) -> Tensor:
        """Predicted flow in float32, guided when there are two prompts."""
        times = torch.full(latents.shape[:2], timestep, dtype=torch.float32, device=self._device)
        flows = []
        for branch, keys in enumerate(prompts):
            call = replace(moment, branch=branch)
            self._attention.begin_call(call)
            if self._reuse is not None:
                self._reuse.begin_call(call)
            flow = self._model(
                latents,
                times,
                keys,
                self._attention,
                control_BQE=control,
                attend_prompt=self._attend_prompt,
                reuse=self._reuse,
            )
            flows.append(flow.float())
        return flows[0] if len(flows) == 1 else torch.lerp(flows[1], flows[0], guidance)


def chunk_positions(plan: RolloutPlan, backbone: Backbone, index: int, device: torch.device) -> Tensor:
    """(latent frame, row, column) of the tokens of one chunk, [Q, 3]."""
    num = backbone.chunk_latent_frames
    rows, columns = backbone.token_grid(plan.latent_size)
    origin = None if plan.world_origin is None else plan.world_origin(index).to(device)
    time = torch.arange(index * num, (index + 1) * num, device=device)
    return grid_positions(time, rows, columns, origin)

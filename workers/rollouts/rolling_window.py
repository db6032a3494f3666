"""Rolling window (Rolling-Forcing): several chunks are denoised together, each one level cleaner than the one after it.

With L levels, window w holds chunks w-L+1 .. w, as far as they exist; chunk c stands at level w - c, so it enters as
pure noise in window c and leaves clean in window c+L-1. Inside the window everybody sees everybody. Then the oldest
chunk alone goes through the clean pass and becomes history: keys of noisy chunks are never remembered.
Fresh noise for chunk c at its level k is `noise(c, k)`; `noise(c, 0)` is what it enters with.
Source: Rolling Forcing (arXiv 2509.25161), section 3; the published model has 5 levels and 3 latent frames a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workers.contracts import ChunkJudge, Moment
from workers.denoise import add_noise, clean_estimate, to_device
from workers.errors import NonFiniteLatents
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.dit import AttendPrompt, CausalDiT, attend_prompt_dense
from workers.rollout import CleanChunk, RolloutPlan
from workers.rollouts.calls import CallExtras, ModelCalls, PromptLayers, guide, join_prompts


@dataclass(frozen=True)
class Window:
    """Chunks that are denoised together."""

    index: int
    chunks: range

    def level(self, chunk_index: int) -> int:
        """Denoising step at which a chunk stands, 0 the noisiest."""
        return self.index - chunk_index


def plan_windows(num_chunks: int, num_levels: int) -> Iterator[Window]:
    """Every window of a rollout, in order."""
    for index in range(num_chunks + num_levels - 1):
        yield Window(index, range(max(0, index - num_levels + 1), min(num_chunks - 1, index) + 1))


@dataclass
class InFlight:
    """A chunk between its entry into the window and its end."""

    latents_BTCHW: Tensor
    prompts: Sequence[PromptLayers]
    """Under the prompt and, with guidance, under the negative one."""
    control_BQE: Tensor | None


class RollingWindowRollout:
    """One video on one model.

    Args:
        model: In evaluation mode.
        attention: Fresh, with an empty cache, or with that of the chunks before `first_chunk`.
        stopwatch: Gets the stages "denoise" and "cache".
        judge: May have a window denoised again before its oldest chunk becomes history.
        attend_prompt: Cross-attention.
    """

    def __init__(
        self,
        model: CausalDiT,
        attention: RolloutAttention,
        stopwatch: Stopwatch,
        judge: ChunkJudge | None = None,
        attend_prompt: AttendPrompt = attend_prompt_dense,
    ) -> None:
        self._calls = ModelCalls(model, attention)
        self._attention, self._stopwatch = attention, stopwatch
        self._judge, self._attend_prompt = judge, attend_prompt
        attention.announce_to(attend_prompt)
        self._latents: dict[int, Tensor] = {}
        self._visible: list[int] = []  # chunks that there were to see, call by call

    @torch.inference_mode()
    def run(self, plan: RolloutPlan, first_chunk: int = 0) -> Iterator[CleanChunk]:
        """Chunks from `first_chunk` on, in order; a later start than 0 needs `restore`.

        Raises:
            NonFiniteLatents: A window holds a NaN or an infinity; none of its chunks is yielded.
        """
        num_levels = plan.schedule.num_steps
        in_flight = {index: self._enter(plan, index, latents) for index, latents in self._latents.items()}
        for window in plan_windows(plan.num_chunks, num_levels):
            oldest = window.chunks.start
            is_last_look = window.level(oldest) == num_levels - 1
            if first_chunk > 0 and window.index < first_chunk + num_levels - 1:
                continue
            with self._stopwatch.stage("denoise"):
                for index in window.chunks:
                    if index not in in_flight:
                        in_flight[index] = self._enter(plan, index, to_device(plan.noise(index, 0), self._calls.device))
                if self._judge is not None:
                    self._judge.begin_chunk()
                clean = self._denoise(plan, window, in_flight)
                going_on = window.chunks[1:] if is_last_look else window.chunks
                # Drawn by the host while a GPU is at the call.
                noise = {index: self._draw_noise(plan, index, window.level(index) + 1) for index in going_on}
                while self._judge is not None and self._judge.wants_again():
                    clean = self._denoise(plan, window, in_flight)
                if not bool(torch.isfinite(clean).all()):
                    raise NonFiniteLatents(f"the window that ends chunk {oldest} holds NaN or infinity")
                chunks = dict(zip(window.chunks, clean.chunk(len(window.chunks), dim=1), strict=True))
                for index in going_on:
                    sigma = plan.schedule.sigmas[window.level(index) + 1]
                    fresh = to_device(noise[index], self._calls.device)
                    in_flight[index].latents_BTCHW = add_noise(chunks[index], fresh, sigma)
            if not is_last_look:
                continue
            with self._stopwatch.stage("cache"):
                done = in_flight.pop(oldest)
                if oldest + 1 < plan.num_chunks:  # nobody looks back at the last one
                    self._remember(plan, oldest, chunks[oldest], done)
                self._attention.end_chunk()
            self._latents = {index: chunk.latents_BTCHW for index, chunk in in_flight.items()}
            yield CleanChunk(oldest, chunks[oldest], self._attention.cache.num_bytes, self._density(plan))

    def state(self) -> Mapping[str, Tensor]:
        """Latents of the chunks in flight after the last chunk that was yielded."""
        return {str(index): latents for index, latents in self._latents.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`; the cache is restored apart."""
        self._latents = {int(name): latents.to(self._calls.device) for name, latents in state.items()}

    def _enter(self, plan: RolloutPlan, index: int, latents_BTCHW: Tensor) -> InFlight:
        return InFlight(latents_BTCHW, plan.prompt(index), self._calls.embed_control(plan, index))

    def _denoise(self, plan: RolloutPlan, window: Window, in_flight: Mapping[int, InFlight]) -> Tensor:
        """Clean estimate of the whole window, one call."""
        schedule = plan.schedule
        chunks = [in_flight[index] for index in window.chunks]
        latents = torch.cat([chunk.latents_BTCHW for chunk in chunks], dim=1)
        levels = [window.level(index) for index in window.chunks]
        num_frames = latents.shape[1] // len(chunks)
        self._attention.begin_chunk(self._calls.positions(plan, window.chunks))
        moment = Moment(window.chunks.start, levels[0], schedule.num_steps, schedule.sigmas[levels[-1]])
        timestep_BT = _per_frame(schedule.timesteps, levels, num_frames, latents.device)
        sigma_BT = _per_frame(schedule.sigmas, levels, num_frames, latents.device)
        flow = self._flow(plan, latents, timestep_BT, moment, chunks)
        self._visible += [window.chunks.stop] * len(chunks[0].prompts)
        return clean_estimate(latents, flow, sigma_BT[..., None, None, None])

    def _flow(
        self, plan: RolloutPlan, latents: Tensor, timestep_BT: Tensor, moment: Moment, chunks: list[InFlight]
    ) -> Tensor:
        """Flow of a window whose chunks may have prompts of their own."""
        controls = [chunk.control_BQE for chunk in chunks if chunk.control_BQE is not None]
        control = torch.cat(controls, dim=1) if controls else None
        flows = []
        for branch in range(len(chunks[0].prompts)):
            prompts = [chunk.prompts[branch] for chunk in chunks]
            extras = CallExtras(control, attend_prompt=join_prompts(prompts, self._attend_prompt))
            moment = replace(moment, branch=branch)
            flows.append(self._calls.flow(latents, timestep_BT, moment, prompts[0], extras))
        return guide(flows, plan.guidance)

    def _draw_noise(self, plan: RolloutPlan, index: int, level: int) -> Tensor:
        """What a chunk's clean estimate is mixed with for its next window, at its next level."""
        return plan.noise(index, level)

    def _remember(self, plan: RolloutPlan, index: int, clean: Tensor, chunk: InFlight) -> None:
        """The clean pass of one chunk."""
        self._attention.begin_chunk(self._calls.positions(plan, range(index, index + 1)))
        timestep_BT = torch.zeros(clean.shape[:2], device=clean.device)
        moment = Moment(index, noise_level=0.0, is_clean_pass=True)
        extras = CallExtras(chunk.control_BQE, attend_prompt=self._attend_prompt)
        self._calls.flow(clean, timestep_BT, moment, chunk.prompts[0], extras)
        self._visible.append(index + 1)

    def _density(self, plan: RolloutPlan) -> float:
        """Keys seen since this was last asked over all that there were to see."""
        backbone = self._calls.model.backbone
        tokens = backbone.chunk_latent_frames * math.prod(backbone.token_grid(plan.latent_size))
        visible, self._visible = sum(self._visible) / len(self._visible), []
        return self._attention.take_mean_keys() / (visible * tokens)


def _per_frame(values: Sequence[float], levels: Sequence[int], num_frames: int, device: torch.device) -> Tensor:
    """What holds at the level of each latent frame, float32 [1, T]."""
    return torch.tensor([values[level] for level in levels], device=device).repeat_interleave(num_frames)[None]

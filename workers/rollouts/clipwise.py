"""Clip by clip (LongVie 2): a whole clip is denoised at once, both ways in time; history enters as extra tokens.

As published nothing is remembered between clips but pictures: the last ones of a clip become two latent frames that
run through the model before the next clip's tokens, at its timestep, in every step, without control.

A persistent cache is ours, the paper has none. With one (`remembers`) a finished clip goes through one more call,
its clean pass at timestep 0 under its prompt, control and history, and the keys of its own tokens are remembered; later
clips see them besides their history tokens. Left out are the latent frames that the next clip is given again anyhow:
the last one (its picture is the next clip's first) and as many before it as there are history frames. Times then count
on through the video: latent frame i of clip j stands at (T - 1) j + i, history directly before the clip. So each
instant is seen once, and without a cache the model sees exactly what it was published with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.contracts import Kernel, Moment
from workers.denoise import Schedule, step_euler
from workers.errors import NonFiniteLatents
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.control_branch import ControlBranch, ControlWalk
from workers.model.dit import AttendPrompt, CausalDiT, attend_prompt_dense
from workers.model.rope import grid_positions
from workers.rollout import CleanChunk
from workers.rollouts.calls import CallExtras, ModelCalls, guide
from workers.rollouts.clip_inputs import ClipInputs, history_of

ReadClip = Callable[[int, CleanChunk | None], ClipInputs]
"""(clip_index, clip before) -> inputs; asked when the clip begins, so the one before can be decoded by then."""


@dataclass(frozen=True)
class ClipPlan:
    """What is rolled out, given a model."""

    num_clips: int
    schedule: Schedule
    guidance: float
    """1 means one call per step, with the prompt alone."""
    read: ReadClip
    remembers: bool = False
    """False as published: nothing is given to the cache."""
    history_latent_frames: int = 2
    """History frames of every clip but the first; decides what a persistent cache leaves out."""


@dataclass(frozen=True)
class _Call:
    """What stays the same in all calls of a clip."""

    inputs: ClipInputs
    walks: tuple[ControlWalk | None, ...]
    """The control branch under each prompt."""
    history_BTCHW: Tensor | None


class ClipwiseRollout:
    """One video on one model.

    Args:
        model: In evaluation mode.
        branch: Its control module, or None.
        attention: Fresh, with an empty cache, or with that of the clips before `first_clip`.
        kernel: Attention inside the control module.
        stopwatch: Gets the stages "denoise" and "cache".
        attend_prompt: Cross-attention of the model, not of its control module.
    """

    def __init__(
        self,
        model: CausalDiT,
        branch: ControlBranch | None,
        attention: RolloutAttention,
        kernel: Kernel,
        stopwatch: Stopwatch,
        attend_prompt: AttendPrompt = attend_prompt_dense,
    ) -> None:
        self._calls, self._branch, self._kernel = ModelCalls(model, attention), branch, kernel
        self._attention, self._stopwatch, self._attend_prompt = attention, stopwatch, attend_prompt
        attention.announce_to(attend_prompt)

    @torch.inference_mode()
    def run(self, plan: ClipPlan, first_clip: int = 0, before: CleanChunk | None = None) -> Iterator[CleanChunk]:
        """Clips from `first_clip` on, in order; a later start than 0 gets the clip before.

        Raises:
            NonFiniteLatents: A clip holds a NaN or an infinity; it is neither yielded nor remembered.
        """
        for index in range(first_clip, plan.num_clips):
            with self._stopwatch.stage("denoise"):
                call = self._prepare(plan.read(index, before))
                self._attention.begin_chunk(self._positions(plan, index, call))
                latents = self._denoise(plan, index, call)
                if not bool(torch.isfinite(latents).all()):
                    raise NonFiniteLatents(f"clip {index} holds NaN or infinity after its last denoising step")
            density = self._density(plan, index, call)
            with self._stopwatch.stage("cache"):
                if plan.remembers and index + 1 < plan.num_clips:
                    self._remember(plan, index, latents, call)
                self._attention.end_chunk()
            before = CleanChunk(index, latents, self._attention.cache.num_bytes, density)
            yield before

    def _prepare(self, inputs: ClipInputs) -> _Call:
        model, branch = self._calls.model, self._branch
        walks: tuple[ControlWalk | None, ...] = (None,) * len(inputs.prompts)
        if branch is not None:
            assert inputs.dense_BTCHW is not None, "a control branch needs both maps"
            assert inputs.sparse_BTCHW is not None
            maps = branch.embed_maps(model, inputs.dense_BTCHW, inputs.sparse_BTCHW)
            walks = tuple(branch.follow(maps, p.control, self._kernel) for p in inputs.prompts if p.control is not None)
            assert len(walks) == len(inputs.prompts), "every prompt is projected for the control branch too"
        history = None if inputs.history_BTCHW is None else history_of(inputs.history_BTCHW, model.backbone)
        return _Call(inputs, walks, history)

    def _positions(self, plan: ClipPlan, index: int, call: _Call) -> Tensor:
        """Times of history and clip; without a cache they begin at 0, as published (differences alone matter)."""
        shape = call.inputs.noise_BTCHW.shape
        num_history = 0 if call.history_BTCHW is None else call.history_BTCHW.shape[1]
        start = (shape[1] - 1) * index - num_history if plan.remembers else 0
        time = torch.arange(start, start + num_history + shape[1], device=self._calls.device)
        return grid_positions(time, *self._calls.model.backbone.token_grid((shape[-2], shape[-1])))

    def _denoise(self, plan: ClipPlan, index: int, call: _Call) -> Tensor:
        """Clean latents of one clip, float32."""
        schedule = plan.schedule
        latents = call.inputs.first_latents()
        for step, (sigma, timestep) in enumerate(zip(schedule.sigmas, schedule.timesteps, strict=True)):
            flows = [
                self._flow(latents, timestep, Moment(index, step, schedule.num_steps, sigma, branch=branch), call)
                for branch in range(len(call.inputs.prompts))
            ]
            latents = step_euler(latents, guide(flows, plan.guidance), sigma, schedule.next_sigma(step))
        return latents

    def _flow(
        self, latents: Tensor, timestep: float, moment: Moment, call: _Call, remembered: slice | None = None
    ) -> Tensor:
        """Flow of the clip alone, float32; its history is in the call but not in the result."""
        model, num_frames = self._calls.model, latents.shape[1]
        x = torch.cat((latents.to(model.dtype), call.inputs.condition_BTCHW.to(model.dtype)), dim=2)
        if call.history_BTCHW is not None:
            x = torch.cat((call.history_BTCHW.to(x.dtype), x), dim=1)
        # This model was trained with timesteps in its own dtype: in bfloat16 those above 512 are multiples of 4.
        time_BT = torch.full(x.shape[:2], timestep, device=x.device).to(model.dtype).float()
        extras = CallExtras(add_after_layer=call.walks[moment.branch], attend_prompt=self._attend_prompt)
        keys = call.inputs.prompts[moment.branch].keys
        return self._calls.flow(x, time_BT, moment, keys, extras, remembered)[:, -num_frames:]

    def _remember(self, plan: ClipPlan, index: int, latents: Tensor, call: _Call) -> None:
        """The clean pass of one clip."""
        num_history = 0 if call.history_BTCHW is None else call.history_BTCHW.shape[1]
        frame_tokens = self._frame_tokens(latents)
        kept = latents.shape[1] - 1 - plan.history_latent_frames
        remembered = slice(num_history * frame_tokens, (num_history + kept) * frame_tokens)
        self._flow(latents, 0.0, Moment(index, noise_level=0.0, is_clean_pass=True), call, remembered)
        self._attention.take_mean_keys()

    def _frame_tokens(self, latents: Tensor) -> int:
        grid = self._calls.model.backbone.token_grid((latents.shape[-2], latents.shape[-1]))
        return math.prod(grid)

    def _density(self, plan: ClipPlan, index: int, call: _Call) -> float:
        """Keys seen over those of this call and all that a cache could have remembered."""
        num_frames = call.inputs.noise_BTCHW.shape[1]
        num_history = 0 if call.history_BTCHW is None else call.history_BTCHW.shape[1]
        possible = num_history + num_frames + index * (num_frames - 1 - plan.history_latent_frames)
        return self._attention.take_mean_keys() / (possible * self._frame_tokens(call.inputs.noise_BTCHW))

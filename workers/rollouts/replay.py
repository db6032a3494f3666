"""Replay: run our rollouts on everything another implementation drew, and say call by call how far apart we are.

A recording is one safetensors file: named float32 tensors, and `ReplaySettings` as JSON under "settings" in its
metadata. Latents are [1, T, C, H, W]. Inputs, which must be there:

- chunks (`chunkwise`, `rolling`): `prompt.text` [1, P, E], `prompt.negative` with guidance, `prompt.image` for I2V;
  `noise.initial`, the starting noise of the whole video, or `noise.{chunk}.0` chunk by chunk; and the fresh noise that
  is added before each later step, `noise.{chunk}.{step}` (in a rolling window the step is the level of that chunk).
  A chunkwise video that went on from given latents has these as `latents.initial`, whole chunks; chunks are counted
  with them, `noise.initial` begins behind them;
- clips (`clipwise`): `clip.{j}.text`, `.negative`, `.image`, `.noise`, `.condition`, and, where there are any,
  `.dense`, `.sparse`, `.history`: as in `ClipInputs`.

Outputs, of which any may be there: `call.{chunk}.{step}.{branch}.latents`, `.timestep`, `.flow` of single model calls,
with "clean" for the step of a clean pass (a rolling window is named by its oldest chunk and that chunk's level; branch
is 0 for the prompt, 1 for the negative one; of a clip the noisy channels of its own frames, without history), and
`chunk.{index}`, the finished latents. What is there is compared.
Use float32 and the CPU: a right port of a few chunks stays below 1e-4, and 1e-2 hides real errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.contracts import Kernel, Moment
from workers.denoise import make_flow_schedule, warp_steps
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import Native
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT
from workers.rollout import CleanChunk, Rollout, RolloutPlan
from workers.rollouts.clip_inputs import ClipInputs, project_clip_prompt
from workers.rollouts.clipwise import ClipPlan, ClipwiseRollout
from workers.rollouts.native import NativeParts, native_parts
from workers.rollouts.rolling_window import RollingWindowRollout


@dataclass(frozen=True)
class ReplaySettings:
    """How the recorded run was sampled."""

    rollout: Literal["chunkwise", "rolling", "clipwise"]
    num_chunks: int
    """Chunks, or clips."""
    shift: float = 5.0
    step_list: tuple[int, ...] = ()
    """Steps of chunks before the shift, such as 1000, 750, 500, 250."""
    num_steps: int = 50
    """Euler steps of a clip."""
    guidance: float = 1.0
    attended_latent_frames: int = 21
    sink_latent_frames: int = 0


@dataclass(frozen=True)
class Recording:
    """A run as tensors."""

    settings: ReplaySettings
    tensors: Mapping[str, Tensor]

    def save(self, path: Path) -> None:
        """Write the file."""
        tensors = {
            name: tensor.float().clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()
        }
        save_file(tensors, path, metadata={"settings": json.dumps(asdict(self.settings))})

    @staticmethod
    def open(path: Path) -> Recording:
        """Read a file."""
        with safe_open(path, framework="pt") as file:
            settings = json.loads(file.metadata()["settings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings["step_list"] = tuple(settings["step_list"])
        return Recording(ReplaySettings(**settings), tensors)

    def read(self, name: str) -> Tensor:
        """An input.

        Raises:
            ValueError: The recording lacks it.
        """
        if name not in self.tensors:
            raise ValueError(f"the recording has no tensor {name!r}, which its {self.settings.rollout} rollout needs")
        return self.tensors[name]


@dataclass(frozen=True)
class Difference:
    """One recorded output beside ours."""

    name: str
    max_abs: float
    """Largest absolute difference; NaN where either side holds one, infinity where shapes differ."""
    std: float
    """Standard deviation of what was recorded."""


@dataclass(frozen=True)
class ReplayReport:
    """Every output that both sides have, in the order of our calls."""

    differences: tuple[Difference, ...]
    not_made: tuple[str, ...]
    """Recorded outputs of calls that we do not make, such as clean passes whose keys nobody reads."""

    @property
    def worst(self) -> float:
        """Largest difference; NaN if there is one anywhere, or nothing was compared."""
        return float(torch.tensor([d.max_abs for d in self.differences] or [math.nan]).max())


@dataclass(frozen=True)
class ReplayModel:
    """What replays: any small configuration, its weights loaded under the published names."""

    dit: CausalDiT
    kernel: Kernel
    branch: ControlBranch | None = None
    parts: NativeParts | None = None
    """Cache, policy and times; None takes the native ones of the recording's settings."""


def replay(model: ReplayModel, recording: Recording) -> ReplayReport:
    """Run with the recorded inputs and compare all recorded outputs."""
    ours = run_recorded(model, recording)
    recorded = recording.tensors
    differences = tuple(_compare(name, ours[name], recorded[name]) for name in ours if name in recorded)
    outputs = (name for name in recorded if name.startswith(("call.", "chunk.")))
    return ReplayReport(differences, tuple(name for name in outputs if name not in ours))


@torch.inference_mode()
def run_recorded(model: ReplayModel, recording: Recording) -> dict[str, Tensor]:
    """All outputs of a rollout on the recorded inputs; with them a recording of ours is complete."""
    outputs: dict[str, Tensor] = {}
    num_channels = model.dit.backbone.latent_channels
    num_frames = recording.read("clip.0.noise").shape[1] if recording.settings.rollout == "clipwise" else 0
    attention = _WatchedAttention(model, model.parts or _native_parts(model, recording))

    def watch(module: Any, args: tuple[Any, ...], flow: Tensor) -> None:
        at = attention.moment
        label = f"call.{at.chunk_index}.{'clean' if at.is_clean_pass else at.step_index}.{at.branch}"
        outputs[f"{label}.latents"] = args[0][:, -num_frames:, :num_channels].float()
        outputs[f"{label}.timestep"] = args[1][:, -num_frames:]
        outputs[f"{label}.flow"] = flow[:, -num_frames:].float()

    handle = model.dit.register_forward_hook(watch)
    try:
        for chunk in _roll(model, recording, attention):
            outputs[f"chunk.{chunk.index}"] = chunk.latents_BTCHW
    finally:
        handle.remove()
    return outputs


class _WatchedAttention(RolloutAttention):
    """Remembers which call is being made."""

    def __init__(self, model: ReplayModel, parts: NativeParts) -> None:
        super().__init__(model.dit.backbone, parts.cache, parts.policy, model.kernel, reindex=parts.reindex)
        self.moment = Moment(0)

    def begin_call(self, moment: Moment, remembered: slice | None = None) -> None:
        self.moment = moment
        super().begin_call(moment, remembered)


def _native_parts(model: ReplayModel, recording: Recording) -> NativeParts:
    settings = recording.settings
    native = Native(
        num_steps=len(settings.step_list) or settings.num_steps,
        shift=settings.shift,
        attended_latent_frames=settings.attended_latent_frames,
        sink_latent_frames=settings.sink_latent_frames,
    )
    backbone = replace(model.dit.backbone, native=native, rollout=settings.rollout)
    return native_parts(backbone, _latent_size(recording))


def _roll(model: ReplayModel, recording: Recording, attention: RolloutAttention) -> Iterator[CleanChunk]:
    stopwatch = Stopwatch(model.dit.head.modulation.device)
    kind = recording.settings.rollout
    if kind == "clipwise":
        clips = ClipwiseRollout(model.dit, model.branch, attention, model.kernel, stopwatch)
        return clips.run(_clip_plan(model, recording))
    plan, given = _chunk_plan(model, recording), _given_chunks(model, recording)
    if kind == "rolling":
        if given:
            raise ValueError("latents.initial: a rolling window begins with noise; only chunkwise rollouts go on")
        return RollingWindowRollout(model.dit, attention, stopwatch).run(plan)
    rollout = Rollout(model.dit, attention, stopwatch)
    for index, latents in enumerate(given):
        rollout.remember(plan, index, latents)
    return rollout.run(plan, first_chunk=len(given))


def _given_chunks(model: ReplayModel, recording: Recording) -> tuple[Tensor, ...]:
    """Chunks of latents that the video went on from."""
    given, num_frames = recording.tensors.get("latents.initial"), model.dit.backbone.chunk_latent_frames
    if given is None:
        return ()
    if given.shape[1] % num_frames:
        raise ValueError(f"latents.initial: {given.shape[1]} latent frames are no whole chunks of {num_frames}")
    chunks: tuple[Tensor, ...] = given.split(num_frames, dim=1)
    return chunks


def _chunk_plan(model: ReplayModel, recording: Recording) -> RolloutPlan:
    settings, tensors, num_given = recording.settings, recording.tensors, len(_given_chunks(model, recording))
    image = tensors.get("prompt.image")
    names = ("prompt.text",) if settings.guidance == 1.0 else ("prompt.text", "prompt.negative")
    prompts = [model.dit.project_prompt(recording.read(name), None, image) for name in names]
    num_frames = model.dit.backbone.chunk_latent_frames

    def noise(chunk_index: int, step_index: int) -> Tensor:
        if step_index == 0 and "noise.initial" in tensors:
            start = (chunk_index - num_given) * num_frames
            initial = tensors["noise.initial"]
            if initial.shape[1] < start + num_frames:
                raise ValueError(
                    f"noise.initial: {initial.shape[1]} latent frames, chunk {chunk_index} begins at {start}"
                )
            return initial[:, start : start + num_frames]
        return recording.read(f"noise.{chunk_index}.{step_index}")

    return RolloutPlan(
        num_chunks=settings.num_chunks,
        latent_size=_latent_size(recording),
        schedule=warp_steps(settings.step_list, settings.shift),
        guidance=settings.guidance,
        noise=noise,
        prompt=lambda index: prompts,
        control=lambda index: None,
    )


def _clip_plan(model: ReplayModel, recording: Recording) -> ClipPlan:
    settings, tensors = recording.settings, recording.tensors
    names = ("text",) if settings.guidance == 1.0 else ("text", "negative")

    def read(index: int, before: CleanChunk | None) -> ClipInputs:
        clip = f"clip.{index}"
        image = tensors.get(f"{clip}.image")
        return ClipInputs(
            noise_BTCHW=recording.read(f"{clip}.noise"),
            prompts=tuple(
                project_clip_prompt(model.dit, model.branch, recording.read(f"{clip}.{name}"), image) for name in names
            ),
            condition_BTCHW=recording.read(f"{clip}.condition"),
            dense_BTCHW=tensors.get(f"{clip}.dense"),
            sparse_BTCHW=tensors.get(f"{clip}.sparse"),
            history_BTCHW=tensors.get(f"{clip}.history"),
        )

    schedule = make_flow_schedule(settings.num_steps, settings.shift)
    return ClipPlan(settings.num_chunks, schedule, settings.guidance, read)


def _latent_size(recording: Recording) -> tuple[int, int]:
    names = ("noise.initial", "noise.0.0", "clip.0.noise")
    first = next((name for name in names if name in recording.tensors), names[1])
    height, width = recording.read(first).shape[-2:]
    return height, width


def _compare(name: str, ours: Tensor, recorded: Tensor) -> Difference:
    if ours.shape != recorded.shape:
        return Difference(name, math.inf, float(recorded.std()))
    return Difference(name, float((ours.float() - recorded).abs().max()), float(recorded.std(correction=0)))

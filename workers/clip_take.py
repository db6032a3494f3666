"""The clips of one take: control files in, pictures of each clip out. The order of all else is `pipeline.py`'s."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workers.assemble import LoadedModel
from workers.contracts import PromptAttention
from workers.denoise import draw_noise, make_flow_schedule
from workers.errors import BadPrompt
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.text_encoder import FoldedText, fold_padding
from workers.model.vae import to_pictures
from workers.model.wan_vae import WanVae
from workers.rollout import CleanChunk
from workers.rollouts.clip_source import ClipModels, ClipSource, ClipWishes
from workers.rollouts.clipwise import ClipPlan, ClipwiseRollout
from workers.task import RenderTask
from workers.video.control_clips import ControlClips, read_control_clips

CLIP_LIST, FIRST_PICTURE = "cond.json", "first.png"
"""What the folder of a task's control inputs holds, beside the videos that the list names."""


def roll_out_clips(
    task: RenderTask,
    model: LoadedModel,
    attention: RolloutAttention,
    stopwatch: Stopwatch,
    attend_prompt: PromptAttention,
) -> Iterator[tuple[CleanChunk, NDArray[np.uint8]]]:
    """Finished clips with their pictures [n, H, W, 3]: 81, then 80 new ones a clip.

    The texts of the list hold, clip by clip; the task's own prompt only names the video.

    Raises:
        BadPrompt: The task names no control inputs, or they do not fit; the message says which clip.
    """
    clips = open_clips(task, model)
    config, backbone = model.config, model.backbone
    shape = (1, backbone.chunk_latent_frames, backbone.latent_channels, *model.latent_size)
    wishes = ClipWishes(
        clips=clips,
        noise_BTCHW=draw_noise(task.seed, 0, 0, shape),
        negative_prompt=None if config.sampling.guidance == 1.0 else task.negative_prompt,
        width=config.video.width,
        height=config.video.height,
    )
    source = ClipSource(_clip_models(model, stopwatch), wishes)
    plan = ClipPlan(
        num_clips=len(clips.clips),
        schedule=make_flow_schedule(config.sampling.num_steps, config.sampling.shift),
        guidance=config.sampling.guidance,
        read=source.read,
        remembers=config.cache.kind != "native",
    )
    rollout = ClipwiseRollout(model.dit, model.control_branch, attention, model.kernel, stopwatch, attend_prompt)
    for clip in rollout.run(plan):
        with stopwatch.stage("vae"):
            pictures = to_pictures(source.decode(clip)[0]).cpu().numpy()
        yield clip, pictures


def open_clips(task: RenderTask, model: LoadedModel) -> ControlClips:
    """The control inputs of a task, checked.

    Raises:
        BadPrompt: See `roll_out_clips`.
    """
    if task.control is None:
        raise BadPrompt(
            f"control: {model.backbone.name} needs a folder with {CLIP_LIST}, {FIRST_PICTURE} and the videos it names"
        )
    folder = Path(task.control)
    return read_control_clips(folder / CLIP_LIST, folder / FIRST_PICTURE, model.backbone.num_chunks(task.num_frames))


def _clip_models(model: LoadedModel, stopwatch: Stopwatch) -> ClipModels:
    assert isinstance(model.vae, WanVae)
    assert model.image_encoder is not None

    def read_text(text: str) -> FoldedText:
        with stopwatch.stage("text"):
            return fold_padding(model.text_encoder.encode([text]), model.backbone.text_tokens)

    return ClipModels(model.dit, model.control_branch, model.vae, model.image_encoder, read_text, model.device)

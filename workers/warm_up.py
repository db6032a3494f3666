"""What the first take of a process would pay for is paid while the actor loads: compiling, a GPU's libraries, kernels.

Two chunks are made as a take makes them and thrown away, so that all that follows takes the same time: the driver's
prediction holds from the first take on, and the seconds count as loading, which they are.
"""

from __future__ import annotations

import logging
import time

from workers.assemble import LoadedModel, prepare_take
from workers.metrics import Stopwatch
from workers.pipeline import TakeRecord, as_render_error, generate, utc_now
from workers.task import PromptSegment, RenderTask
from workers.video.encode import Frames

logger = logging.getLogger(__name__)

NUM_CHUNKS = 2  # the first one looks back at nothing and is remembered, the second one looks back


class _Nowhere:
    """A writer's place in a take that nobody keeps."""

    blocked_s = 0.0

    def write(self, frames_THWC: Frames) -> None:
        """Drop them."""


def needs_warm_up(model: LoadedModel) -> bool:
    """Is the first chunk of a process slower than the others? On a plain CPU it is not; a clip is a whole take."""
    is_slow_at_first = model.device.type == "cuda" or model.config.backbone.compiled
    return is_slow_at_first and model.backbone.rollout != "clipwise"


def warm_up(model: LoadedModel) -> None:
    """Make two chunks for nobody. What a take may fail with is left to the takes.

    Raises:
        RenderError: The process is unfit for more (an error of the device).
    """
    started = time.perf_counter()
    try:
        generate(_task(model), model, prepare_take(model, 0), _Nowhere(), _record(model), lambda *_: None)
        if model.seat is not None:
            model.seat.rehearse()
    except Exception as error:
        meaning = as_render_error(error)
        if meaning.fresh_process:
            raise meaning from error
        logger.warning("warming up failed: %s: %s", meaning.kind, meaning)
    logger.info("warmed up", extra={"warm_up_s": round(time.perf_counter() - started, 3)})


def _task(model: LoadedModel) -> RenderTask:
    backbone = model.backbone
    return RenderTask(
        task_id="warm-up-0",
        item_id="warm-up",
        sample_index=0,
        attempt="e0a0",
        segments=(PromptSegment(frame=0, prompt="the camera stands still"),),
        seed=0,
        num_frames=backbone.num_video_frames(NUM_CHUNKS * backbone.chunk_latent_frames),
    )


def _record(model: LoadedModel) -> TakeRecord:
    return TakeRecord(utc_now(), time.perf_counter(), Stopwatch(model.device))

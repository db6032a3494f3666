"""Takes over a small tile table, for tests on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from cluster.object_store import open_store
from workers.assemble import LoadedModel
from workers.pipeline import render_take
from workers.task import PromptSegment, RenderResult, RenderTask

SMALL = {"budget_latent_frames": 15, "spare_latent_frames": 3}  # a history of three chunks, of which it frees one


def make_task(num_frames: int, **fields: Any) -> RenderTask:
    segments = (
        PromptSegment(frame=0, prompt="a red valley, the camera pans left"),
        PromptSegment(frame=num_frames // 2, prompt="a lake in a green valley, the camera pans down"),
    )
    return RenderTask(
        item_id="a", sample_index=0, attempt="e1a1", segments=segments, seed=7, num_frames=num_frames,
        **{"task_id": "a-0"} | fields,
    )  # fmt: skip


class FreeTurn(contextlib.nullcontext[None]):
    """A GPU that nobody else wants."""

    held_s = 0.0


def render(model: LoadedModel, root: Path, num_frames: int = 84, **task: Any) -> RenderResult:
    return render_take(make_task(num_frames, **task), model, open_store(str(root)), FreeTurn(), lambda *_: None)

"""A worker that renders nothing: what is left is the service itself. Its results look like real ones."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence

from jobs.rows import JobFacts
from jobs.shards import PlannedTask
from workers.task import (
    ActorInfo,
    Progress,
    PromptSegment,
    QualityScores,
    RenderResult,
    RenderTask,
    StageSeconds,
)

STAGES, SCORES = StageSeconds(denoise=1.0, vae=0.25), QualityScores(mean_luma=0.5)
HASH = "0123456789abcdef" * 4


def facts(store_url: str) -> JobFacts:
    """Facts of a bench job."""
    return JobFacts("bench", store_url, "prompts.txt", HASH, "0.1.0")


def tasks(count: int) -> Iterator[PlannedTask]:
    """So many different tasks, made as they are asked for."""
    for number in itertools.islice(itertools.count(), count):
        prompt = f"a red ball rolls over hill {number} while the camera pans left"
        segments = (PromptSegment(frame=0, prompt=prompt),)
        yield PlannedTask(f"{number:020x}-0", f"{number:020x}", 0, segments, "", number, 96, number + 1, prompt)


class NoOpActor:
    """The shape of RenderActor."""

    def __init__(self, setup: object) -> None:
        self._num_done = 0

    def load(self) -> ActorInfo:
        return ActorInfo(
            pid=os.getpid(),
            hostname="bench",
            device="cpu",
            gpu_name="cpu",
            backend="none",
            model_id="none",
            model_revision=HASH,
            torch_version="",
            cuda_version="",
            load_s=0.0,
        )

    def run(self, payload: Sequence[RenderTask]) -> list[RenderResult]:
        self._num_done += len(payload)
        return [no_op_result(task) for task in payload]

    def progress(self) -> Progress:
        return Progress(ticks=self._num_done)

    def withdraw(self, payload: object) -> None:
        pass

    def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


def no_op_result(task: RenderTask) -> RenderResult:
    """A finished video that took no time."""
    return RenderResult(
        task_id=task.task_id,
        attempt=task.attempt,
        video_key=f"videos/00/{task.task_id}-01234567-{task.attempt}.mp4",
        num_bytes=1_000_000,
        sha256=HASH,
        frames_sha256=HASH,
        width=128,
        height=128,
        fps=16,
        num_frames=task.num_frames,
        codec="h264",
        pix_fmt="yuv420p",
        crf=18,
        model_id="longtake-world",
        model_revision=HASH,
        backend="none",
        kv_policy="dense",
        kv_bytes=0,
        wall_s=0.0,
        gpu_s=1e-5,
        stage_s=STAGES,
        peak_gpu_bytes=0,
        peak_rss_bytes=0,
        quality=SCORES,
        started_at="2026-11-23T22:00:00+00:00",
        finished_at="2026-11-23T22:00:00+00:00",
    )

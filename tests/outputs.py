"""A finished job's output made by the project's own writers, for tests of those who read it: no Ray, no model.

Videos are real MP4 files from `VideoWriter` (grey noise), rows go through the real journal and parts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cluster.object_store import ObjectStore, open_store
from jobs.commit import write_card, write_success
from jobs.held_job import HeldJob, take_job
from jobs.job_record import begin_record
from jobs.lease import Owner
from jobs.prompt_row import Prompt, RowLimits, read_row
from jobs.prompts import PromptScan
from jobs.replay import Replay
from jobs.rows import AttemptFacts, JobFacts, Row, success_row
from jobs.shards import PlannedTask, TaskDefaults, segment_prefix, tasks_of, video_key
from jobs.spec import JobSpec
from jobs.spec_text import build_spec
from tests.fakes import ManualClock
from workers.config import VideoConfig
from workers.task import QualityScores, RenderResult, StageSeconds
from workers.video.writer import VideoFile, VideoWriter

VIDEO = VideoConfig(width=32, height=32, num_frames=8, fps=8, segment_frames=8)
NOW = "2026-01-02T03:04:05.000006+00:00"
FINGERPRINT = "f" * 64


def output_spec(out: Path | str, job_id: str = "night") -> JobSpec:
    """The spec that such an output could have come from."""
    video = {("render", "video", name): getattr(VIDEO, name) for name in ("width", "height", "num_frames", "fps")}
    return build_spec(flags={("prompts", "url"): "p.jsonl", ("out",): str(out), ("job_id",): job_id} | video)


def planned(item_id: str, **columns: object) -> PlannedTask:
    """One task of a row."""
    row = read_row(1, {"prompt": f"a view of {item_id}", "id": item_id, **columns}, RowLimits())
    assert isinstance(row, Prompt)
    return next(tasks_of(row, TaskDefaults(seed=0, samples=1, num_frames=VIDEO.num_frames)))


def take(store: ObjectStore, job_id: str = "night") -> HeldJob:
    """Become the driver of the job."""
    return take_job(store, Replay(store, job_id), Owner.current(), clock=ManualClock(), ttl_s=1.0)


def write_video(store: ObjectStore, task: PlannedTask, attempt: str = "e1a1") -> VideoFile:
    """A real MP4 of noise that depends on the task's seed."""
    rng = np.random.default_rng(task.seed)
    frames = rng.integers(0, 255, (task.num_frames, VIDEO.height, VIDEO.width, 3), dtype=np.uint8)
    key, segments = video_key(task.task_id, FINGERPRINT, attempt), segment_prefix(task.task_id, attempt).rstrip("/")
    writer = VideoWriter(store, key, segments, VIDEO, {"item_id": task.item_id}, task.num_frames)
    writer.write(frames)
    return writer.finish()


def finished_row(store: ObjectStore, task: PlannedTask, video: VideoFile | None = None, attempt: int = 1) -> Row:
    """The row of a task; of an imagined video unless a real one is given."""
    name = f"e1a{attempt}"
    result = RenderResult(
        task_id=task.task_id,
        attempt=name,
        video_key=video.key if video else video_key(task.task_id, FINGERPRINT, name),
        num_bytes=video.num_bytes if video else 1000,
        sha256=video.sha256 if video else "0" * 64,
        frames_sha256=video.frames_sha256 if video else "1" * 64,
        width=VIDEO.width,
        height=VIDEO.height,
        fps=VIDEO.fps,
        num_frames=task.num_frames,
        codec="h264",
        pix_fmt="yuv420p",
        crf=VIDEO.crf,
        model_id="tiny-test",
        model_revision="a" * 64,
        backend="sdpa",
        kv_policy="dense",
        kv_bytes=1,
        wall_s=1.0,
        gpu_s=0.5,
        stage_s=StageSeconds(),
        peak_gpu_bytes=0,
        peak_rss_bytes=1,
        quality=QualityScores(),
        started_at=NOW,
        finished_at=NOW,
    )
    return success_row(facts_of(store), task, result, AttemptFacts(epoch=1, number=attempt), NOW)


def facts_of(store: ObjectStore) -> JobFacts:
    """What all rows of such a job share."""
    return JobFacts("night", store.url, "p.jsonl", FINGERPRINT, "0.1.0")


def make_output(root: Path | str, num_items: int = 4, *, with_videos: bool = True, num_parts: int = 2) -> ObjectStore:
    """A complete job below `root`: videos, `num_parts` manifest parts, job.json, card and `_SUCCESS`."""
    store = open_store(str(root))
    spec = output_spec("out")
    scan = PromptScan(num_items, num_items, num_items, num_items * VIDEO.num_frames, {}, ())
    begin_record(store, spec, scan, {})
    job = take(store)
    for index in range(num_items):
        task = planned(f"item-{index}", mood=["calm", "wild"][index % 2], rank=index)
        job.commit([finished_row(store, task, write_video(store, task) if with_videos else None)])
        if (index + 1) % -(-num_items // num_parts) == 0:
            job.publish()
    job.close()
    write_card(store, "night", {"videos": num_items})
    write_success(store, "night", job.ledger.summary())
    return store

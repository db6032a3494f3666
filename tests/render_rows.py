"""Ready-made tasks, results and rows for tests of the driver's side; every value may be overridden."""

from __future__ import annotations

from typing import Any

from jobs.rows import AttemptFacts, JobFacts, Row, failure_row, success_row
from jobs.shards import PlannedTask, video_key
from workers.task import (
    ActorInfo,
    ChunkMetrics,
    PromptSegment,
    QualityScores,
    RenderFailure,
    RenderResult,
    RenderTask,
    StageSeconds,
)

FACTS = JobFacts(
    job_id="night",
    store_url="memory://job",
    input_uri="prompts.txt",
    render_fingerprint="ab" * 32,
    code_version="0.1.0",
    usd_per_gpu_hour=3.6,
    usd_rate_source="spec",
)
ACTOR = ActorInfo(
    node_id="node-1",
    pid=1,
    hostname="host",
    device="cpu",
    gpu_name="cpu",
    backend="sdpa-2.13",
    model_id="longtake-world",
    model_revision="cd" * 32,
    torch_version="2.13.0",
    cuda_version="",
    load_s=1.0,
)
NOW = "2026-11-23T22:00:00+00:00"


def planned(name: str, sample: int = 0, *, num_frames: int = 96, **extra: Any) -> PlannedTask:
    """One planned task; keyword arguments become the user's columns."""
    return PlannedTask(
        task_id=f"{name}-{sample}",
        item_id=name,
        sample_index=sample,
        segments=(PromptSegment(frame=0, prompt=f"a take of {name}"),),
        negative_prompt="",
        seed=7,
        num_frames=num_frames,
        input_row=1,
        prompt=f"a take of {name}",
        extra=extra,
    )


def result_of(task: RenderTask, **changes: Any) -> RenderResult:
    """What an actor would return for a task."""
    values: dict[str, Any] = {
        "task_id": task.task_id,
        "attempt": task.attempt,
        "video_key": video_key(task.task_id, FACTS.render_fingerprint, task.attempt),
        "num_bytes": 1000,
        "sha256": "0" * 64,
        "frames_sha256": "1" * 64,
        "width": 128,
        "height": 128,
        "fps": 16,
        "num_frames": task.num_frames,
        "codec": "h264",
        "pix_fmt": "yuv420p",
        "crf": 18,
        "model_id": "longtake-world",
        "model_revision": "cd" * 32,
        "backend": "sdpa-2.13",
        "kv_policy": "dense",
        "kv_bytes": 4096,
        "wall_s": 2.0,
        "gpu_s": 1.5,
        "upload_wait_s": 0.25,
        "stage_s": StageSeconds(denoise=1.0),
        "peak_gpu_bytes": 0,
        "peak_rss_bytes": 1 << 28,
        "quality": QualityScores(mean_luma=0.5),
        "chunks": (ChunkMetrics(chunk_index=0, seconds=1.0, kv_bytes=4096, density=1.0),),
        "started_at": "2026-11-23T21:59:00+00:00",
        "finished_at": "2026-11-23T21:59:02.5+00:00",
    }
    return RenderResult(**(values | changes))


def failure_of(task: RenderTask, **changes: Any) -> RenderFailure:
    """A failure of a task as an actor would return it."""
    values: dict[str, Any] = {
        "task_id": task.task_id,
        "attempt": task.attempt,
        "kind": "unknown",
        "message": "broken",
        "retryable": True,
    }
    return RenderFailure(**(values | changes))


def succeeded(name: str, sample: int = 0, *, epoch: int = 1, number: int = 1, **extra: Any) -> Row:
    """The row of a finished task."""
    task = planned(name, sample, **extra)
    attempt = AttemptFacts(epoch=epoch, number=number, actor=ACTOR, node_id="node-1")
    return success_row(FACTS, task, result_of(task.attempt(f"e{epoch}a{number}")), attempt, NOW)


def given_up(name: str, sample: int = 0, *, kind: Any = "oom", generation: int = 0) -> Row:
    """The row of a task that was given up."""
    attempt = AttemptFacts(epoch=1, number=3, generation=generation, wasted_gpu_s=4.0)
    return failure_row(FACTS, planned(name, sample), kind, f"{kind} happened", attempt, NOW)

"""The only types that cross the process boundary between driver and actor. They load without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from workers.config import RenderConfig

FULL_PRECISION = "float32"
"""Stands in `RenderResult.ladder` beside the rungs of an attempt that was asked for `full_precision`."""


class Record(BaseModel):
    """Base of the boundary types: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PromptSegment(Record):
    """The prompt that holds from one video frame on."""

    frame: int = Field(ge=0, description="First video frame of this prompt.")
    prompt: str


_SEGMENTS_BEGIN = '[{"frame":'


def prompt_text(segments: Sequence[PromptSegment]) -> str:
    """What stands for a take's prompt in manifest and file: the prompt, or the segments as JSON."""
    first = segments[0].prompt
    if len(segments) == 1 and not first.startswith(_SEGMENTS_BEGIN):
        return first
    return json.dumps([s.model_dump() for s in segments], ensure_ascii=False, separators=(",", ":"))


def segments_of(text: str) -> tuple[PromptSegment, ...]:
    """The way back from `prompt_text`."""
    if not text.startswith(_SEGMENTS_BEGIN):
        return (PromptSegment(frame=0, prompt=text),)
    return tuple(PromptSegment.model_validate(part) for part in json.loads(text))


class RenderTask(Record):
    """One video to make: one item with one sample index, in one attempt."""

    task_id: str = Field(description="`<item_id>-<sample_index>`; safe as an object name.")
    item_id: str
    sample_index: int = Field(ge=0)
    attempt: str = Field(pattern=r"^e\d+a\d+$", description="Lease epoch and number of this try: unique in a job.")
    segments: tuple[PromptSegment, ...] = Field(min_length=1)
    negative_prompt: str = ""
    seed: int = Field(ge=0, lt=2**63)
    num_frames: int = Field(ge=1)
    control: str | None = Field(None, description="Folder of control videos, for models that take them.")
    shard: int = Field(0, ge=0, description="Number of the shard it was given out in, for the log.")
    ladder_rung: int = Field(0, ge=0, description="How many out-of-memory steps down this attempt starts from.")
    full_precision: bool = Field(False, description="Compute in float32: an attempt before was not finite.")


class RenderSetup(Record):
    """What an actor needs once, before its first task."""

    job_id: str
    config: RenderConfig
    store_url: str = Field(description="Root of the job's prefix: s3://bucket/prefix/job or an absolute path.")
    num_threads: int = Field(1, ge=1, description="CPU threads of torch in this actor.")


class StageSeconds(Record):
    """Where a task's time went, in seconds; stages overlap, so they need not add up to `wall_s`.

    `encode` and `check` are sums over threads and can each exceed the wall time.
    """

    text: float = 0.0
    denoise: float = 0.0
    cache: float = 0.0
    vae: float = 0.0
    encode: float = 0.0
    upload: float = 0.0
    check: float = 0.0


class QualityScores(Record):
    """What the gate measured over all frames of a take; ratios in [0, 1]."""

    nan: bool = False
    black_ratio: float = 0.0
    frozen_ratio: float = 0.0
    mean_luma: float = 0.0


GuardAction = Literal["tightened", "relaxed", "dense"]
"""What the quality guard did after a chunk: the following ones see more or less, or it was rendered again, densely."""


class ChunkMetrics(Record):
    """One finished chunk: time in seconds, cache size in bytes."""

    chunk_index: int
    seconds: float
    kv_bytes: int
    density: float | None = None
    recall: float | None = None
    guard: GuardAction | None = None


class RenderResult(Record):
    """A video that is complete in the store and was re-opened, counted and hashed."""

    outcome: Literal["succeeded"] = "succeeded"
    task_id: str
    attempt: str
    video_key: str = Field(description="Object key below the job's root.")
    num_bytes: int
    sha256: str = Field(description="Of the file.")
    frames_sha256: str = Field(description="Of the raw RGB frames before encoding, in order.")
    width: int
    height: int
    fps: int
    num_frames: int
    codec: str
    pix_fmt: str
    crf: int
    model_id: str
    model_revision: str = Field(description="SHA-256 over the weight files.")
    backend: str = Field(description="Kernel that ran, with its version.")
    kv_policy: str
    kv_bytes: int = Field(description="What the KV cache takes after the last chunk, or all that it reserves.")
    kv_compression_ratio: float | None = None
    attn_density_mean: float | None = None
    attn_recall_probe: float | None = None
    guard_tightened: int | None = Field(None, description="Chunks after which the guard tightened; null: no guard.")
    guard_dense_chunks: int | None = Field(None, description="Chunks that it rendered again, densely.")
    wall_s: float
    gpu_s: float = Field(description="Seconds in which this task held the GPU.")
    upload_wait_s: float = Field(0.0, description="Part of gpu_s in which generation waited for encoder or store.")
    stage_s: StageSeconds
    peak_gpu_bytes: int
    peak_rss_bytes: int
    quality: QualityScores
    ladder: tuple[str, ...] = ()
    chunks: tuple[ChunkMetrics, ...] = ()
    store_retries: dict[str, int] = Field({}, description="Requests to the store that its actor repeated, by code.")
    started_at: str = Field(description="UTC, ISO 8601.")
    finished_at: str


FailureKind = Literal[
    "invalid_input",
    "oom",
    "nan",
    "timeout",
    "encoder",
    "upload",
    "actor_died",
    "preempted_exhausted",
    "quality",
    "unknown",
]


class RenderFailure(Record):
    """A task that ended without a video, with the one answer the driver needs: would another attempt help?"""

    outcome: Literal["failed"] = "failed"
    task_id: str
    attempt: str
    kind: FailureKind
    message: str = Field(max_length=2048)
    retryable: bool = Field(description="Would another attempt help?")
    fresh_process: bool = Field(False, description="The actor's process must not be used again (CUDA error, leak).")
    gpu_s: float = 0.0
    started_at: str = ""
    finished_at: str = ""


RenderOutcome = Annotated[RenderResult | RenderFailure, Field(discriminator="outcome")]


class ActorInfo(Record):
    """What an actor says of itself once it has loaded."""

    node_id: str = ""
    pid: int
    hostname: str
    device: str
    gpu_name: str
    gpu_id: str = Field("", description="UUID of the GPU; empty on a CPU.")
    backend: str
    model_id: str
    model_revision: str
    torch_version: str
    cuda_version: str
    load_s: float


class Progress(Record):
    """A heartbeat: where the actor is now. `ticks` grows with every chunk, so a hang shows as a number that stands."""

    task_ids: tuple[str, ...] = Field((), description="Shard in hand, oldest first; the first one holds the GPU.")
    running_task_id: str | None = None
    attempt: str | None = None
    frames_done: int = 0
    num_frames: int = 0
    ticks: int = 0
    busy_s: float = Field(0.0, description="GPU-holding seconds since load.")
    upload_wait_s: float = 0.0
    rss_bytes: int = 0

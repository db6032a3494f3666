"""Rows: what the journal and the manifest say of one task, as plain JSON values named as in columns.py.

Pure. A row leaves out what is null; the user's own columns stand under `user`. A manifest part is a function of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jobs.prompt_row import Rejected
from jobs.shards import PlannedTask
from jobs.user_columns import column_name
from workers.task import ActorInfo, FailureKind, RenderResult

MAX_MESSAGE_BYTES = 2048
Row = dict[str, Any]


@dataclass(frozen=True)
class JobFacts:
    """What is the same in all rows of a job."""

    job_id: str
    store_url: str
    input_uri: str
    render_fingerprint: str
    code_version: str
    determinism: str = "frames"
    usd_per_gpu_hour: float | None = None
    usd_rate_source: str | None = None
    instance_type: str | None = None
    zone: str | None = None
    capacity_type: str = "unknown"


@dataclass(frozen=True, slots=True)
class AttemptFacts:
    """What the driver knows of the attempt that decided a row, beyond its result."""

    epoch: int
    number: int
    shard: int = 0
    preemptions: int = 0
    generation: int = 0
    wasted_gpu_s: float = 0.0
    queue_s: float = 0.0
    node_id: str = ""
    actor: ActorInfo | None = field(default=None, compare=False)


def success_row(
    facts: JobFacts, task: PlannedTask, result: RenderResult, attempt: AttemptFacts, committed_at: str
) -> Row:
    """The row of a finished video."""
    row = _common(facts, task, attempt, committed_at)
    row |= {
        "status": "succeeded",
        "video_uri": f"{facts.store_url}/{result.video_key}",
        "file_name": result.video_key,
        "bytes": result.num_bytes,
        "sha256": result.sha256,
        "frames_sha256": result.frames_sha256,
        "width": result.width,
        "height": result.height,
        "fps": float(result.fps),
        "fps_num": result.fps,
        "fps_den": 1,
        "num_frames": result.num_frames,
        "duration_s": result.num_frames / result.fps,
        "codec": result.codec,
        "pix_fmt": result.pix_fmt,
        "crf": result.crf,
        "model_id": result.model_id,
        "model_revision": result.model_revision,
        "backend": result.backend,
        "kv_policy": result.kv_policy,
        "kv_bytes": result.kv_bytes,
        "gpu_seconds": result.gpu_s,
        "upload_wait_s": result.upload_wait_s,
        "wall_s": result.wall_s,
        "stage_s": result.stage_s.model_dump(),
        "peak_gpu_bytes": result.peak_gpu_bytes,
        "peak_rss_bytes": result.peak_rss_bytes,
        "quality": result.quality.model_dump(),
        "ladder": list(result.ladder),
        "resumed_from_frame": 0,
        "started_at": result.started_at,
        "finished_at": result.finished_at,
    }
    _set_if_known(row, "kv_compression_ratio", result.kv_compression_ratio)
    _set_if_known(row, "attn_density_mean", result.attn_density_mean)
    _set_if_known(row, "attn_recall_probe", result.attn_recall_probe)
    _set_if_known(row, "guard_tightened", result.guard_tightened)
    _set_if_known(row, "guard_dense_chunks", result.guard_dense_chunks)
    _set_cost(row, facts)
    return row


def failure_row(
    facts: JobFacts, task: PlannedTask, kind: FailureKind, message: str, attempt: AttemptFacts, committed_at: str
) -> Row:
    """The row of a task that is given up."""
    row = _common(facts, task, attempt, committed_at)
    row |= {
        "status": "failed",
        "error_type": kind,
        "error_message": shorten(message),
        "num_frames": task.num_frames,
        "gpu_seconds": 0.0,
    }
    _set_cost(row, facts)
    return row


def rejected_row(facts: JobFacts, rejected: Rejected, epoch: int, committed_at: str) -> Row:
    """The row of a line of the prompt list that cannot become a task."""
    row: Row = {
        "job_id": facts.job_id,
        "input_row": rejected.line,
        "input_uri": facts.input_uri,
        "status": "rejected",
        "error_type": "invalid_input",
        "reject_kind": rejected.kind,
        "error_message": shorten(rejected.reason),
        "epoch": epoch,
        "committed_at": committed_at,
    }
    _set_if_known(row, "item_id", rejected.item_id)
    _set_if_known(row, "prompt", rejected.prompt)
    return row


def reopened_row(failed: Row, committed_at: str) -> Row:
    """The record that a task gets another chance, from the row that gave it up; names the failure it takes back."""
    kept = ("job_id", "item_id", "sample_index", "input_row", "input_uri", "prompt", "error_type")
    row = {name: failed[name] for name in kept if failed.get(name) is not None}
    return row | {"status": "reopened", "generation": failed["generation"] + 1, "committed_at": committed_at}


def task_id_of(row: Row) -> str:
    """The task a row speaks of; a rejected line has an id of its own that no task can have."""
    if row["status"] == "rejected":
        return rejected_id(row["input_row"], row["reject_kind"])
    return f"{row['item_id']}-{row['sample_index']}"


def rejected_id(line: int, kind: str) -> str:
    """Identity of a rejected line, so that a second run does not quarantine it again."""
    return f"line:{line}:{kind}"


def shorten(message: str) -> str:
    """At most 2 KB of UTF-8, cut at a character."""
    return message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def _common(facts: JobFacts, task: PlannedTask, attempt: AttemptFacts, committed_at: str) -> Row:
    row: Row = {
        "item_id": task.item_id,
        "job_id": facts.job_id,
        "sample_index": task.sample_index,
        "prompt": task.prompt,
        "negative_prompt": task.negative_prompt,
        "prompt_sha256": task.prompt_sha256,
        "seed": task.seed,
        "input_row": task.input_row,
        "input_uri": facts.input_uri,
        "shard": attempt.shard,
        "attempt": attempt.number,
        "epoch": attempt.epoch,
        "preemptions": attempt.preemptions,
        "generation": attempt.generation,
        "render_fingerprint": facts.render_fingerprint,
        "code_version": facts.code_version,
        "determinism": facts.determinism,
        "wasted_gpu_seconds": attempt.wasted_gpu_s,
        "queue_s": attempt.queue_s,
        "committed_at": committed_at,
        "node_id": attempt.node_id,
        "capacity_type": facts.capacity_type,
    }
    _set_if_known(row, "instance_type", facts.instance_type)
    _set_if_known(row, "zone", facts.zone)
    if attempt.actor is not None:
        row["gpu_name"] = attempt.actor.gpu_name
        row["torch_version"] = attempt.actor.torch_version
        row["cuda_version"] = attempt.actor.cuda_version
    if task.extra:
        row["user"] = _user_columns(task)
    return row


def _user_columns(task: PlannedTask) -> Row:
    columns: Row = {}
    for name, value in task.extra.items():
        column = column_name(name)
        while column in columns or (column != name and column in task.extra):
            column = f"user_{column}"
        columns[column] = value
    return columns


def _set_cost(row: Row, facts: JobFacts) -> None:
    if facts.usd_per_gpu_hour is not None:
        row["usd"] = (row["gpu_seconds"] + row["wasted_gpu_seconds"]) * facts.usd_per_gpu_hour / 3600
        row["usd_rate_source"] = facts.usd_rate_source


def _set_if_known(row: Row, name: str, value: object) -> None:
    if value is not None:
        row[name] = value

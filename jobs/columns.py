"""Every column of a manifest row: type, unit and meaning in one table, from which the reference page is generated.

Plain strings, not Arrow dictionaries, stand for enums: Parquet stores both alike, and some readers refuse the latter.
Evolution: columns are only ever added, and all are nullable; a golden file of each version stays in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import pyarrow as pa

from jobs.prompt_row import RejectKind
from workers.task import FailureKind

SCHEMA_VERSION = 1
TIMESTAMP = pa.timestamp("us", tz="UTC")
STAGES = pa.struct([(name, pa.float64()) for name in ("text", "denoise", "cache", "vae", "encode", "upload", "check")])
QUALITY = pa.struct(
    [("nan", pa.bool_()), ("black_ratio", pa.float32()), ("frozen_ratio", pa.float32()), ("mean_luma", pa.float32())]
)


@dataclass(frozen=True)
class Column:
    """One column. `unit` is empty where a value has none."""

    group: str
    name: str
    type: pa.DataType
    unit: str
    meaning: str


_S, _I32, _I64, _F32, _F64 = pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64()
_L = pa.list_(pa.string())
_KINDS = ", ".join(get_args(FailureKind))
_REJECTS = ", ".join(get_args(RejectKind))

COLUMNS: tuple[Column, ...] = tuple(
    Column(*row)
    for row in (
        ("identity", "item_id", _S, "", "Id of the prompt row: its own, or a hash of what it asks for."),
        ("identity", "job_id", _S, "", "The job, also the last part of its prefix."),
        ("identity", "sample_index", _I32, "", "Which sample of the item, from 0; (item_id, sample_index) is the key."),
        ("identity", "prompt", _S, "", "The prompt; a JSON list of {frame, prompt} when it changes during the take."),
        ("identity", "negative_prompt", _S, "", "What the picture should avoid; empty if nothing."),
        ("identity", "prompt_sha256", _S, "hex", "SHA-256 of the column prompt."),
        ("identity", "seed", _I64, "", "Seed of this take; noise is keyed by (seed, chunk, step)."),
        ("identity", "input_row", _I64, "", "Line (text formats) or row (Parquet) of the prompt list, from 1."),
        ("identity", "input_uri", _S, "", "The prompt list."),
        ("identity", "shard", _I32, "", "Number of the shard it was given out in, within its epoch."),
        ("state", "status", _S, "", "succeeded; in quarantine/ failed (given up), rejected (bad row), reopened."),
        ("state", "error_type", _S, "", f"Kind of the last failure: {_KINDS}."),
        ("state", "error_message", _S, "", "The last failure in a sentence, at most 2 KB."),
        ("state", "reject_kind", _S, "", f"What is wrong with a rejected row: {_REJECTS}."),
        ("state", "attempt", _I32, "", "Number of the attempt that decided the row, from 1, within its epoch."),
        ("state", "epoch", _I32, "", "Lease epoch of the driver that committed the row."),
        ("state", "preemptions", _I32, "", "Attempts lost because a machine went away; they cost no retry."),
        ("state", "resumed_from_frame", _I32, "frames", "First video frame made by this attempt itself; 0: all."),
        ("state", "ladder", _L, "", "Settings lowered after out-of-memory, in order; float32 after a NaN; else empty."),
        ("state", "generation", _I32, "", "How often the task had been reopened by `retry` before."),
        ("file", "video_uri", _S, "", "Absolute address of the video."),
        ("file", "file_name", _S, "", "Its key below the job's root."),
        ("file", "bytes", _I64, "bytes", "Size of the video file."),
        ("file", "sha256", _S, "hex", "SHA-256 of the video file."),
        ("file", "frames_sha256", _S, "hex", "SHA-256 of the raw RGB frames in order, before encoding."),
        ("file", "preview_uri", _S, "", "Absolute address of a still or short preview, if one was made."),
        ("video", "width", _I32, "pixels", "Picture width."),
        ("video", "height", _I32, "pixels", "Picture height."),
        ("video", "fps", _F64, "frames/s", "Frame rate, fps_num / fps_den."),
        ("video", "fps_num", _I32, "", "Numerator of the frame rate."),
        ("video", "fps_den", _I32, "", "Denominator of the frame rate."),
        ("video", "num_frames", _I32, "frames", "Video frames, counted in the finished file."),
        ("video", "duration_s", _F64, "s", "num_frames / fps."),
        ("video", "codec", _S, "", "Video codec."),
        ("video", "pix_fmt", _S, "", "Pixel format."),
        ("video", "crf", _I32, "", "Constant rate factor; lower is better and larger."),
        ("provenance", "model_id", _S, "", "Architecture and weights by name."),
        ("provenance", "model_revision", _S, "hex", "SHA-256 over the weight files."),
        ("provenance", "render_fingerprint", _S, "hex", "SHA-256 of everything that decides pixels."),
        ("provenance", "code_version", _S, "", "Version of Longtake."),
        ("provenance", "backend", _S, "", "Attention kernel that ran, with its version; on a GPU also Wan's VAE."),
        ("provenance", "determinism", _S, "", "frames: equal frames_sha256 on any placement, with kills and retries."),
        ("provenance", "gpu_name", _S, "", "The device."),
        ("provenance", "torch_version", _S, "", "Version of PyTorch."),
        ("provenance", "cuda_version", _S, "", "Version of CUDA; empty on a CPU."),
        ("method", "kv_policy", _S, "", "Which keys were kept."),
        ("method", "kv_bytes", _I64, "bytes", "What the KV cache takes after the last chunk, or all that it reserves."),
        ("method", "kv_compression_ratio", _F32, "", "Keys of the whole history / keys kept; null if not measured."),
        ("method", "attn_density_mean", _F32, "", "Attended pairs / dense pairs, mean; null if not measured."),
        ("method", "attn_recall_probe", _F32, "", "Strict recall (docs/memory.md) by the guard, mean; null: no guard."),
        ("method", "guard_tightened", _I32, "chunks", "So many made the guard tighten; null: no guard."),
        ("method", "guard_dense_chunks", _I32, "chunks", "So many it rendered again, densely; null: no guard."),
        ("cost", "gpu_seconds", _F64, "s", "Time in which the successful attempt held the GPU."),
        ("cost", "wasted_gpu_seconds", _F64, "s", "Held by earlier attempts of this task in the same epoch."),
        ("cost", "upload_wait_s", _F64, "s", "Part of gpu_seconds spent waiting for encoder or store."),
        ("cost", "wall_s", _F64, "s", "From the start of the attempt to the checked video."),
        ("cost", "queue_s", _F64, "s", "From the task's entry into the queue to the start of its last attempt."),
        ("cost", "stage_s", STAGES, "s", "Seconds by stage, of all threads; stages overlap: no sum to wall_s."),
        ("cost", "peak_gpu_bytes", _I64, "bytes", "Highest GPU memory in use."),
        ("cost", "peak_rss_bytes", _I64, "bytes", "Highest resident memory of the actor."),
        ("cost", "usd", _F64, "US$", "(gpu_seconds + wasted_gpu_seconds) at the job's rate; null without a rate."),
        ("cost", "usd_rate_source", _S, "", "Where the rate comes from."),
        ("quality", "quality", QUALITY, "ratio", "What the gate measured over all frames."),
        ("time and place", "started_at", TIMESTAMP, "UTC", "Start of the attempt."),
        ("time and place", "finished_at", TIMESTAMP, "UTC", "The video was complete and checked."),
        ("time and place", "committed_at", TIMESTAMP, "UTC", "The driver decided the row."),
        ("time and place", "node_id", _S, "", "Machine in the cluster."),
        ("time and place", "instance_type", _S, "", "Kind of machine, if known."),
        ("time and place", "zone", _S, "", "Its zone, if known."),
        ("time and place", "capacity_type", _S, "", "spot, on_demand or unknown."),
        ("order", "commit_seq", _I64, "", "Number of the journal entry that committed the row: the order of commits."),
        ("user", "user_misfits", _S, "JSON", "Values of your own columns that do not fit its type."),
    )
)  # fmt: skip

CHUNK_COLUMNS: tuple[Column, ...] = tuple(
    Column("chunk", *row)
    for row in (
        ("task_id", _S, "", "The take: item_id, a dash, sample_index."),
        ("attempt", _S, "", "Lease epoch and number of the attempt, as in the name of its video."),
        ("node_id", _S, "", "Machine in the cluster."),
        ("chunk_index", _I32, "", "Which chunk of the take, from 0."),
        ("seconds", _F64, "s", "From the end of the chunk before to the end of this one, pictures included."),
        ("kv_bytes", _I64, "bytes", "What the KV cache takes after the chunk, or all that it reserves."),
        ("density", _F32, "", "Attended pairs / dense pairs; null if not measured."),
        ("recall", _F32, "", "Strict recall (docs/memory.md) as the guard estimates it; null: no guard."),
        ("guard", _S, "", "What the quality guard did after it: tightened, relaxed, dense (made again); or null."),
        ("finished_at", TIMESTAMP, "UTC", "When the take was complete."),
    )
)  # fmt: skip
"""One row per chunk of a finished take."""

CHUNK_SCHEMA = pa.schema([pa.field(column.name, column.type) for column in CHUNK_COLUMNS])
COLUMN_NAMES = frozenset(column.name for column in COLUMNS)
SCHEMA = pa.schema([pa.field(column.name, column.type) for column in COLUMNS])


CLOSING_RECORDS = """# Closing records

JSON at the job's root. `_SUCCESS` exists while every item is succeeded or finally given up, and holds `job_id`,
`succeeded`, `failed`, `rejected`, `failures` (count by error_type), `num_parts` and `finished_at`.

`_result.json` is the outcome of the last run, whatever it was: `exit_code`, `status` (succeeded, items_failed, stopped,
broken), `reason`, `is_resumable`, `counts` (as in `_SUCCESS`), `gpu_seconds` by cause (useful, load, redone, failed,
idle, upload_wait; they add up to `held_s`), `run_succeeded` (videos of this run), `elapsed_s`, `epoch`, `started_at`,
`finished_at`, `job_id`, `manifest` (the glob to read), `code_version` and `render_fingerprint`."""


def reference_page() -> str:
    """docs/manifest.md, generated; a test keeps the committed page equal to this."""
    lines = [
        "# The manifest: columns of a row",
        "",
        "Generated from `jobs/columns.py` by `python -m jobs.columns`; do not edit.",
        "",
        "`manifest/part-*.parquet` holds one row per finished video, each (item_id, sample_index) at most once at",
        "any moment. `quarantine/part-*.parquet` holds, in the same columns, tasks that were given up (`failed`), bad",
        "input rows (`rejected`) and the record that `longtake retry` gave a task another chance (`reopened`). Every",
        "other column of your prompt list follows with its own name and type; a taken name gets the prefix `user_`.",
        "",
        f"Schema version {SCHEMA_VERSION}, in the Parquet metadata as `longtake.schema_version`, beside",
        "`longtake.job_id`, `longtake.part_rows`, `longtake.first_seq` and `longtake.last_seq` (the journal entries",
        "that it covers) and `longtake.epoch` (of the driver that wrote it).",
    ]
    for group in dict.fromkeys(column.group for column in COLUMNS):
        lines += ["", f"## {group.capitalize()}", "", *_table(column for column in COLUMNS if column.group == group)]
    lines += ["", "# Chunk metrics", ""]
    lines += [
        "`metrics/part-*.parquet` holds one row per chunk of every finished take; it decides nothing and may be lost."
    ]
    lines += ["", *_table(CHUNK_COLUMNS), "", CLOSING_RECORDS]
    return "\n".join(lines) + "\n"


def _table(columns: Iterable[Column]) -> list[str]:
    head = ["| column | type | unit | meaning |", "|---|---|---|---|"]
    return head + [f"| `{c.name}` | {c.type} | {c.unit or '-'} | {c.meaning} |" for c in columns]


if __name__ == "__main__":
    print(reference_page(), end="")

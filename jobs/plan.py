"""What a job needs before it starts: videos, frames, GPU hours, bytes, money. The list is counted by streaming it.

Speed is never invented: it is given, or measured on a job that rendered the same look, or said to be unknown.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from cluster.object_store import ObjectStore, open_store
from jobs.commit import read_json
from jobs.consume import open_manifest
from jobs.errors import SpecError
from jobs.job_record import JOB_KEY
from jobs.prompts import PromptScan, scan_prompts
from jobs.replay import Replay
from jobs.spec import JobSpec
from workers.config import BUNDLED_WEIGHTS, SEEDED_BACKBONE
from workers.errors import RenderError
from workers.geometry import Workload
from workers.model.backbones import find_backbone
from workers.model_limits import conflicts_with_model, kernel_conflict


@dataclass(frozen=True)
class Rate:
    """What one video frame costs."""

    gpu_s_per_frame: float
    bytes_per_frame: float | None
    source: str
    longest_frames: int | None = None


@dataclass(frozen=True)
class JobPlan:
    """The answer of `longtake plan`. Figures that depend on an unknown speed are None."""

    job_id: str
    job_url: str
    num_rows: int
    num_items: int
    num_rejected: int
    rejected_by_kind: dict[str, int]
    num_tasks: int
    num_done: int
    num_frames: int
    video_s: float
    longest_frames: int
    gpu_hours: float | None
    wall_hours: float | None
    usd: float | None
    num_bytes: float | None
    rate_source: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    spec: JobSpec,
    scan: PromptScan | None = None,
    *,
    gpu_s_per_frame: float | None = None,
    like: str | None = None,
    num_actors: int | None = None,
) -> JobPlan:
    """Work out what a list asks for.

    Args:
        spec: The job.
        scan: What was found in its list; it is read if that is not known yet.
        gpu_s_per_frame: Speed, if the user knows it.
        like: Root of an earlier job to measure the speed on.
        num_actors: For the wall time; else what the spec says.
    Raises:
        PromptsError: The list cannot be used.
    """
    scan = scan or scan_prompts(spec.source, spec.task_defaults)
    notes = [*spec.warnings(), *_bad_rows(scan), *_table_size(spec)]
    rate = _find_rate(spec, gpu_s_per_frame, like, notes)
    num_done = _num_done(open_store(spec.job_url))
    left = (scan.num_tasks - num_done) / scan.num_tasks if scan.num_tasks else 0.0
    actors = num_actors or (spec.actors.count if isinstance(spec.actors.count, int) else None)
    gpu_hours = rate.gpu_s_per_frame * scan.num_frames * left / 3600 if rate else None
    price = spec.pricing.usd_per_gpu_hour
    if gpu_hours is not None and price is None:
        notes.append("no price: give --pricing-usd-per-gpu-hour")
    if gpu_hours is not None and actors is None:
        notes.append("no wall time: the number of actors is decided by the cluster; give --actors")
    if rate and rate.longest_frames and scan.longest_frames > 2 * rate.longest_frames:
        notes.append(
            f"the longest take has {scan.longest_frames} frames, the speed was measured up to {rate.longest_frames}: "
            "a cache that grows with the video makes long takes dearer"
        )
    return JobPlan(
        job_id=spec.job_id,
        job_url=spec.job_url,
        num_rows=scan.num_rows,
        num_items=scan.num_items,
        num_rejected=scan.num_rejected,
        rejected_by_kind=dict(scan.rejected),
        num_tasks=scan.num_tasks,
        num_done=num_done,
        num_frames=scan.num_frames,
        video_s=scan.num_frames / spec.render.video.fps,
        longest_frames=scan.longest_frames,
        gpu_hours=gpu_hours,
        wall_hours=gpu_hours / actors if gpu_hours is not None and actors else None,
        usd=gpu_hours * price if gpu_hours is not None and price is not None else None,
        num_bytes=rate.bytes_per_frame * scan.num_frames if rate and rate.bytes_per_frame else None,
        rate_source=rate.source if rate else "unknown",
        notes=tuple(notes),
    )


def check_model(spec: JobSpec) -> Path | None:
    """Can this model be rendered with, at this size and as asked? Returns the folder of its bundled weights.

    Raises:
        SpecError: Names the field.
    """
    try:
        backbone = find_backbone(spec.render.backbone.name)
        backbone.latent_size(spec.render.video.width, spec.render.video.height)
    except RenderError as error:
        raise SpecError(f"render.{error}") from error
    found = (*conflicts_with_model(spec.render, backbone), kernel_conflict(spec.render, backbone))
    if problems := [f"render.{problem}" for problem in found if problem]:
        raise SpecError("\n".join(problems))
    if backbone.text is None and spec.render.backbone.checkpoint is None:
        raise SpecError(
            f"render.backbone.checkpoint: {backbone.name} needs published weights; "
            f"`longtake models show {backbone.name}` says where they are and how to get them"
        )
    asked = spec.render.backbone
    is_bundled = backbone.text is not None and asked.checkpoint is None and backbone.name != SEEDED_BACKBONE
    return BUNDLED_WEIGHTS if is_bundled else None


def measured_rate(url: str | Path) -> Rate | None:
    """GPU seconds and bytes per frame over the finished videos of a job, all waste included; None without any."""
    table = open_manifest(url).to_table(columns=["gpu_seconds", "wasted_gpu_seconds", "num_frames", "bytes"])
    frames = pc.sum(table["num_frames"]).as_py()
    if not frames:
        return None
    seconds = (pc.sum(table["gpu_seconds"]).as_py() or 0.0) + (pc.sum(table["wasted_gpu_seconds"]).as_py() or 0.0)
    source = f"measured on {table.num_rows} videos of {url}"
    return Rate(seconds / frames, pc.sum(table["bytes"]).as_py() / frames, source, pc.max(table["num_frames"]).as_py())


def _find_rate(spec: JobSpec, given: float | None, like: str | None, notes: list[str]) -> Rate | None:
    if given is not None:
        return Rate(given, None, "given")
    for url in [like] if like else [spec.job_url]:
        record = read_json(open_store(url), JOB_KEY)
        if record is None:
            continue
        rate = measured_rate(url)
        if rate is None:
            continue
        if record["render_fingerprint"] != spec.render_fingerprint:
            notes.append(f"{url} rendered another look: the speed is a guess")
        return rate
    notes.append(
        "speed unknown: render a few prompts first and name that job with --like, or give --gpu-s-per-frame"
        if like is None
        else f"{like} has no finished video in a manifest part: speed unknown"
    )
    return None


def _table_size(spec: JobSpec) -> list[str]:
    cache, video = spec.render.cache, spec.render.video
    if cache.kind != "tiles":
        return []
    backbone = find_backbone(spec.render.backbone.name)
    work = Workload(
        backbone,
        video.width,
        video.height,
        video.num_frames,
        spec.render.sampling.num_steps,
    )
    itemsize, attention = 4 if spec.render.backbone.dtype == "float32" else 2, spec.render.attention
    held = work.table_bytes(cache, itemsize)
    if attention.kind == "tiles":
        held += work.kept_history_bytes(attention, itemsize)
    return [f"the tile table takes about {held / 2**30:.1f} GiB of each GPU, whatever the length of a take"]


def _num_done(store: ObjectStore) -> int:
    return Replay(store, "").ledger.num_succeeded if read_json(store, JOB_KEY) is not None else 0


def _bad_rows(scan: PromptScan) -> list[str]:
    shown = [f"line {row.line}: {row.kind}: {row.reason}" for row in scan.first_rejected[:5]]
    hidden = scan.num_rejected - len(shown)
    return shown + ([f"and {hidden} more bad rows"] if hidden > 0 else [])

"""The order of one task: encode prompt, roll out, decode, check, write, measure. The arithmetic is elsewhere."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.errors import StoreError
from cluster.object_store import ObjectStore
from workers.assemble import LoadedModel, TakeParts, in_full_precision, prepare_take
from workers.assemble_policies import make_attention
from workers.cache.prompt import PromptCache, PromptLayers
from workers.clip_take import roll_out_clips
from workers.denoise import draw_noise
from workers.errors import DeviceBroken, GpuOutOfMemory, RenderError, UploadFailed
from workers.metrics import Stopwatch, peak_gpu_bytes, peak_rss_bytes, reset_peak_gpu_bytes, rss_bytes
from workers.model.backbones import Backbone
from workers.model.control import chunks_after_cuts, control_maps, group_camera, world_origin
from workers.model.text_encoder import fold_padding
from workers.model.vae import PictureStream, to_pictures
from workers.quality.gate import QualityGate
from workers.quality.guard import RecallGuard
from workers.rollout import CleanChunk, RolloutPlan
from workers.rollouts.beside import work_beside
from workers.rollouts.select import make_rollout
from workers.task import (
    FULL_PRECISION,
    ChunkMetrics,
    QualityScores,
    RenderResult,
    RenderTask,
    StageSeconds,
    prompt_text,
)
from workers.video.encode import Frames
from workers.video.writer import VideoFile, VideoWriter
from workers.worlds.camera import RANGE, plan_camera, read_move, trace

__all__ = ["as_render_error", "render_take", "rss_bytes", "utc_now"]  # what the actor uses

OnChunk = Callable[[int, float], None]
"""(video frames made so far, seconds that generation waited for the writer); what it raises ends the take."""


class FrameSink(Protocol):
    """Where the pictures of a take go while it is made: a VideoWriter."""

    @property
    def blocked_s(self) -> float:
        """Seconds that `write` has waited so far."""
        ...

    def write(self, frames_THWC: Frames) -> None:
        """Take the next ones."""
        ...


class GpuTurn(AbstractContextManager[None], Protocol):
    """The right to use the GPU: entered for generation, left before the video is finished."""

    @property
    def held_s(self) -> float:
        """Seconds for which it was held."""
        ...


@dataclass
class TakeRecord:
    """What a take measures while it is made."""

    started_at: str
    started: float
    stopwatch: Stopwatch
    chunks: list[ChunkMetrics] = field(default_factory=list)
    quality: QualityScores = field(default_factory=QualityScores)
    peak_gpu_bytes: int = 0
    guard: RecallGuard | None = None
    guard_facts: dict[int, dict[str, object]] = field(default_factory=dict)
    """What the guard had to say of each chunk whose pictures are still to come."""


def render_take(
    task: RenderTask, model: LoadedModel, store: ObjectStore, turn: GpuTurn, on_chunk: OnChunk
) -> RenderResult:
    """Make one video and see it complete in the store.

    Args:
        task: What to make; its attempt gives the objects names that nobody else writes.
        model: Used by one generating thread at a time: whoever holds the turn.
        store: Root of the job.
        turn: Left before the end of encoding and upload, so that the next take is generated meanwhile.
        on_chunk: Told after each chunk.
    Raises:
        RenderError: What went wrong. Nothing is left in the store.
    """
    record = TakeRecord(utc_now(), time.perf_counter(), Stopwatch(model.device))
    parts = prepare_take(model, task.ladder_rung)
    writer = open_writer(task, model, store)
    try:
        read_ahead(task, model, record)
        with turn:
            if task.full_precision:
                model = in_full_precision(model)
                parts = replace(parts, ladder=(*parts.ladder, FULL_PRECISION))
            generate(task, model, parts, writer, record, on_chunk)
        video = writer.finish()
    except BaseException:
        writer.abort()
        raise
    return summarise(task, model, parts, video, record, turn.held_s)


def read_ahead(task: RenderTask, model: LoadedModel, record: TakeRecord) -> None:
    """What can be done for a take before it has the GPU: reading its prompts, where that takes long.

    Clips bring texts of their own, and take so long that nobody notices.
    """
    if model.backbone.rollout == "clipwise":
        return
    began = time.perf_counter()
    texts = list(dict.fromkeys(prompts_by_chunk(task, model.backbone)))
    if model.config.sampling.guidance != 1.0:
        texts.insert(1, task.negative_prompt)
    model.text_encoder.read_ahead(texts)
    record.stopwatch.add("text", time.perf_counter() - began)


@torch.inference_mode()
def generate(
    task: RenderTask, model: LoadedModel, parts: TakeParts, writer: FrameSink, record: TakeRecord, on_chunk: OnChunk
) -> None:
    """Roll out, decode chunk by chunk, check and hand over the pictures."""
    reset_peak_gpu_bytes(model.device)
    gate = QualityGate(model.config.quality_gate)
    num_frames = 0
    chunk_started = time.perf_counter()
    for chunk, frames_THWC in roll_out(task, model, parts, record):
        with record.stopwatch.stage("check"):
            gate.observe(frames_THWC[: task.num_frames - num_frames])
            gate.judge(task.num_frames)
        writer.write(frames_THWC)
        num_frames = min(task.num_frames, num_frames + len(frames_THWC))
        now = time.perf_counter()
        metrics = ChunkMetrics(
            chunk_index=chunk.index, seconds=now - chunk_started, kv_bytes=chunk.kv_bytes, density=chunk.density
        )
        record.chunks.append(metrics.model_copy(update=record.guard_facts.pop(chunk.index, {})))
        chunk_started = now
        on_chunk(num_frames, writer.blocked_s)
    record.quality = gate.judge()
    record.peak_gpu_bytes = peak_gpu_bytes(model.device)


def roll_out(
    task: RenderTask, model: LoadedModel, parts: TakeParts, record: TakeRecord
) -> Iterator[tuple[CleanChunk, NDArray[np.uint8]]]:
    """Chunks with their pictures, by the loop that the model, or the cache, brings."""
    if parts.on_table:
        assert model.seat is not None, "a model that renders over a table has a seat for it"
        plan = plan_rollout(task, model, record)
        over_table = model.seat.begin_take().run(plan, stopwatch=record.stopwatch)
        return with_pictures(over_table, plan.after_cut, model, parts, record)
    if model.seat is not None:
        model.seat.release()  # this take goes without, because memory ran out
    attention, record.guard = make_attention(
        model.config.guard, model.backbone, parts.cache, parts.policy, model.kernel, parts.reindex
    )
    if model.backbone.rollout == "clipwise":
        return roll_out_clips(task, model, attention, record.stopwatch, parts.attend_prompt)
    rollout = make_rollout(model.dit, attention, record.stopwatch, parts.reuse, record.guard, parts.attend_prompt)
    plan = plan_rollout(task, model, record)
    return with_pictures(rollout.run(plan), plan.after_cut, model, parts, record)


def plan_rollout(task: RenderTask, model: LoadedModel, record: TakeRecord) -> RolloutPlan:
    """Everything that a rollout asks for, chunk by chunk."""
    backbone, video = model.backbone, model.config.video
    shape = (1, backbone.chunk_latent_frames, backbone.latent_channels, *model.latent_size)
    cache = PromptCache(lambda text: project_prompt(text, model, record.stopwatch))
    guidance = model.config.sampling.guidance
    prompts = prompts_by_chunk(task, backbone)
    camera_TS2 = group_camera(torch.from_numpy(plan_path(task, prompts, backbone))[None], backbone)[0]

    def camera_of(index: int) -> Tensor:
        start = index * backbone.chunk_latent_frames
        return camera_TS2[None, start : start + backbone.chunk_latent_frames].to(model.device)

    def read_prompt(index: int) -> list[PromptLayers]:
        return cache.read(prompts[index]) if guidance == 1.0 else cache.read(prompts[index], task.negative_prompt)

    def read_control(index: int) -> Tensor | None:
        return (
            control_maps(camera_of(index), video.width, video.height, backbone) if backbone.control_channels else None
        )

    return RolloutPlan(
        num_chunks=len(prompts),
        latent_size=model.latent_size,
        schedule=model.schedule,
        guidance=guidance,
        noise=lambda chunk, step: draw_noise(task.seed, chunk, step, shape),
        prompt=read_prompt,
        control=read_control,
        world_origin=(lambda index: world_origin(camera_of(index), backbone)[0]) if backbone.world_rope else None,
        after_cut=chunks_after_cuts(camera_TS2, backbone),
    )


def prompts_by_chunk(task: RenderTask, backbone: Backbone) -> list[str]:
    """The prompt of each chunk: one that begins within a chunk holds from the start of that chunk."""
    prompts = [task.segments[0].prompt] * backbone.num_chunks(task.num_frames)
    for segment in sorted(task.segments, key=lambda s: s.frame):
        first = backbone.chunk_of_frame(segment.frame)
        prompts[first:] = [segment.prompt] * len(prompts[first:])
    return prompts


def plan_path(task: RenderTask, prompts: Sequence[str], backbone: Backbone) -> NDArray[np.float32]:
    """Camera position of each video frame: each prompt moves the camera on from where the one before left it."""
    path = plan_camera(prompts[0], task.seed, task.num_frames)
    for index in range(1, len(prompts)):
        if prompts[index] == prompts[index - 1]:
            continue
        first = backbone.num_video_frames(index * backbone.chunk_latent_frames)
        rng = np.random.Generator(np.random.Philox(key=[task.seed, index]))
        x, y = path[first - 1].tolist()
        # One position more than needed: the first is where the camera stands already.
        onward = trace(read_move(prompts[index], rng), task.num_frames - first + 1, (x, y), (0.0, RANGE), rng)
        path = np.concatenate((path[:first], onward[1:]))
    return path


def project_prompt(text: str, model: LoadedModel, stopwatch: Stopwatch) -> PromptLayers:
    """Cross-attention keys of a prompt in all layers."""
    with stopwatch.stage("text"):
        folded = fold_padding(model.text_encoder.encode([text]), model.backbone.text_tokens)
        return model.dit.project_prompt(folded.text_BPE, folded.log_mass_BP)


def with_pictures(
    chunks: Iterator[CleanChunk],
    after_cut: frozenset[int],
    model: LoadedModel,
    parts: TakeParts,
    record: TakeRecord,
) -> Iterator[tuple[CleanChunk, NDArray[np.uint8]]]:
    """Chunks of one stream of latents, each with its pictures; a GPU decodes them while it makes the next chunk.

    Where memory ran out before, one waits for the other. Chunks after a hard cut are decoded as the start of a video:
    the place before would shine through their first pictures.
    """
    decoder = model.vae.stream()

    def pictures_of(chunk: CleanChunk) -> NDArray[np.uint8]:
        nonlocal decoder
        if chunk.index in after_cut:
            decoder = model.vae.stream()
        return decode(chunk, decoder, parts, model.device)

    beside = model.device if parts.decode_latent_frames is None else torch.device("cpu")

    def judged() -> Iterator[CleanChunk]:
        for chunk in chunks:
            if record.guard is not None:
                record.guard_facts[chunk.index] = record.guard.chunk_facts()
            yield chunk

    return work_beside(
        judged(),
        pictures_of,
        beside,
        lambda: record.stopwatch.stage("vae"),
    )


def decode(chunk: CleanChunk, decoder: PictureStream, parts: TakeParts, device: torch.device) -> NDArray[np.uint8]:
    """Pictures [n, H, W, 3] of a chunk, on the host."""
    if parts.decode_latent_frames is None:
        pieces: Sequence[Tensor] = (chunk.latents_BTCHW,)
    else:
        pieces = chunk.latents_BTCHW.split(parts.decode_latent_frames, dim=1)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return np.concatenate([to_pictures(decoder.decode(piece)[0]).cpu().numpy() for piece in pieces])


def open_writer(task: RenderTask, model: LoadedModel, store: ObjectStore) -> VideoWriter:
    """The writer of this attempt, under keys that no other attempt uses."""
    folder = hashlib.sha256(task.task_id.encode()).hexdigest()[:2]
    name = f"{task.task_id}-{model.config.fingerprint[:8]}-{task.attempt}"
    metadata = {
        "item_id": task.item_id,
        "sample_index": str(task.sample_index),
        "seed": str(task.seed),
        "prompt_sha256": hashlib.sha256(prompt_text(task.segments).encode()).hexdigest(),
        "model_id": model.backbone.name,
        "model_revision": model.revision,
        "render_fingerprint": model.config.fingerprint,
    }
    return VideoWriter(
        store,
        f"videos/{folder}/{name}.mp4",
        f"_state/segments/{task.task_id}-{task.attempt}",
        model.config.video,
        metadata,
        task.num_frames,
    )


def summarise(
    task: RenderTask, model: LoadedModel, parts: TakeParts, video: VideoFile, record: TakeRecord, gpu_s: float
) -> RenderResult:
    """The row of a finished take."""
    seconds, backbone = record.stopwatch.seconds, model.backbone
    frame_tokens = backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)
    # The last chunk is never cached: nobody looks back at it.
    history_tokens = (len(record.chunks) - 1) * backbone.chunk_latent_frames * frame_tokens
    dense_bytes = 2 * history_tokens * backbone.dim * backbone.num_layers * model.dit.dtype.itemsize
    kv_bytes = record.chunks[-1].kv_bytes
    return RenderResult(
        task_id=task.task_id,
        attempt=task.attempt,
        video_key=video.key,
        num_bytes=video.num_bytes,
        sha256=video.sha256,
        frames_sha256=video.frames_sha256,
        width=video.width,
        height=video.height,
        fps=video.fps,
        num_frames=video.num_frames,
        codec=video.codec,
        pix_fmt=video.pix_fmt,
        crf=video.crf,
        model_id=backbone.name,
        model_revision=model.revision,
        backend=model.backend_of(on_table=parts.on_table),
        kv_policy=parts.cache_name,
        kv_bytes=kv_bytes,
        kv_compression_ratio=dense_bytes / kv_bytes if kv_bytes else None,
        attn_density_mean=sum(c.density or 0.0 for c in record.chunks) / len(record.chunks),
        attn_recall_probe=mean_recall(record.chunks),
        guard_tightened=None if record.guard is None else record.guard.num_tightened,
        guard_dense_chunks=None if record.guard is None else record.guard.num_dense_chunks,
        wall_s=time.perf_counter() - record.started,
        gpu_s=gpu_s,
        upload_wait_s=video.blocked_s,
        stage_s=StageSeconds(
            text=seconds("text"),
            denoise=seconds("denoise"),
            cache=seconds("cache"),
            vae=seconds("vae"),
            encode=video.encode_s,
            upload=video.upload_s,
            check=video.check_s + seconds("check"),
        ),
        peak_gpu_bytes=record.peak_gpu_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        quality=record.quality,
        ladder=parts.ladder,
        chunks=tuple(record.chunks),
        started_at=record.started_at,
        finished_at=utc_now(),
    )


def mean_recall(chunks: Sequence[ChunkMetrics]) -> float | None:
    """Over the chunks for which it was estimated; None without any."""
    recalls = [chunk.recall for chunk in chunks if chunk.recall is not None]
    return sum(recalls) / len(recalls) if recalls else None


def as_render_error(error: Exception) -> RenderError:
    """What a foreign exception means for the task."""
    if isinstance(error, RenderError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return GpuOutOfMemory(text)
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in text or "CUDNN_STATUS" in text:
        return DeviceBroken(text)
    if isinstance(error, StoreError):
        return UploadFailed(text)
    return RenderError(text)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

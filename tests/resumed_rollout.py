"""A rollout that puts itself down after every chunk and takes itself up where a file says: to be killed at any moment.

`python -m tests.resumed_rollout POLICY FILE FRAMES CHUNKS` prints a line `chunk hash` for each chunk it makes; a FILE
whose name ends in `.log` is the folder of a chunk log. After chunk number CHUNKS it waits for a line on stdin, so that
whoever wants to kill it is never too late.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from workers.assemble import LoadedModel, load_model, prepare_take
from workers.assemble_policies import make_attention
from workers.config import RenderConfig
from workers.metrics import Stopwatch
from workers.pipeline import TakeRecord, plan_rollout, utc_now
from workers.rollout import CleanChunk, Rollout, RolloutPlan
from workers.rollouts.captured import CapturedRollout
from workers.rollouts.chunk_log import ChunkLog, replay_log
from workers.snapshot import Resumable, RolloutId, read_snapshot, write_snapshot
from workers.task import PromptSegment, RenderTask

FIELDS: dict[str, dict[str, object]] = {
    "fastar-tiles": {"cache": {"budget_latent_frames": 15, "spare_latent_frames": 3}},  # merges from chunk 6 on
    "fastar-quant": {"cache": {"budget_latent_frames": 23}},
}


def make_model(policy: str) -> LoadedModel:
    record = {"backbone": {"name": "tiny-test"}, "video": {"width": 64, "height": 32}, "sampling": {"num_steps": 2}}
    return load_model(RenderConfig.model_validate({"policy": policy, **record, **FIELDS[policy]}))


def make_task(num_frames: int) -> RenderTask:
    segment = PromptSegment(frame=0, prompt="a red valley, the camera pans left")
    return RenderTask(
        task_id="a-0", item_id="a", sample_index=0, attempt="e1a1", segments=(segment,), seed=7, num_frames=num_frames
    )


@torch.inference_mode()
def roll(model: LoadedModel, task: RenderTask, file: Path | None) -> Iterator[tuple[int, str]]:
    """(chunk, hash of its latents); goes on from the file if there is one, and keeps it up to date."""
    torch.set_num_threads(1)
    stopwatch = Stopwatch(model.device)
    plan = plan_rollout(task, model, TakeRecord(utc_now(), time.perf_counter(), stopwatch))
    rollout_id = RolloutId(model.config.fingerprint, model.revision, task.task_id, task.seed)
    parts = prepare_take(model, 0)
    cache: Resumable = parts.cache
    if parts.on_table:
        assert model.seat is not None
        over_table = model.seat.begin_take()
        cache = model.seat.table
    if file is not None and file.suffix == ".log":
        yield from roll_logged(over_table, plan, file, rollout_id)
        return
    first = read_snapshot(file, rollout_id, cache) if file is not None and file.exists() else 0
    if parts.on_table:
        chunks = over_table.run(plan, first)
    else:
        attention, _ = make_attention(model.config.guard, model.backbone, parts.cache, parts.policy, model.kernel)
        chunks = Rollout(model.dit, attention, stopwatch, attend_prompt=parts.attend_prompt).run(plan, first)
    for chunk in chunks:
        if file is not None:
            write_snapshot(file, rollout_id, chunk.index + 1, cache)
        yield chunk.index, digest_of(chunk)


def roll_logged(
    rollout: CapturedRollout, plan: RolloutPlan, folder: Path, rollout_id: RolloutId
) -> Iterator[tuple[int, str]]:
    """The same from a chunk log."""
    first = replay_log(folder, rollout_id, rollout, plan)
    log = ChunkLog(folder, rollout_id, rollout.chooser.num_tiles, rollout.device)
    for chunk in rollout.run(plan, first, record=log.record):
        log.flush()
        yield chunk.index, digest_of(chunk)
    log.close()


def digest_of(chunk: CleanChunk) -> str:
    return hashlib.sha256(chunk.latents_BTCHW.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    for index, digest in roll(make_model(sys.argv[1]), make_task(int(sys.argv[3])), Path(sys.argv[2])):
        print(index, digest, flush=True)
        if index + 1 == int(sys.argv[4]):
            sys.stdin.readline()

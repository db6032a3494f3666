"""What a rollout's history is a function of, chunk by chunk: clean latents, and the tiles that the clean pass saw.

A table over which a rollout was made can be built again from it, by one clean pass a chunk instead of all denoising
steps: the same calls on the same numbers, so the table that comes out is the same bit for bit on a GPU of the same
kind. Prompt, positions and control maps come from the plan. A log only grows, by a file for each chunk that became
history, and is valid up to a chunk whenever its process ends; a few megabytes a chunk, where a snapshot is the table.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.cache.side_work import SideWork, Wait, make_side_work
from workers.denoise import to_device
from workers.errors import CheckpointMismatch
from workers.rollout import RolloutPlan
from workers.rollouts.captured import CapturedRollout
from workers.snapshot import RolloutId, check_rollout, write_tensors

_MAX_WAITING = 4
"""Chunks that wait to be written; a disk this far behind holds the rollout up."""
_NAME = re.compile(r"chunk-(\d{6,})\.safetensors")


class LoggedChunk(NamedTuple):
    """One chunk that became history."""

    latents_BTCHW: Tensor
    """Clean, float32."""
    index_LNIJ: Tensor
    """Tiles that its clean pass saw, by layer; int16 where a table has no more of them, else int32."""


class ChunkLog:
    """Writes the log of one rollout: `CapturedRollout.run(..., record=log.record)`.

    Args:
        folder: Of the log alone; made if there is none.
        rollout: Which one.
        num_tiles: Of its table.
        device: Where it runs.
        side: Where copies to the host are made; None for a stream of their own where there are any.
    """

    def __init__(
        self, folder: Path, rollout: RolloutId, num_tiles: int, device: torch.device, side: SideWork | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._rollout, self._num_tiles = folder, rollout, num_tiles
        self._is_pinned = device.type == "cuda"
        self._side = side or make_side_work(device, "chunk log")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="chunk-log")
        self._waiting: deque[tuple[Future[None], Tensor]] = deque()
        self._next_chunk: int | None = None

    @torch.no_grad()
    def record(self, index: int, latents_BTCHW: Tensor, lists: Sequence[Tensor]) -> Wait:
        """The next chunk; whatever the folder holds from the first one on that is told is removed before.

        Args:
            index: Chunk.
            latents_BTCHW: Clean and finite; not changed afterwards.
            lists: int32 [N, I, J] for each layer; may change after what is returned was called.
        Raises:
            OSError: An earlier chunk could not be written.
        """
        assert self._next_chunk in (None, index), "chunks come in order"
        if self._next_chunk is None:
            for number in sorted(_numbers(self._folder), reverse=True):
                if number >= index:
                    path_of(self._folder, number).unlink()
        self._next_chunk = index + 1
        while self._waiting and (len(self._waiting) >= _MAX_WAITING or self._waiting[0][0].done()):
            self._waiting.popleft()[0].result()
        few = torch.int16 if self._num_tiles <= torch.iinfo(torch.int16).max else torch.int32
        host = LoggedChunk(
            torch.empty(latents_BTCHW.shape, dtype=latents_BTCHW.dtype, pin_memory=self._is_pinned),
            torch.empty((len(lists), *lists[0].shape), dtype=few, pin_memory=self._is_pinned),
        )

        def copy() -> None:
            host.latents_BTCHW.copy_(latents_BTCHW, non_blocking=True)
            host.index_LNIJ.copy_(torch.stack(list(lists)).to(few), non_blocking=True)

        wait = self._side.run(copy)
        # The latents are held until they were read: they may be given up while the copy is under way.
        self._waiting.append((self._writer.submit(self._write, index, host), latents_BTCHW))
        return wait

    def flush(self) -> None:
        """Wait until all that was told is written.

        Raises:
            OSError: It could not be.
        """
        while self._waiting:
            self._waiting.popleft()[0].result()

    def close(self) -> None:
        """`flush`, and nothing can be recorded afterwards."""
        try:
            self.flush()
        finally:
            self._writer.shutdown()

    def _write(self, index: int, chunk: LoggedChunk) -> None:
        """In the thread."""
        self._side.finish()
        assert _is_within(chunk.index_LNIJ, self._num_tiles), f"chunk {index} saw tiles that are not there"
        write_tensors(path_of(self._folder, index), self._rollout, chunk._asdict(), {"chunk": str(index)})


@torch.no_grad()
def replay_log(
    folder: Path, rollout_id: RolloutId, rollout: CapturedRollout, plan: RolloutPlan, first_chunk: int = 0
) -> int:
    """Fill the table with the chunks of a log; nothing is denoised, and the GPU is not waited for.

    Args:
        folder: Of the log; no folder is an empty log.
        rollout_id: Which one is to go on.
        rollout: Its table holds the chunks before `first_chunk`; where an error is raised, some of the log's, too.
        plan: Of the rollout.
        first_chunk: Where what a snapshot held ends.
    Returns:
        The chunk to go on with: `rollout.run(plan, this)`.
    Raises:
        CheckpointMismatch: A file is missing, broken, of another rollout or of other sizes; names it.
    """
    stop = _stop_of(folder, first_chunk, plan.num_chunks)
    for index in range(first_chunk, stop):
        chunk = read_chunk(folder, rollout_id, index)
        position = rollout.begin(plan, index)
        _check(path_of(folder, index), chunk, rollout)
        latents, lists = (to_device(x, rollout.device) for x in chunk)
        rollout.list_for_clean_pass(lists)
        rollout.call(latents, 0.0, choose=False, clean=True)
        rollout.remember(position)
    return stop


def read_chunk(folder: Path, rollout: RolloutId, index: int) -> LoggedChunk:
    """One chunk, on the host; its latents are what pictures are decoded from.

    Raises:
        CheckpointMismatch: The file is broken, or of another rollout or chunk.
    """
    path = path_of(folder, index)
    try:
        with safe_open(path, framework="pt") as file:
            facts = check_rollout(path, rollout, file.metadata(), "a chunk log")
            if facts.get("chunk") != str(index):
                raise CheckpointMismatch(f"{path}: holds chunk {facts.get('chunk')}")
            return LoggedChunk(*(file.get_tensor(name) for name in LoggedChunk._fields))
    except (SafetensorError, OSError) as error:
        raise CheckpointMismatch(f"{path}: no readable part of a chunk log: {error}") from error


def path_of(folder: Path, index: int) -> Path:
    return folder / f"chunk-{index:06d}.safetensors"


def _numbers(folder: Path) -> list[int]:
    """Of the chunks that are there."""
    if not folder.exists():
        return []
    return [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]


def _stop_of(folder: Path, first_chunk: int, num_chunks: int) -> int:
    """The chunk after the last one, if none is missing and the rollout has one more."""
    numbers = {number for number in _numbers(folder) if number >= first_chunk}
    stop = first_chunk + len(numbers)
    for index in range(first_chunk, stop):
        if index not in numbers:
            raise CheckpointMismatch(f"{path_of(folder, index)}: missing, though the log holds chunk {max(numbers)}")
    if stop >= max(num_chunks, first_chunk + 1):
        raise CheckpointMismatch(
            f"{path_of(folder, stop - 1)}: a chunk that becomes history, but this rollout ends with {num_chunks - 1}"
        )
    return stop


def _check(path: Path, chunk: LoggedChunk, rollout: CapturedRollout) -> None:
    """Against what the rollout takes for the chunk in hand."""
    lists, (latents, index) = rollout.clean_lists, chunk
    expected = rollout.latents_shape, (len(lists), *lists[0].shape)
    found = latents.shape, index.shape
    if found != expected:
        raise CheckpointMismatch(f"{path}: latents and lists {_sizes(found)}, this rollout has {_sizes(expected)}")
    if latents.dtype != torch.float32 or index.dtype not in (torch.int16, torch.int32):
        raise CheckpointMismatch(f"{path}: latents and lists in {latents.dtype} and {index.dtype}")
    if not bool(torch.isfinite(latents).all()):
        raise CheckpointMismatch(f"{path}: latents that are not finite")
    if not _is_within(index, rollout.chooser.num_tiles):
        raise CheckpointMismatch(f"{path}: tiles beyond the {rollout.chooser.num_tiles} of this table")


def _is_within(index: Tensor, num_tiles: int) -> bool:
    least, most = index.aminmax()
    return int(least) >= 0 and int(most) < num_tiles


def _sizes(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join(str(tuple(shape)) for shape in shapes)

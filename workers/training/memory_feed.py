"""Batches for the memory stage: a long true context and many chunks that ask for places in it.

Each clip has context chunks of one long path and, after them, question chunks that see the context and not one another:
runs of consecutive chunks that go on, or that return to a place of the context by the same way, the other way round,
between chunks, or displaced; and a few that see little or nothing, so that new land stays in view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.model.backbones import Backbone
from workers.training.feed import (
    COORDINATE_SHIFT,
    PATH_CHUNKS,
    Feed,
    FeedRecipe,
    newest_group,
    pick_chunks,
    pick_worlds,
    spec_at,
    stretch_times,
    tokenize_captions,
)
from workers.worlds.captions import write_caption
from workers.worlds.clips import PATH_BOX, Difficulty, WorldPlan, draw_move, draw_path

RUN = 4
"""Question chunks that follow one another."""

SLOW_TOO = Difficulty(mover_share=0.1, speeds=(0.25, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0))
"""Slow paths make near-duplicates of a view; few movers, because where they are at a return cannot be known."""


@dataclass(frozen=True)
class MemoryFeedRecipe(FeedRecipe):
    """What the batches are made of: `chunks` is the length of the context.

    Attributes:
        runs: Runs of questions that see the whole context.
        early_cuts: Further questions, each with the number of context chunks that it sees.
        go_on: Probability that a run goes on along the path instead of returning.
        shifted: Probability that a return is displaced by up to `shift` pixels.
        aligned: Probability that a return shows the very frames of a context chunk.
        late: Probability that time jumps before a return, by up to `jump` chunks.
        pictures_per_run: Questions of a run that are also compared as pictures; divides `RUN`.
    """

    seed: int = 4
    batch: int = 6
    chunks: int = 36
    pool: int = 96
    fresh: int = 6
    difficulty: Difficulty = field(default_factory=lambda: SLOW_TOO)
    runs: int = 5
    early_cuts: tuple[int, ...] = (0, 1, 2, 5)
    go_on: float = 0.2
    shifted: float = 0.35
    shift: int = 16
    aligned: float = 0.5
    late: float = 0.5
    jump: int = 80
    pictures_per_run: int = 4

    @property
    def cuts(self) -> tuple[int, ...]:
        """For each question the number of context chunks that it sees."""
        return (self.chunks,) * (self.runs * RUN) + self.early_cuts

    @property
    def pictured(self) -> tuple[int, ...]:
        """Questions whose pictures are needed: some of each run, by turns with its first."""
        each = range(0, RUN, RUN // self.pictures_per_run)
        return tuple(run * RUN + (run % 2 + later) % RUN for run in range(self.runs) for later in each)


@dataclass
class MemoryBatch:
    """B clips of T context frames and S question frames (whole chunks), latent frames where nothing else is said.

    Attributes:
        context_BTCHW, questions_BSCHW: True latents.
        camera_BTS2, question_camera_BSS2: World position of each of the 4 video frames of a latent frame.
        times_BT, question_times_BS: Time indices.
        pictures_BPFCHW: True video frames of the pictured questions, float16.
        rows_BPF, num_tokens_B: The captions, tokenized.
    """

    context_BTCHW: Tensor
    questions_BSCHW: Tensor
    camera_BTS2: Tensor
    question_camera_BSS2: Tensor
    times_BT: Tensor
    question_times_BS: Tensor
    pictures_BPFCHW: Tensor
    rows_BPF: Tensor
    num_tokens_B: Tensor


@dataclass(frozen=True)
class MemoryPlan:
    """All of a batch that is decided on the CPU; frames of the context first, then those of the questions."""

    worlds: list[tuple[int, int]]
    newest: list[WorldPlan]
    positions_BF2: NDArray[np.float32]
    clock_BF: NDArray[np.float32]
    camera_BF2: NDArray[np.float32]
    times_BT: NDArray[np.float32]
    rows_BPF: NDArray[np.int64]
    num_tokens_B: NDArray[np.int64]


@dataclass(frozen=True)
class _Questions:
    """Of one clip: frames of the path, displacement, and time indices of chunks; whether true time goes on."""

    frames_F: NDArray[np.int64]
    shift_F2: NDArray[np.int64]
    chunk_times_K: NDArray[np.float64]


def ask_run(
    picks_K: NDArray[np.int64], end_time: float, recipe: MemoryFeedRecipe, frames: int, rng: np.random.Generator
) -> _Questions:
    """A run of questions after the whole context.

    Args:
        picks_K: Context chunks, as chunks of the path.
        end_time: Time index of the chunk after the context, in chunks.
        recipe: See there.
        frames: Video frames of a chunk.
        rng: Draws.
    """
    steps = np.arange(RUN * frames)
    shift, wait = np.zeros(2, dtype=np.int64), 0.0
    if rng.random() < recipe.go_on:
        at = (picks_K[-1] + 1) * frames + steps
    else:
        begin = int(picks_K[rng.integers(len(picks_K))]) * frames
        begin += 0 if rng.random() < recipe.aligned else int(rng.integers(-frames, frames + 1))
        at = begin + frames - 1 - steps if rng.random() < 0.6 else begin + steps
        if rng.random() < recipe.shifted:
            shift = rng.integers(-recipe.shift, recipe.shift + 1, size=2)
        if rng.random() < recipe.late:
            wait = float(np.floor(rng.random() ** 2 * recipe.jump))
    length = PATH_CHUNKS * frames
    at = np.abs(at)
    at = np.where(at >= length, 2 * length - 1 - at, at)  # a path that ends is walked back
    return _Questions(at, np.broadcast_to(shift, (len(at), 2)), end_time + wait + np.arange(RUN, dtype=np.float64))


def ask_early(picks_K: NDArray[np.int64], chunk_times_K: NDArray[np.float64], cut: int, frames: int) -> _Questions:
    """The chunk of the path after the first so many of the context."""
    place = int(picks_K[0]) if cut == 0 else int(picks_K[cut - 1]) + 1
    time = chunk_times_K[0] if cut == 0 else chunk_times_K[cut - 1] + 1
    at = np.minimum(place, PATH_CHUNKS - 1) * frames + np.arange(frames)
    return _Questions(at, np.zeros((frames, 2), dtype=np.int64), np.array([time]))


def plan_memory_batch(recipe: MemoryFeedRecipe, backbone: Backbone, batch_index: int) -> MemoryPlan:
    """Decide everything about the batch of this index."""
    r, chunk, stride = recipe, backbone.chunk_latent_frames, backbone.temporal_stride
    frames = chunk * stride
    rng = np.random.Generator(np.random.Philox(key=[r.seed, 2 * 10**6 + batch_index]))
    worlds = pick_worlds(r, batch_index, rng)
    moves = [draw_move(rng, r.difficulty) for _ in worlds]
    paths = np.stack([draw_path(move, PATH_CHUNKS * frames, rng) for move in moves])
    picks = pick_chunks(paths.reshape(r.batch, PATH_CHUNKS, frames, 2), r, rng)
    times = stretch_times(picks, chunk, rng)
    positions, clocks, all_times = [], [], []
    for path, picked, time_T in zip(paths, picks, times, strict=True):
        chunk_times = time_T[::chunk].astype(np.float64) / chunk
        asked = [ask_run(picked, chunk_times[-1] + 1, r, frames, rng) for _ in range(r.runs)]
        asked += [ask_early(picked, chunk_times, cut, frames) for cut in r.early_cuts]
        seen = (picked[:, None] * frames + np.arange(frames)).ravel()
        at = np.concatenate([seen, *(one.frames_F for one in asked)])
        shift = np.concatenate([np.zeros((len(seen), 2), dtype=np.int64), *(one.shift_F2 for one in asked)])
        later = np.concatenate([one.chunk_times_K for one in asked])
        positions.append(np.clip(path[at] + shift, *PATH_BOX))
        clocks.append(np.concatenate([seen, (later[:, None] * frames + np.arange(frames)).ravel()]))
        all_times.append(np.concatenate([time_T, (later[:, None] * chunk + np.arange(chunk)).ravel()]))
    captions = [write_caption(spec_at(r, place).scene, move, rng) for place, move in zip(worlds, moves, strict=True)]
    rows, num_tokens = tokenize_captions(captions, r, backbone, rng)
    where = np.stack(positions)
    camera = where + rng.integers(0, COORDINATE_SHIFT, size=(r.batch, 1, 2))
    return MemoryPlan(
        worlds,
        newest_group(r, batch_index),
        where.astype(np.float32),
        np.stack(clocks).astype(np.float32),
        camera.astype(np.float32),
        np.stack(all_times).astype(np.float32),
        rows,
        num_tokens,
    )


class MemoryFeed(Feed):
    """Batches of the memory stage by index."""

    recipe: MemoryFeedRecipe
    planner: Callable[[Any, Backbone, int], Any] = staticmethod(plan_memory_batch)

    @torch.no_grad()
    def draw(self, batch_index: int, plan: Any) -> Any:
        """Paint and code a planned batch."""
        self._turn_ring(batch_index, plan.newest)
        b, r = self.backbone, self.recipe
        latents = self._encode(plan.worlds, plan.positions_BF2, plan.clock_BF)
        camera = self._send(plan.camera_BF2).unflatten(1, (-1, b.temporal_stride))
        times = self._send(plan.times_BT)
        split = r.chunks * b.chunk_latent_frames
        return MemoryBatch(
            latents[:, :split],
            latents[:, split:],
            camera[:, :split],
            camera[:, split:],
            times[:, :split],
            times[:, split:],
            self._picture(plan),
            self._send(plan.rows_BPF),
            self._send(plan.num_tokens_B),
        )

    def _picture(self, plan: MemoryPlan) -> Tensor:
        """True frames of the pictured questions."""
        r, frames = self.recipe, self.backbone.chunk_latent_frames * self.backbone.temporal_stride
        first = [(r.chunks + question) * frames for question in r.pictured]
        at = np.concatenate([plan.positions_BF2[:, start : start + frames] for start in first], 1)
        when = np.concatenate([plan.clock_BF[:, start : start + frames] for start in first], 1)
        views = self._render(plan.worlds, self._send(at), self._send(when))
        pictures: Tensor = views.unflatten(1, (len(first), frames))
        return pictures.contiguous().half()

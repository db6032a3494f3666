"""Training batches for the DiT, drawn on the fly: latents of chunks along long camera paths, with their captions.

A batch is a function of (seed, batch index) alone, so a run that goes on from a checkpoint sees the same batches. Half
of the contexts are contiguous and explore; the others are sparse chunks of one long path, those that show the last
chunk's place favoured, with time stretched at the gaps: far history becomes familiar without long sequences.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.model.backbones import Backbone
from workers.model.text_encoder import tokenize
from workers.model.vae import VideoVAE
from workers.worlds.captions import write_caption
from workers.worlds.clips import (
    Difficulty,
    WorldPlan,
    Worlds,
    WorldSpec,
    draw_move,
    draw_path,
    draw_spec,
    draw_worlds,
    plan_world,
    render_clip,
)

CAPTION_WORDS = 127
"""Prompts of a batch are padded to this many words, so that shapes never change; longer ones are cut."""

PLANNERS = 8
"""Processes that plan batches; one plan takes some 20 ms."""

PATH_CHUNKS = 84
COORDINATE_SHIFT = 1024
"""Worlds are moved by up to so many pixels: coordinates mean nothing by themselves, and a larger range is known."""


@dataclass(frozen=True)
class FeedRecipe:
    """What batches are made of."""

    seed: int = 1
    batch: int = 24
    chunks: int = 10
    pool: int = 96
    fresh: int = 3
    contiguous: float = 0.5
    prompt_dropout: float = 0.1
    difficulty: Difficulty = field(default_factory=Difficulty)


@dataclass
class Batch:
    """B clips of T latent frames (whole chunks).

    Attributes:
        latents_BTCHW: Normalised latents, float32.
        camera_BTS2: World position of each of the 4 video frames of a latent frame.
        times_BT: Time index of each latent frame.
        rows_BPF, num_tokens_B: The captions, tokenized; a dropped caption has no tokens.
        captions: As text, before dropping.
    """

    latents_BTCHW: Tensor
    camera_BTS2: Tensor
    times_BT: Tensor
    rows_BPF: Tensor
    num_tokens_B: Tensor
    captions: list[str]


def pick_chunks(positions_BCF2: NDArray[np.float32], recipe: FeedRecipe, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of the chunks of each path that make up a training clip, ascending, [B, chunks]."""
    batch, path_chunks = positions_BCF2.shape[:2]
    wanted = recipe.chunks
    middle = positions_BCF2[:, :, positions_BCF2.shape[2] // 2]
    last = np.asarray(rng.integers(wanted, path_chunks, size=batch))
    index = np.arange(path_chunks)[None]
    distance = np.abs(middle - middle[np.arange(batch), last][:, None]).max(-1)
    score = rng.gumbel(size=(batch, path_chunks)) + 2.0 * (distance < 80)
    score += 9.0 * (index >= last[:, None] - rng.integers(0, 4, size=(batch, 1)))  # the last few, without a gap
    score = np.where(index == last[:, None], 99.0, np.where(index > last[:, None], -99.0, score))
    sparse = np.sort(np.argsort(-score, axis=1)[:, :wanted], axis=1)
    contiguous = last[:, None] - wanted + 1 + np.arange(wanted)
    return np.where(rng.random((batch, 1)) < recipe.contiguous, contiguous, sparse)


def stretch_times(picks_BK: NDArray[np.int64], chunk: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Time index of each latent frame; at gaps, in half of the clips, time jumps by up to 40 more chunks."""
    gaps = np.diff(picks_BK, axis=1, prepend=picks_BK[:, :1]) > 1
    jumps = np.floor(rng.random(picks_BK.shape) ** 2 * 40) * (rng.random((len(picks_BK), 1)) < 0.5)
    chunk_times = picks_BK + np.cumsum(gaps * jumps, axis=1)
    return np.asarray((chunk_times[..., None] * chunk + np.arange(chunk)).reshape(len(picks_BK), -1), dtype=np.float32)


@dataclass(frozen=True)
class BatchPlan:
    """All of a batch that is decided on the CPU; may come from another process.

    Attributes:
        worlds: For each clip its place in the ring: (group of worlds, index in group).
        newest: The group of worlds that joins the ring with this batch.
        positions_BF2, clock_BF: Camera in its world, and true time of each video frame.
        camera_BF2: The camera as the model is told.
        times_BT: Time index of each latent frame as the model is told.
        rows_BPF, num_tokens_B, captions: As in `Batch`.
    """

    worlds: list[tuple[int, int]]
    newest: list[WorldPlan]
    positions_BF2: NDArray[np.float32]
    clock_BF: NDArray[np.float32]
    camera_BF2: NDArray[np.float32]
    times_BT: NDArray[np.float32]
    rows_BPF: NDArray[np.int64]
    num_tokens_B: NDArray[np.int64]
    captions: list[str]


def plan_group(recipe: FeedRecipe, group: int) -> list[WorldPlan]:
    """Some worlds of the ring."""
    first = recipe.seed * 10_000_000 + group * recipe.fresh
    return [plan_world(draw_spec(seed, recipe.difficulty)) for seed in range(first, first + recipe.fresh)]


def pick_worlds(recipe: FeedRecipe, batch_index: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """A world of the ring for each clip, all different: (group of worlds, index in group)."""
    places = rng.permutation(max(1, recipe.pool // recipe.fresh) * recipe.fresh)[: recipe.batch]
    return [(batch_index + int(place) // recipe.fresh, int(place) % recipe.fresh) for place in places]


def newest_group(recipe: FeedRecipe, batch_index: int) -> list[WorldPlan]:
    """The worlds that join the ring with this batch."""
    return plan_group(recipe, batch_index + max(1, recipe.pool // recipe.fresh) - 1)


def spec_at(recipe: FeedRecipe, place: tuple[int, int]) -> WorldSpec:
    """What world stands at this place of the ring."""
    return draw_spec(recipe.seed * 10_000_000 + place[0] * recipe.fresh + place[1], recipe.difficulty)


def tokenize_captions(
    captions: list[str], recipe: FeedRecipe, backbone: Backbone, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and numbers of tokens of captions, some of them dropped; shapes never change."""
    dropped = rng.random(len(captions)) < recipe.prompt_dropout
    rows, num_tokens = tokenize(["" if drop else text for drop, text in zip(dropped, captions, strict=True)], backbone)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, max(0, CAPTION_WORDS - rows.shape[1])))[:, :CAPTION_WORDS]
    return rows.numpy(), num_tokens.clamp(max=CAPTION_WORDS).numpy()


def plan_batch(recipe: FeedRecipe, backbone: Backbone, batch_index: int) -> BatchPlan:
    """Decide everything about the batch of this index."""
    r, chunk, frames = recipe, backbone.chunk_latent_frames, backbone.chunk_latent_frames * backbone.temporal_stride
    rng = np.random.Generator(np.random.Philox(key=[r.seed, 10**6 + batch_index]))
    worlds = pick_worlds(r, batch_index, rng)
    moves = [draw_move(rng, r.difficulty) for _ in worlds]
    paths = np.stack([draw_path(move, PATH_CHUNKS * frames, rng) for move in moves])
    paths = paths.reshape(r.batch, PATH_CHUNKS, frames, 2)
    picks = pick_chunks(paths, r, rng)
    positions = paths[np.arange(r.batch)[:, None], picks].reshape(r.batch, -1, 2)
    clock = (picks[..., None] * frames + np.arange(frames)).reshape(r.batch, -1).astype(np.float32)
    captions = [write_caption(spec_at(r, place).scene, move, rng) for place, move in zip(worlds, moves, strict=True)]
    rows, num_tokens = tokenize_captions(captions, r, backbone, rng)
    camera = positions + rng.integers(0, COORDINATE_SHIFT, size=(r.batch, 1, 2))
    return BatchPlan(
        worlds,
        newest_group(r, batch_index),
        positions,
        clock,
        camera.astype(np.float32),
        stretch_times(picks, chunk, rng),
        rows,
        num_tokens,
        captions,
    )


class Feed:
    """Batches by index. Worlds live in a ring that moves on by `fresh` worlds a batch."""

    planner: Callable[[Any, Backbone, int], Any] = staticmethod(plan_batch)
    """(recipe, backbone, batch index) -> plan; called in other processes."""

    def __init__(self, recipe: FeedRecipe, backbone: Backbone, vae: VideoVAE, device: torch.device) -> None:
        self.recipe, self.backbone, self.vae, self.device = recipe, backbone, vae, device
        self._drawn: dict[int, Worlds] = {}

    def batch(self, batch_index: int) -> Batch:
        """The batch of this index."""
        return self.draw(batch_index, self.planner(self.recipe, self.backbone, batch_index))

    @torch.no_grad()
    def draw(self, batch_index: int, plan: BatchPlan) -> Batch:
        """Paint and code a planned batch."""
        self._turn_ring(batch_index, plan.newest)
        stride = self.backbone.temporal_stride
        return Batch(
            self._encode(plan.worlds, plan.positions_BF2, plan.clock_BF),
            self._send(plan.camera_BF2).unflatten(1, (-1, stride)),
            self._send(plan.times_BT),
            self._send(plan.rows_BPF),
            self._send(plan.num_tokens_B),
            plan.captions,
        )

    def _turn_ring(self, batch_index: int, newest: list[WorldPlan]) -> None:
        """Let the worlds of this batch stand in the ring, and no others."""
        groups = max(1, self.recipe.pool // self.recipe.fresh)
        wanted = range(batch_index, batch_index + groups)
        for gone in [key for key in self._drawn if key not in wanted]:
            del self._drawn[gone]
        for group in wanted:
            if group not in self._drawn:
                plans = newest if group == wanted[-1] else plan_group(self.recipe, group)
                self._drawn[group] = draw_worlds(plans, self.device)

    def _send(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def _render(self, places: list[tuple[int, int]], at_BF2: Tensor, when_BF: Tensor) -> Tensor:
        """Views of worlds of the ring."""
        specs = tuple(self._drawn[group].specs[index] for group, index in places)
        pictures = torch.stack([self._drawn[group].pictures_BCHW[index] for group, index in places])
        levels = self._drawn[places[0][0]].levels_BHW
        return render_clip(Worlds(specs, pictures, levels), at_BF2, when_BF)

    def _encode(
        self, places: list[tuple[int, int]], positions_BF2: NDArray[np.float32], clock_BF: NDArray[np.float32]
    ) -> Tensor:
        """Latents of the views; a few clips at a time, because pictures are large."""
        at, when = self._send(positions_BF2), self._send(clock_BF)
        parts = []
        for start in range(0, len(places), 8):
            part = slice(start, start + 8)
            frames = self._render(places[part], at[part], when[part])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                parts.append(self.vae.encode(frames).float())
        return torch.cat(parts)


def _planned(feed: Feed, first: int, pool: ProcessPoolExecutor) -> Iterator[tuple[int, Any]]:
    """Plans from an index on, made by other processes, some ahead."""
    ahead: deque[Future[Any]] = deque()
    for index in itertools.count(first):
        while len(ahead) < 2 * PLANNERS:
            ahead.append(pool.submit(feed.planner, feed.recipe, feed.backbone, index + len(ahead)))
        yield index, ahead.popleft().result()


def batches_ahead(feed: Feed, first: int) -> Iterator[Batch]:
    """Batches from an index on; on a GPU processes plan them and a thread draws them ahead on its own stream."""
    if feed.device.type != "cuda":
        for index in itertools.count(first):
            yield feed.batch(index)
    ready: queue.Queue[tuple[Batch, torch.cuda.Event] | BaseException] = queue.Queue(maxsize=3)
    stop = threading.Event()
    pool = ProcessPoolExecutor(PLANNERS, mp_context=multiprocessing.get_context("spawn"))

    def draw() -> None:
        stream = torch.cuda.Stream(feed.device)
        try:
            with torch.cuda.device(feed.device), torch.cuda.stream(stream):  # a new thread begins on the first GPU
                for index, plan in _planned(feed, first, pool):
                    batch = feed.draw(index, plan)
                    event = torch.cuda.Event()
                    event.record(stream)
                    ready.put((batch, event))
                    if stop.is_set():
                        return
        except BaseException as error:  # handed to the consumer, which raises it
            ready.put(error)

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            batch, event = item
            current = torch.cuda.current_stream()
            current.wait_event(event)
            for value in vars(batch).values():
                if isinstance(value, Tensor):
                    value.record_stream(current)
            yield batch
    finally:
        stop.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.1)
        pool.shutdown(cancel_futures=True)

"""Training batches for the DiT, drawn on the fly: latents of chunks along long camera paths, with their captions.

A batch is a function of (seed, batch index) alone, so a run that goes on from a checkpoint sees the same batches. Half of
the contexts are contiguous and explore; the others are sparse chunks of one long path, those that show the last chunk's
place favoured, with time stretched at the gaps: far history becomes familiar without long sequences.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.model.backbones import Backbone
from workers.model.text_encoder import tokenize
from workers.model.vae import VideoVAE
from workers.worlds.captions import write_caption
from workers.worlds.clips import Worlds, build_worlds, draw_move, draw_path, draw_spec, render_clip

CAPTION_WORDS = 127
"""Prompts of a batch are padded to this many words, so that shapes never change; longer ones are cut."""

PATH_CHUNKS = 84
COORDINATE_SHIFT = 1024
"""Worlds are moved by up to so many pixels, so that coordinates mean nothing by themselves and a larger range is known."""


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
    last = rng.integers(wanted, path_chunks, size=batch)
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
    return (chunk_times[..., None] * chunk + np.arange(chunk)).reshape(len(picks_BK), -1).astype(np.float32)


class Feed:
    """Batches by index. Worlds live in a ring that moves on by `fresh` worlds a batch."""

    def __init__(self, recipe: FeedRecipe, backbone: Backbone, vae: VideoVAE, device: torch.device) -> None:
        self.recipe, self.backbone, self.vae, self.device = recipe, backbone, vae, device
        self._drawn: dict[int, Worlds] = {}

    def _worlds(self, batch_index: int) -> list[tuple[Worlds, int]]:
        """The ring at this batch as (group of worlds, index in group)."""
        fresh, groups = self.recipe.fresh, max(1, self.recipe.pool // self.recipe.fresh)
        wanted = range(batch_index, batch_index + groups)
        for gone in [key for key in self._drawn if key not in wanted]:
            del self._drawn[gone]
        for group in wanted:
            if group not in self._drawn:
                first = self.recipe.seed * 10_000_000 + group * fresh
                specs = [draw_spec(seed) for seed in range(first, first + fresh)]
                self._drawn[group] = build_worlds(specs, self.device)
        return [(self._drawn[group], index) for group in wanted for index in range(fresh)]

    @torch.no_grad()
    def batch(self, batch_index: int) -> Batch:
        """The batch of this index."""
        r, chunk, stride = self.recipe, self.backbone.chunk_latent_frames, self.backbone.temporal_stride
        rng = np.random.Generator(np.random.Philox(key=[r.seed, 10**6 + batch_index]))
        ring = self._worlds(batch_index)
        chosen = [ring[int(index)] for index in rng.permutation(len(ring))[: r.batch]]
        moves = [draw_move(rng) for _ in range(r.batch)]
        frames = chunk * stride
        paths = np.stack([draw_path(move, PATH_CHUNKS * frames, rng) for move in moves])
        paths = paths.reshape(r.batch, PATH_CHUNKS, frames, 2)
        picks = pick_chunks(paths, r, rng)
        rows = np.arange(r.batch)[:, None]
        positions = paths[rows, picks].reshape(r.batch, -1, 2)
        clock = (picks[..., None] * frames + np.arange(frames)).reshape(r.batch, -1).astype(np.float32)
        captions = [write_caption(w.specs[i].scene, move, rng) for (w, i), move in zip(chosen, moves, strict=True)]
        dropped = rng.random(r.batch) < r.prompt_dropout
        said = ["" if drop else text for drop, text in zip(dropped, captions, strict=True)]
        token_rows, num_tokens = tokenize(said, self.backbone)
        token_rows = torch.nn.functional.pad(token_rows, (0, 0, 0, max(0, CAPTION_WORDS - token_rows.shape[1])))
        camera = positions + rng.integers(0, COORDINATE_SHIFT, size=(r.batch, 1, 2))
        return Batch(
            self._encode(chosen, positions, clock),
            self._send(torch.from_numpy(camera.astype(np.float32))).unflatten(1, (-1, stride)),
            self._send(torch.from_numpy(stretch_times(picks, chunk, rng))),
            self._send(token_rows[:, :CAPTION_WORDS]),
            self._send(num_tokens.clamp(max=CAPTION_WORDS)),
            captions,
        )

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _encode(
        self, chosen: list[tuple[Worlds, int]], positions: NDArray[np.float32], clock: NDArray[np.float32]
    ) -> Tensor:
        """Latents of the views; a few clips at a time, because pictures are large."""
        at, when = self._send(torch.from_numpy(positions)), self._send(torch.from_numpy(clock))
        parts = []
        for start in range(0, len(chosen), 4):
            some = chosen[start : start + 4]
            specs = tuple(worlds.specs[index] for worlds, index in some)
            pictures = torch.stack([worlds.pictures_BCHW[index] for worlds, index in some])
            frames = render_clip(Worlds(specs, pictures, ()), at[start : start + 4], when[start : start + 4])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                parts.append(self.vae.encode(frames).float())
        return torch.cat(parts)


def batches_ahead(feed: Feed, first: int) -> Iterator[Batch]:
    """Batches from an index on; on a GPU a thread draws them ahead on its own stream."""
    if feed.device.type != "cuda":
        while True:
            yield feed.batch(first)
            first += 1
    ready: queue.Queue[tuple[Batch, torch.cuda.Event] | BaseException] = queue.Queue(maxsize=3)
    stop = threading.Event()

    def draw() -> None:
        index, stream = first, torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    batch = feed.batch(index)
                    event = torch.cuda.Event()
                    event.record(stream)
                    ready.put((batch, event))
                    index += 1
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
            for tensor in (batch.latents_BTCHW, batch.camera_BTS2, batch.times_BT, batch.rows_BPF, batch.num_tokens_B):
                tensor.record_stream(current)
            yield batch
    finally:
        stop.set()
        while thread.is_alive():
            try:
                ready.get(timeout=0.1)
            except queue.Empty:
                continue

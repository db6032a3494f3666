"""Train the bundled DiT and its text encoder by flow matching with teacher forcing: stage 1 of `recipe.py`.

A run stops at its time and writes a checkpoint; what it does at a step depends on the step and the seed alone, so going
on from a checkpoint is the same as never having stopped.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.denoise import add_noise, flow_target, shift_sigma
from workers.model.backbones import Backbone
from workers.training import checkpoint
from workers.training.feed import Batch, Feed, batches_ahead
from workers.training.muon import Muon
from workers.training.progress import Log
from workers.training.sequence import ParallelAttention, WorldModel, predict_flow, prepare

DELAY = 4
"""A batch is used twice: at once, and so many batches later with other noise."""


@dataclass(frozen=True)
class DitRecipe:
    """What decides stage 1."""

    muon_lr: float = 1.5e-3
    adam_lr: float = 9e-4
    weight_decay: float = 0.02
    warmup_steps: int = 150
    flat_share: float = 0.5
    shift: float = 2.5
    context_noise: float = 0.3
    ema: float = 0.999
    seed: int = 1


class DitTrainer:
    """Weights, their running mean, optimisers; one step at a time."""

    def __init__(self, recipe: DitRecipe, backbone: Backbone, chunks: int, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.model = WorldModel(backbone).to(device)
        self.ema = copy.deepcopy(self.model).eval()
        self.attention = ParallelAttention(backbone, chunks, device)
        matrices = [p for n, p in self.model.dit.blocks.named_parameters() if p.ndim == 2 and n.endswith("weight")]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, recipe.muon_lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(
                others, recipe.adam_lr, betas=(0.9, 0.97), weight_decay=0.01, fused=device.type == "cuda"
            ),
        ]
        self.steps = 0
        self.seconds = 0.0
        if device.type == "cuda":
            self.model.dit.compile_layers()

    def set_rate(self, progress: float) -> None:
        """Learning rates at this share of the run."""
        factor = min(1.0, (self.steps + 1) / self.recipe.warmup_steps)
        if progress > self.recipe.flat_share:
            factor *= max(0.02, (1 - progress) / (1 - self.recipe.flat_share))
        for optimiser, base in zip(self.optimisers, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * factor

    def step(self, batch: Batch) -> Tensor:
        """One optimiser step; returns the loss of each chunk place, averaged over clips."""
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed * 1_000_003 + self.steps)
        loss_K = self.loss(batch, generator)
        loss_K.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(self.recipe.ema, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return loss_K.detach()

    def loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean squared error of the flow for each chunk place."""
        clean, frames = batch.latents_BTCHW, self.model.backbone.chunk_latent_frames
        clips, chunks = clean.shape[0], clean.shape[1] // frames

        def draw(kind: Any, *shape: int) -> Tensor:
            drawn: Tensor = kind(shape, device=self.device, generator=generator)
            return drawn

        context = draw(torch.rand, clips, chunks) * self.recipe.context_noise
        context = (context * (draw(torch.rand, clips, chunks) < 0.5)).repeat_interleave(frames, 1)
        level = shift_sigma(torch.sigmoid(draw(torch.randn, clips, chunks)), self.recipe.shift)
        level = level.repeat_interleave(frames, 1)
        noise = draw(torch.randn, *clean.shape)
        fixed = prepare(batch, self.attention, draw(torch.randn, *clean.shape), context)
        noisy = add_noise(clean, noise, level[..., None, None, None])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            flow = predict_flow(self.model, fixed, noisy, level, self.attention)
        error = (flow - flow_target(clean, noise)).square().mean((2, 3, 4))
        return error.view(clips, chunks, frames).mean((0, 2))

    def save(self, path: Path) -> None:
        """Everything that the next step depends on."""
        checkpoint.write(path, checkpoint.state_of(self))

    def load(self, path: Path) -> None:
        """Go on where `save` was called."""
        checkpoint.go_on(self, checkpoint.read(path, self.device))


class BatchTwice:
    """The batch of each step: even steps a new one, odd steps the one of `DELAY` batches before."""

    def __init__(self, feed: Feed, first_step: int) -> None:
        first = max(0, first_step // 2 - DELAY)
        self._ahead = batches_ahead(feed, first)
        self._held: dict[int, Batch] = {}
        self._next = first

    def at(self, step: int) -> Batch:
        """Steps must be asked for in order."""
        wanted = step // 2 if step % 2 == 0 else max(0, step // 2 - DELAY)
        while self._next <= wanted:
            self._held[self._next] = next(self._ahead)
            self._next += 1
        for old in [index for index in self._held if index < step // 2 - DELAY]:
            del self._held[old]
        return self._held[wanted]

    def close(self) -> None:
        """Stop drawing ahead."""
        self._ahead.close()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Span:
    """How long a call trains: until so many seconds of the stage are spent, of the total that the rate counts with."""

    total_s: float
    stop_s: float


def train(trainer: DitTrainer, feed: Feed, span: Span, checkpoint: Path, log: Log) -> None:
    """Step until the span ends, then write the checkpoint; the log gets a line every 200 steps."""
    batches = BatchTwice(feed, trainer.steps)
    spent, last = trainer.seconds, time.monotonic()
    sums: list[Tensor] = []
    for _ in range(10**9):
        trainer.set_rate(spent / span.total_s)
        loss_K = trainer.step(batches.at(trainer.steps))
        sums.append(loss_K)
        now = time.monotonic()
        spent, last = spent + now - last, now
        if trainer.steps % 200 == 0:
            mean = torch.stack(sums).mean(0).tolist()
            assert math.isfinite(mean[0]), "the loss is not finite"
            log.write(
                stage="dit", step=trainer.steps, seconds=spent, loss=sum(mean) / len(mean), first=mean[0], last=mean[-1]
            )
            sums.clear()
        if spent >= span.stop_s:
            break
    batches.close()
    trainer.seconds = spent
    trainer.save(checkpoint)
    log.write(stage="dit", step=trainer.steps, seconds=spent, checkpoint=str(checkpoint))

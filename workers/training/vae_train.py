"""Train the bundled video VAE on worlds drawn on the fly, stage 0 of the recipe (`recipe.py`).

The whole step (forward, backward, Muon and AdamW) is one CUDA graph, because its kernels are small. Without a GPU the
same step runs plainly, which is what the tests do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from workers.model.vae import VideoVAE
from workers.training.muon import Muon
from workers.training.progress import Log
from workers.worlds.clips import Worlds, build_worlds, draw_move, draw_path, draw_spec, render_clip

NUM_FRAMES = 12
HELD_OUT_SEED = 10**9
"""Worlds from this seed on are never trained on."""


@dataclass(frozen=True)
class VaeRecipe:
    """What decides a training run besides its length."""

    batch: int = 16
    pool: int = 96
    fresh: int = 8
    steps_per_fresh: int = 24
    muon_lr: float = 1.5e-3
    adam_lr: float = 1.5e-3
    warmup_steps: int = 150
    flat_share: float = 0.4
    latent_noise: float = 0.15
    seed: int = 1


class ClipFeed:
    """Short clips of a pool of worlds that is renewed all the time."""

    def __init__(self, recipe: VaeRecipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.rng = np.random.default_rng(recipe.seed)
        self.next_seed = recipe.seed * 10_000_000
        self.pool: list[Worlds] = [self._draw() for _ in range(max(1, recipe.pool // recipe.fresh))]
        self.renewals = 0

    def _draw(self) -> Worlds:
        seeds = range(self.next_seed, self.next_seed + self.recipe.fresh)
        self.next_seed += self.recipe.fresh
        return build_worlds([draw_spec(seed) for seed in seeds], self.device)

    def renew(self) -> None:
        """Replace the oldest worlds."""
        self.pool[self.renewals % len(self.pool)] = self._draw()
        self.renewals += 1

    def clips(self) -> Tensor:
        """[batch, 12, 3, 128, 128] in [-1, 1]."""
        fresh = self.recipe.fresh
        parts = []
        for start in range(0, self.recipe.batch, fresh):
            worlds = self.pool[int(self.rng.integers(len(self.pool)))]
            count = min(fresh, self.recipe.batch - start)
            paths = np.stack([draw_path(draw_move(self.rng), NUM_FRAMES, self.rng) for _ in range(count)])
            times = self.rng.integers(0, 4000, size=(count, 1)) + np.arange(NUM_FRAMES)
            at = torch.from_numpy(paths).to(self.device)
            when = torch.from_numpy(times.astype(np.float32)).to(self.device)
            chosen = Worlds(worlds.specs[:count], worlds.pictures_BCHW[:count], worlds.levels_BHW[:count])
            parts.append(render_clip(chosen, at, when))
        return torch.cat(parts)


def reconstruction_loss(frames: Tensor, decoded: Tensor) -> Tensor:
    """Absolute error, error of the picture's gradients (edges), and squared error."""
    error = decoded.float() - frames
    edges_x = (error[..., 1:] - error[..., :-1]).abs().mean()
    edges_y = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 0.5 * (edges_x + edges_y) + 4 * error.square().mean()


class VaeTrainer:
    """Weights, optimisers and the captured step."""

    def __init__(self, recipe: VaeRecipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.vae = VideoVAE().to(device)
        if device.type == "cuda":
            self.vae = self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        kernels = [p for p in self.vae.parameters() if p.ndim == 4 and p.shape[0] >= 64]
        others = [p for p in self.vae.parameters() if not (p.ndim == 4 and p.shape[0] >= 64)]
        self.lrs = [torch.tensor(lr, device=device) for lr in (recipe.muon_lr, recipe.adam_lr)]
        captured = device.type == "cuda"
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(kernels, self.lrs[0]),
            torch.optim.AdamW(others, self.lrs[1], betas=(0.9, 0.99), weight_decay=1e-4, capturable=captured),
        ]
        self.steps = 0
        self.frames = torch.zeros(recipe.batch, NUM_FRAMES, 3, 128, 128, device=device)
        self.loss = torch.zeros((), device=device)

    def compute(self) -> None:
        """One step on `self.frames`; leaves the loss in `self.loss`."""
        on_gpu = self.device.type == "cuda"  # some processors convolve bfloat16 thirty times slower than float32
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            latents = self.vae.encode(self.frames)
            level = torch.rand(len(latents), 1, 1, 1, 1, device=self.device) * self.recipe.latent_noise
            decoded = self.vae.decode(latents + level * torch.randn_like(latents))
        loss = reconstruction_loss(self.frames, decoded)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=False)
        self.loss.copy_(loss.detach())

    def capture(self) -> Callable[[], None]:
        """The step as one CUDA graph (after warming up on the side, as capture asks for)."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        return graph.replay

    def set_rate(self, progress: float) -> None:
        """Learning rates at this share of the run: warm-up, flat, then down to a hundredth."""
        factor = min(1.0, (self.steps + 1) / self.recipe.warmup_steps)
        if progress > self.recipe.flat_share:
            factor *= max(0.01, (1 - progress) / (1 - self.recipe.flat_share))
        for lr, base in zip(self.lrs, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
            lr.fill_(base * factor)


@torch.no_grad()
def held_out_psnr(vae: VideoVAE, device: torch.device, num_clips: int = 64) -> Tensor:
    """PSNR in dB of each held-out clip of 24 video frames, coded and decoded without noise."""
    values = []
    for start in range(0, num_clips, 8):
        rng = np.random.default_rng(HELD_OUT_SEED + start)
        worlds = build_worlds([draw_spec(HELD_OUT_SEED + start + index) for index in range(8)], device)
        paths = torch.from_numpy(np.stack([draw_path(draw_move(rng), 24, rng) for _ in range(8)])).to(device)
        times = torch.arange(24, device=device, dtype=torch.float32).expand(8, -1)
        frames = render_clip(worlds, paths, times)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            decoded = vae.decode(vae.encode(frames))
        error = (decoded.float().clamp(-1, 1) - frames).square().mean((1, 2, 3, 4)) / 4
        values.append(-10 * error.log10())
    return torch.cat(values)


def train(recipe: VaeRecipe, seconds: float, out: Path, device: torch.device) -> VideoVAE:
    """Train for a time, write `vae.safetensors` (fp16) and `vae.json` (losses and held-out PSNR)."""
    out.mkdir(parents=True, exist_ok=True)
    trainer, feed = VaeTrainer(recipe, device), ClipFeed(recipe, device)
    trainer.vae.train()
    trainer.frames.copy_(feed.clips())
    run = trainer.capture() if device.type == "cuda" else trainer.compute
    log = Log(out / "vae_log.jsonl", asdict(recipe))
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        trainer.set_rate(elapsed / seconds)
        if trainer.steps % recipe.steps_per_fresh == 0:
            feed.renew()
        trainer.frames.copy_(feed.clips())
        run()
        trainer.steps += 1
        if trainer.steps % 500 == 0:
            log.write(stage="vae", step=trainer.steps, seconds=round(elapsed, 1), loss=trainer.loss.item())
    vae = trainer.vae.eval()
    psnr = held_out_psnr(vae, device, 64 if device.type == "cuda" else 8)
    summary = {
        "steps": trainer.steps,
        "seconds": seconds,
        "psnr_db": psnr.mean().item(),
        "psnr_p10_db": psnr.quantile(0.1).item(),
        "psnr_min_db": psnr.min().item(),
        "recipe": asdict(recipe),
    }
    log.write(stage="vae", **{k: v for k, v in summary.items() if k != "recipe"})
    save_file({name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}, out / "vae.safetensors")
    (out / "vae.json").write_text(json.dumps(summary, indent=1))
    return vae


def load_vae(folder: Path, device: torch.device) -> VideoVAE:
    """The VAE that `train` wrote, ready to code."""
    vae = VideoVAE()
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    return vae.to(device).eval()

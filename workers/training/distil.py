"""Stage 2: make the DiT good in four steps, by distribution matching against itself with many steps (DMD).

The student's chunks are pushed along the difference of two score estimates: the guided stage-1 model (what is real)
minus a copy that is always trained on the student's own output (what is made). A small critic that sees true latents
adds the crispness that the stage-1 model itself lacks. Where the truth is known, because the camera has been there,
plain squared error holds the memory. Half of the updates see the student's own rollouts as history.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.denoise import Schedule, add_noise, clean_estimate, flow_target, make_schedule, shift_sigma
from workers.model.backbones import Backbone
from workers.training import checkpoint
from workers.training.fast_rollout import FastRollout
from workers.training.feed import Batch
from workers.training.sequence import ParallelAttention, Pass, WorldModel, predict_flow, prepare

VIEW_PX = 128
CELL_PX = 8
GUESSING = 2 * math.log(2)
"""Loss of a critic that cannot tell."""


@dataclass(frozen=True)
class DistilRecipe:
    """What decides stage 2."""

    num_steps: int = 4
    shift: float = 3.0
    guidance: float = 2.0
    student_lr: float = 1e-4
    judge_lr: float = 5e-4
    critic_lr: float = 5e-4
    critic_updates: int = 3
    judge_updates: int = 1
    critic_weight: float = 0.5
    seen_weight: float = 4.0
    context_noise: float = 0.2
    own_history: float = 0.5
    rollout_every: int = 6
    warmup_steps: int = 30
    ema: float = 0.99
    seed: int = 1


class Critic(nn.Module):
    """Tells true latents of a chunk from made ones, patch by patch; told how noisy both were made."""

    def __init__(self, channels: int, width: int = 128) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.body = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )

    def forward(self, chunks_NCHW: Tensor, level_N: Tensor) -> Tensor:
        level = level_N[:, None, None, None].expand(-1, 1, *chunks_NCHW.shape[-2:])
        out: Tensor = self.body(self.first(torch.cat([chunks_NCHW, level], 1)))
        return out


def seen_cells(camera_BTS2: Tensor, chunk: int, latent_size: int) -> Tensor:
    """Which latent cells show land that an earlier chunk of the same clip has shown, bool [B, T, H, W]."""
    index = torch.arange(camera_BTS2.shape[1], device=camera_BTS2.device) // chunk
    return shown_cells(camera_BTS2, camera_BTS2, index[None, :] < index[:, None], latent_size)


def shown_cells(camera_BTS2: Tensor, other_BUS2: Tensor, counts_TU: Tensor, latent_size: int) -> Tensor:
    """Which latent cells show land that one of the other latent frames that count shows, bool [B, T, H, W]."""
    corner_BT2, other_BU2 = camera_BTS2.mean(2), other_BUS2.mean(2)
    middle = (torch.arange(latent_size, device=corner_BT2.device) + 0.5) * CELL_PX
    margin = CELL_PX / 2
    inside = []
    for axis in (0, 1):
        place = corner_BT2[:, :, None, axis, None] + middle - other_BU2[:, None, :, axis, None]  # [B, T, U, cells]
        inside.append((place >= margin) & (place <= VIEW_PX - margin))
    counts = counts_TU[None, :, :, None]
    across, down = inside[0] & counts, inside[1] & counts
    return torch.einsum("btsy,btsx->btyx", down.half(), across.half()) > 0.5


class Distiller:
    """Student, teacher, judge and critic; one update at a time.

    Args:
        recipe: See there.
        start: Weights of stage 1.
        chunks: Chunks of a batch.
        device: Of everything.
    """

    def __init__(self, recipe: DistilRecipe, start: WorldModel, chunks: int, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.student, self.teacher, self.judge = (copy.deepcopy(start).to(device) for _ in range(3))
        self.ema = copy.deepcopy(start).to(device).eval()
        self.backbone: Backbone = start.backbone
        self.chunk = self.backbone.chunk_latent_frames
        self.critic = Critic(self.chunk * self.backbone.latent_channels).to(device)
        self.attention = ParallelAttention(self.backbone, chunks, device)
        self.schedule: Schedule = make_schedule(recipe.num_steps, recipe.shift)
        fused = device.type == "cuda"
        self.optimisers = {
            "student": torch.optim.AdamW(
                self.student.parameters(), recipe.student_lr, betas=(0.5, 0.99), weight_decay=0.0, fused=fused
            ),
            "judge": torch.optim.AdamW(
                self.judge.parameters(), recipe.judge_lr, betas=(0.5, 0.99), weight_decay=0.0, fused=fused
            ),
            "critic": torch.optim.AdamW(
                self.critic.parameters(), recipe.critic_lr, betas=(0.0, 0.99), weight_decay=0.0, fused=fused
            ),
        }
        self.steps = 0
        self.own: Tensor | None = None
        self.own_batch: Batch | None = None
        if device.type == "cuda":
            self.student.dit.compile_layers()
            for other in (self.teacher, self.judge):
                other.dit.share_compiled(self.student.dit)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self.critic_skill = torch.zeros((), device=device)
        """0 while the critic only guesses, 1 when it knows: it has a say only as far as it can tell."""

    def set_rate(self, progress: float) -> None:
        """Learning rates at this share of the run: warm-up, flat, down to a fifth in the last third."""
        factor = min(1.0, (self.steps + 1) / self.recipe.warmup_steps)
        factor *= 1.0 if progress < 0.66 else max(0.2, (1 - progress) / 0.34)
        for name, base in (("student", self.recipe.student_lr), ("judge", self.recipe.judge_lr)):
            for group in self.optimisers[name].param_groups:
                group["lr"] = base * factor

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of the student and a few of those that judge it; returns means to be logged."""
        own_history = self.own is not None and self._chance(self.recipe.own_history)
        if own_history:
            assert self.own is not None
            assert self.own_batch is not None
            batch = Batch(**{**vars(self.own_batch), "latents_BTCHW": self.own})
        fixed = self._prepare(batch)
        made, values = self._update_student(batch, fixed, has_truth=not own_history)
        for _ in range(self.recipe.judge_updates):
            values["judge"] = self._update_judge(fixed, made)
        if self.recipe.critic_weight and not own_history:
            for _ in range(self.recipe.critic_updates):
                values["critic"] = self._update_critic(batch.latents_BTCHW, made)
            skill = ((GUESSING - values["critic"]) / 0.4).clamp(0, 1)
            self.critic_skill.lerp_(skill, 0.1)
            values["skill"] = self.critic_skill.clone()
        self.steps += 1
        decay = min(self.recipe.ema, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.student.parameters()), 1 - decay)
        if self.recipe.own_history and not own_history and self.steps % self.recipe.rollout_every == 0:
            self.roll_out(batch)
        return values

    def acquaint_judge(self, batch: Batch) -> Tensor:
        """Train the judge alone on what the student makes; for the beginning, when it knows nothing of the student."""
        fixed = self._prepare(batch)
        with torch.no_grad():
            made = self._sample(fixed, batch)[1]
        self.steps += 1  # another step of the student's denoising next time
        return self._update_judge(fixed, made)

    @torch.no_grad()
    def roll_out(self, batch: Batch) -> None:
        """The running mean of the student makes the clips of this batch by itself, chunk after chunk."""
        keys = self.ema.prompt_keys(batch.rows_BPF, batch.num_tokens_B)
        rollout = FastRollout(self.ema, batch.camera_BTS2, batch.times_BT, keys)
        made = rollout.run(lambda chunk: rollout.denoise(chunk, self.schedule, self.generator, renoise=True))
        self.own, self.own_batch = made, batch

    def save(self, path: Path) -> None:
        """All weights and optimisers; own histories are made anew."""
        state = {name: getattr(self, name).state_dict() for name in ("student", "judge", "critic", "ema")}
        state |= {"optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()}}
        checkpoint.write(path, state | {"steps": self.steps, "skill": self.critic_skill})

    def load(self, path: Path) -> None:
        """Go on where `save` was called."""
        state = checkpoint.read(path, self.device)
        for name in ("student", "judge", "critic", "ema"):
            getattr(self, name).load_state_dict(state[name])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.steps, self.critic_skill = state["steps"], state["skill"]

    def _chance(self, probability: float) -> bool:
        return bool(torch.rand((), generator=torch.Generator().manual_seed(7919 * self.steps + 13)) < probability)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def _per_chunk(self, batch: int, frames: int) -> Tensor:
        """Uniform numbers, one a chunk, repeated over its frames."""
        drawn = torch.rand(batch, frames // self.chunk, device=self.device, generator=self.generator)
        return drawn.repeat_interleave(self.chunk, 1)

    def _prepare(self, batch: Batch) -> Pass:
        shape = batch.latents_BTCHW.shape
        level = self._per_chunk(*shape[:2]) * self.recipe.context_noise
        level = level * (self._per_chunk(*shape[:2]) < 0.5)
        return prepare(batch, self.attention, self._draw(*shape), level)

    def _flow(self, model: WorldModel, fixed: Pass, noisy: Tensor, level: Tensor, *, prompt: bool = True) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return predict_flow(model, fixed, noisy, level, self.attention, prompt=prompt)

    def _sample(self, fixed: Pass, batch: Batch) -> tuple[int, Tensor]:
        """The student's clean estimate at a random step of its own denoising; the steps before it without gradients."""
        last = int(
            torch.randint(self.recipe.num_steps, (), generator=torch.Generator().manual_seed(self.steps * 31 + 7))
        )
        shape = batch.latents_BTCHW.shape
        x = self._draw(*shape)
        for index, sigma in enumerate(self.schedule.sigmas[: last + 1]):
            level = torch.full(shape[:2], sigma, device=self.device)
            with torch.set_grad_enabled(index == last and torch.is_grad_enabled()):
                clean = clean_estimate(x, self._flow(self.student, fixed, x, level), sigma)
            if index < last:
                x = add_noise(clean, self._draw(*shape), self.schedule.sigmas[index + 1])
        return last, clean

    def _update_student(self, batch: Batch, fixed: Pass, *, has_truth: bool) -> tuple[Tensor, dict[str, Tensor]]:
        _, made = self._sample(fixed, batch)
        push = self._distribution_push(fixed, made.detach())
        values = {"push": push.square().mean().sqrt()}
        if self.recipe.critic_weight:
            blame = self._critic_push(made.detach())
            weight = self.recipe.critic_weight * self.critic_skill
            push = push + weight * blame * (push.square().mean() / (blame.square().mean() + 1e-20)).sqrt()
        if has_truth:
            seen = seen_cells(batch.camera_BTS2, self.chunk, made.shape[-1])[:, :, None].float()
            error = ((made - batch.latents_BTCHW).square() * seen).sum() / (seen.sum() * made.shape[2] + 1)
            values["seen"] = error.detach()
            loss = (made * push * (1 - 0.7 * seen)).mean() + self.recipe.seen_weight * error
        else:
            loss = (made * push).mean()
        self._descend("student", loss, self.student)
        return made.detach(), values

    @torch.no_grad()
    def _distribution_push(self, fixed: Pass, made: Tensor) -> Tensor:
        """Where the judge's estimate differs from the guided teacher's, in parts of how far the teacher corrects."""
        level = shift_sigma(self._per_chunk(*made.shape[:2]) * 0.96 + 0.02, self.recipe.shift)
        sigma = level[..., None, None, None]
        noisy = add_noise(made, self._draw(*made.shape), sigma)
        flow = self._flow(self.teacher, fixed, noisy, level)
        if self.recipe.guidance != 1.0:
            without = self._flow(self.teacher, fixed, noisy, level, prompt=False)
            flow = without + self.recipe.guidance * (flow - without)
        real = clean_estimate(noisy, flow, sigma)
        fake = clean_estimate(noisy, self._flow(self.judge, fixed, noisy, level), sigma)
        chunks = (made - real).abs().unflatten(1, (-1, self.chunk)).mean((2, 3, 4, 5))
        scale = chunks.repeat_interleave(self.chunk, 1)[..., None, None, None]
        return torch.nan_to_num((fake - real) / (scale + 1e-3))

    def _critic_input(self, latents: Tensor, level_N: Tensor) -> Tensor:
        chunks = latents.reshape(-1, self.chunk * latents.shape[2], *latents.shape[-2:])
        return add_noise(chunks, self._draw(*chunks.shape), level_N[:, None, None, None])

    def _critic_push(self, made: Tensor) -> Tensor:
        """Gradient of the critic's disbelief with respect to what was made."""
        made = made.clone().requires_grad_()
        level = torch.rand(made.shape[0] * made.shape[1] // self.chunk, device=self.device) * 0.5
        disbelief = F.softplus(-self.critic(self._critic_input(made, level), level)).mean()
        return torch.autograd.grad(disbelief, made)[0]

    def _update_judge(self, fixed: Pass, made: Tensor) -> Tensor:
        level = shift_sigma(torch.sigmoid(torch.randn_like(self._per_chunk(*made.shape[:2])[:, :: self.chunk])), 2.5)
        level = level.repeat_interleave(self.chunk, 1)
        noise = self._draw(*made.shape)
        noisy = add_noise(made, noise, level[..., None, None, None])
        loss = (self._flow(self.judge, fixed, noisy, level) - flow_target(made, noise)).square().mean()
        self._descend("judge", loss, self.judge)
        return loss.detach()

    def _update_critic(self, true: Tensor, made: Tensor) -> Tensor:
        level = torch.rand(made.shape[0] * made.shape[1] // self.chunk, device=self.device) * 0.5
        known = self._critic_input(true, level)
        on_true = self.critic(known, level)
        on_made = self.critic(self._critic_input(made, level), level)
        loss = F.softplus(-on_true).mean() + F.softplus(on_made).mean()
        # A nudge must not change the answer on true latents: keeps the critic smooth (approximate R1 penalty).
        nudged = self.critic(known + 0.05 * self._draw(*known.shape), level)
        self._descend("critic", loss + (nudged - on_true).square().mean(), self.critic)
        return loss.detach()

    def _descend(self, name: str, loss: Tensor, module: nn.Module) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        self.optimisers[name].step()
        self.optimisers[name].zero_grad(set_to_none=True)

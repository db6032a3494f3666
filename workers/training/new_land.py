"""What stage 3 does for land that nobody has seen: a critic keeps it crisp, and fading pictures are made whole again.

The critic tells true chunks of latents from made ones, patch by patch and knowing the caption; its blame pushes the
model where its picture shows land of its own. A faded context is what a long rollout comes to: paler or harder, with
its colours off, more so from chunk to chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.denoise import add_noise
from workers.training.distil import GUESSING
from workers.training.team import Team


@dataclass(frozen=True)
class CriticRecipe:
    """What decides the critic.

    Attributes:
        width: Channels of its first layers.
        lr: Of AdamW.
        noise: Up to so much noise hides details from it, a different level each time.
        smooth, nudge: Weight and size of the nudges that must not change its answer (approximate R1 and R2 penalties).
        certain: Loss below guessing at which its blame counts in full.
    """

    width: int = 128
    lr: float = 1e-4
    noise: float = 0.4
    smooth: float = 2.0
    nudge: float = 0.05
    certain: float = 0.4


class LandCritic(nn.Module):
    """How true each patch of a chunk of latents looks, told its noise level and its caption; [N, rows, columns]."""

    def __init__(self, channels: int, text_dim: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.fine = _Residual(width)
        self.down = nn.Conv2d(width, 2 * width, 4, 2, 1)
        self.coarse = nn.Sequential(_Residual(2 * width), _Residual(2 * width), nn.SiLU())
        self.judge = nn.Conv2d(2 * width, 1, 1)
        self.caption = nn.Linear(text_dim, 2 * width, bias=False)

    def forward(self, chunks_NCHW: Tensor, level_N: Tensor, text_NE: Tensor) -> Tensor:
        level = level_N[:, None, None, None].expand(-1, 1, *chunks_NCHW.shape[-2:])
        seen = self.coarse(self.down(self.fine(self.first(torch.cat([chunks_NCHW, level], 1)))))
        fits = torch.einsum("nchw,nc->nhw", seen, self.caption(text_NE)) / math.sqrt(seen.shape[1])
        plain: Tensor = self.judge(seen)[:, 0]
        return plain + fits


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return out


class LandJudge:
    """The critic with its optimiser and its skill.

    Args:
        recipe: See there.
        chunk, channels, text_dim: Latent frames of a chunk, their channels, width of encoded captions.
        device: Of everything.
        team: Whose critics are one.
    """

    def __init__(
        self,
        recipe: CriticRecipe,
        chunk: int,
        channels: int,
        text_dim: int,
        device: torch.device,
        team: Team | None = None,
    ) -> None:
        self.recipe, self.chunk, self.device, self.team = recipe, chunk, device, team or Team(0, 1, device)
        self.critic = LandCritic(chunk * channels, text_dim, recipe.width).to(device)
        self.optimiser = torch.optim.AdamW(
            self.critic.parameters(), recipe.lr, betas=(0.5, 0.99), fused=device.type == "cuda"
        )
        self.skill = torch.zeros((), device=device)
        """0 while the critic only guesses, 1 when it knows: it has a say only as far as it can tell."""

    def blame(self, made_BSCHW: Tensor, text_BE: Tensor, unknown_BSHW: Tensor, generator: torch.Generator) -> Tensor:
        """Where each latent should not go, as far as the critic can tell; root mean square ``skill`` where unknown."""
        made = made_BSCHW.detach().clone().requires_grad_()
        level = self._levels(made, generator)
        disbelief = F.softplus(-self._answer(made, level, text_BE, generator)).mean()
        push = torch.autograd.grad(disbelief, made)[0] * unknown_BSHW[:, :, None]
        cells = unknown_BSHW.sum() * made.shape[2]
        size = (push.square().sum() / (cells + 1)).sqrt()
        return self.skill * push / (size + 1e-12)

    def learn(self, true_BSCHW: Tensor, made_BSCHW: Tensor, text_BE: Tensor, generator: torch.Generator) -> Tensor:
        """One step of the critic; returns its loss without the penalty."""
        true, made = true_BSCHW.detach(), made_BSCHW.detach()
        level = self._levels(true, generator)
        both = torch.cat([true, made])
        levels, texts = torch.cat([level, level]), torch.cat([text_BE, text_BE])
        noisy = self._hide(both, levels, generator)
        nudged = noisy + self.recipe.nudge * self._draw(noisy, generator)
        captions = self._captions(texts, both)
        answers = self._ask(noisy, levels, captions)
        on_true, on_made = answers.chunk(2)
        loss = F.softplus(-on_true).mean() + F.softplus(on_made).mean()
        change = (self._ask(nudged, levels, captions) - answers).square().mean()
        self.optimiser.zero_grad(set_to_none=True)
        (loss + self.recipe.smooth * change).backward()
        told = loss.detach().clone()
        self.team.average([*(parameter.grad for parameter in self.critic.parameters()), told])
        nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
        self.optimiser.step()
        self.skill = self.skill.lerp(((GUESSING - told) / self.recipe.certain).clamp(0, 1), 0.05)
        return told

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {"critic": self.critic.state_dict(), "optimiser": self.optimiser.state_dict(), "skill": self.skill}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.critic.load_state_dict(state["critic"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.skill = state["skill"]

    def _levels(self, latents: Tensor, generator: torch.Generator) -> Tensor:
        num = latents.shape[0] * latents.shape[1] // self.chunk
        return torch.rand(num, device=self.device, generator=generator) * self.recipe.noise

    def _draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(like.shape, device=self.device, generator=generator)

    def _hide(self, latents_BSCHW: Tensor, level_N: Tensor, generator: torch.Generator) -> Tensor:
        chunks = latents_BSCHW.reshape(-1, self.chunk * latents_BSCHW.shape[2], *latents_BSCHW.shape[-2:])
        return add_noise(chunks, self._draw(chunks, generator), level_N[:, None, None, None])

    def _captions(self, text_BE: Tensor, latents_BSCHW: Tensor) -> Tensor:
        return text_BE.repeat_interleave(latents_BSCHW.shape[1] // self.chunk, 0)

    def _ask(self, chunks_NCHW: Tensor, level_N: Tensor, text_NE: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            answer: Tensor = self.critic(chunks_NCHW, level_N, text_NE)
        return answer.float()

    def _answer(self, latents: Tensor, level_N: Tensor, text_BE: Tensor, generator: torch.Generator) -> Tensor:
        hidden = self._hide(latents, level_N, generator)
        return self._ask(hidden, level_N, self._captions(text_BE, latents))


def fade(context_BTCHW: Tensor, chunk: int, share: float, generator: torch.Generator) -> Tensor:
    """Let some contexts lose their looks from some chunk on, more and more; never in the first chunk.

    Args:
        context_BTCHW: True latents.
        chunk: Latent frames of a chunk.
        share: Probability that a context fades.
        generator: Draws.
    """
    clips, frames, channels = context_BTCHW.shape[:3]
    device, chunks = context_BTCHW.device, frames // chunk

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    begin, length = draw(clips, 1) * (chunks - 2), 1 + draw(clips, 1) * chunks
    ramp = ((torch.arange(chunks, device=device) - begin) / length).clamp(0, 1)
    ramp = (ramp * (draw(clips, 1) < share)).repeat_interleave(chunk, 1)[..., None, None, None]
    strength = draw(clips, 1, 1, 1, 1) * 1.2  # contrast of 0.1 to 1.3 in the end
    offset = torch.randn(clips, 1, channels, 1, 1, device=device, generator=generator) * 0.3
    mean = context_BTCHW.mean((-2, -1), keepdim=True)
    faded = mean + (0.1 + strength) * (context_BTCHW - mean) + offset
    return torch.lerp(context_BTCHW, faded, ramp)

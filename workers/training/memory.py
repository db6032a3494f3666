"""Stage 3: the distilled model learns to repeat exactly what it has seen, and keeps its look where it has not.

Only what is asked of it is trained: the four noise levels of its own denoising, on its own estimates, with the place
somewhere in a long context whose last chunks are, by turns, true or its own. What a context chunk has shown counts by
the error of the decoded picture; everything else must stay what the model said before this stage.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from workers.denoise import Schedule, add_noise, clean_estimate, make_schedule
from workers.model.control import control_maps
from workers.model.text_encoder import fold_padding
from workers.model.vae import VideoVAE
from workers.training import checkpoint
from workers.training.distil import CELL_PX, VIEW_PX, shown_cells
from workers.training.fast_rollout import FastRollout
from workers.training.memory_feed import RUN, MemoryBatch, MemoryFeedRecipe
from workers.training.muon import Muon
from workers.training.new_land import CriticRecipe, LandJudge, fade
from workers.training.picture_metric import log_mean, picture_metric
from workers.training.sequence import ParallelAttention, WorldModel
from workers.training.team import Team

TURNS = ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (3, 2))
"""What happens to a batch, one step each: (denoising step, generation of the end of the context).

Generation 0 is true; 1 are the model's own answers from there, 2 its answers from generation 1.
"""
FLIGHTS = 4
"""Batches between which the steps change, so that neighbouring steps differ in place and noise level."""
CYCLE = FLIGHTS * len(TURNS)

_LATENT_FLOOR = 3.75  # picture floors: with the usual one the VAE's own error, which stands beside that of latents


@dataclass(frozen=True)
class MemoryRecipe:
    """What decides stage 3.

    Attributes:
        own_chunks: So many chunks at the end of the context become the model's own.
        keep_weight, keep_every: How strongly, and how often, land that nothing has shown is held to what the model of
            reference says of it.
        critic_weight: How strongly the critic of new land pushes; 0 is without one.
        fade_share: Probability that a context fades; what is asked for, and what is held to, does not.
        own_ends: Of `FLIGHTS` batches, so many have contexts that the model itself rolls out from some chunk on, as a
            long take does; only what the true part has shown is asked for.
        own_from: Shares of a context between which that chunk is drawn.
        picture_floor: Squared error (pixels in [-1, 1]) that is good enough: nearly perfect clips must not be chased.
    """

    muon_lr: float = 5e-4
    adam_lr: float = 2e-4
    weight_decay: float = 0.01
    warmup_steps: int = 200
    flat_share: float = 0.25
    num_steps: int = 4
    shift: float = 3.0
    context_noise: float = 0.1
    noisy_share: float = 0.25
    own_chunks: int = 8
    step_weights: tuple[float, ...] = (0.4, 0.3, 0.4, 1.0)
    latent_weight: float = 0.5
    picture_weight: float = 2.0
    picture_steps: tuple[int, ...] = (0, 1, 2, 3)
    plain_share: float = 0.2
    keep_weight: float = 10.0
    keep_every: int = 2
    critic_weight: float = 0.0
    critic: CriticRecipe = field(default_factory=CriticRecipe)
    fade_share: float = 0.0
    own_ends: int = 0
    own_from: tuple[float, ...] = (0.25, 0.85)
    picture_floor: float = 4e-4
    ema: float = 0.998
    seed: int = 1


@dataclass
class Flight:
    """A batch on its way through `TURNS`.

    Attributes:
        batch: What was drawn.
        text_BPE, log_mass_BP: Its encoded prompts.
        context_BTCHW, camera_BTS2: The context as it is now.
        whole_BTCHW: The same where nothing has faded.
        true_T: Which context frames are true; None while all are.
        turn: The next of `TURNS`.
        estimate_BSCHW: The model's last clean estimate of the questions.
        answers_BSCHW: Its answers of which the end of the context was made.
    """

    batch: MemoryBatch
    text_BPE: Tensor
    log_mass_BP: Tensor
    context_BTCHW: Tensor
    whole_BTCHW: Tensor
    camera_BTS2: Tensor
    true_T: Tensor | None = None
    turn: int = 0
    estimate_BSCHW: Tensor | None = None
    answers_BSCHW: Tensor | None = None
    generation: int = 0


class MemoryTrainer:
    """The model, what it was, its running mean, the optimisers; one step of one flight at a time.

    Args:
        recipe, feed: See there.
        start: The distilled model.
        vae: Its VAE; stays as it is.
        device: Of everything.
        plain: Compile nothing.
        before: The model of reference for new land; `start` if not given.
        team: The processes that train together.
    """

    def __init__(
        self,
        recipe: MemoryRecipe,
        feed: MemoryFeedRecipe,
        start: WorldModel,
        vae: VideoVAE,
        device: torch.device,
        *,
        plain: bool = False,
        before: WorldModel | None = None,
        team: Team | None = None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.feed, self.device, self.team = recipe, feed, device, team or Team(0, 1, device)
        self.backbone, self.chunk = start.backbone, start.backbone.chunk_latent_frames
        self.model = copy.deepcopy(start).to(device)
        self.before = copy.deepcopy(before or start).to(device).requires_grad_(False)
        self.ema = copy.deepcopy(start).to(device).eval()
        self.model.text_encoder.requires_grad_(False)
        self.vae = copy.deepcopy(vae).to(device).requires_grad_(False)
        if device.type == "cuda":
            self.vae = self.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cuda" and not plain:
            self.model.dit.compile_layers()
            self.before.dit.share_compiled(self.model.dit)
        self.attention = ParallelAttention(self.backbone, feed.chunks, device, feed.cuts, plain=plain)
        self.schedule: Schedule = make_schedule(recipe.num_steps, recipe.shift)
        matrices = [p for n, p in self.model.dit.blocks.named_parameters() if p.ndim == 2 and n.endswith("weight")]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.dit.parameters() if id(p) not in chosen]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(matrices, recipe.muon_lr, weight_decay=recipe.weight_decay),
            torch.optim.AdamW(others, recipe.adam_lr, betas=(0.9, 0.97), fused=device.type == "cuda"),
        ]
        index = torch.arange(feed.chunks * self.chunk, device=device) // self.chunk
        cuts = torch.tensor(feed.cuts, device=device).repeat_interleave(self.chunk)
        self.counts_ST = index[None, :] < cuts[:, None]
        self.metric_CC: Tensor | None = None
        self.judge: LandJudge | None = None
        if recipe.critic_weight:
            channels, text_dim = self.backbone.latent_channels, self.backbone.text_dim
            self.judge = LandJudge(recipe.critic, self.chunk, channels, text_dim, device, self.team)
        self.early = slice(feed.runs * RUN * self.chunk, len(feed.cuts) * self.chunk)
        self.steps, self.seconds, self.boarded = 0, 0.0, 0

    def set_rate(self, progress: float) -> None:
        """Learning rates at this share of the run: warm-up, flat, then down to nothing."""
        factor = min(1.0, (self.steps + 1) / self.recipe.warmup_steps)
        if progress > self.recipe.flat_share:
            factor *= max(0.0, (1 - progress) / (1 - self.recipe.flat_share))
        for optimiser, base in zip(self.optimisers, (self.recipe.muon_lr, self.recipe.adam_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * factor

    @torch.no_grad()
    def board(self, batch: MemoryBatch) -> Flight:
        """Make a batch ready; the first one also gives the metric of the pictures."""
        if self.metric_CC is None:
            self.metric_CC = self._make_metric(batch.context_BTCHW[:, : 4 * self.chunk])
            self.team.average([self.metric_CC])
        encoded = self.model.text_encoder(batch.rows_BPF, batch.num_tokens_B)
        folded = fold_padding(encoded, self.backbone.text_tokens)
        whole = context = batch.context_BTCHW
        if self.recipe.fade_share:
            generator = self._generator(2_000_003, FLIGHTS * self.steps + self.boarded)
            context = fade(whole, self.chunk, self.recipe.fade_share, generator)
            self.boarded = (self.boarded + 1) % FLIGHTS
        return Flight(batch, folded.text_BPE, folded.log_mass_BP, context, whole, batch.camera_BTS2)

    def _generator(self, prime: int, count: int) -> torch.Generator:
        """Draws of this process at this point of the run."""
        seed = self.recipe.seed * prime + count + 7_919_000_003 * self.team.rank
        return torch.Generator(self.device).manual_seed(seed)

    def warm_up(self, flight: Flight) -> None:
        """Compile what a step runs, without taking one."""
        generator = self._generator(3_000_017, 0)
        context, whole, level = self._noisy_context(flight, generator)
        noise, sigma = self._draw(flight.batch.questions_BSCHW, generator), self.schedule.sigmas[0]
        self.attention.place(flight.batch.times_BT, flight.batch.question_times_BS)
        self._flow(self.model, flight, context, level, noise, sigma).square().mean().backward()
        with torch.no_grad():
            self._flow(self.before, flight, whole, level, noise, sigma)
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def give_own_ends(self, flights: list[Flight]) -> None:
        """From one chunk on, let the contexts of new flights be what the running mean makes of the same way."""
        if not flights:
            return
        generator = self._generator(4_000_037, self.steps)
        low, high = (round(share * self.feed.chunks) for share in self.recipe.own_from)
        cut = int(torch.randint(max(1, low), high + 1, (), generator=torch.Generator().manual_seed(self.steps)))
        each = [(f.camera_BTS2, f.batch.times_BT, f.text_BPE, f.log_mass_BP, f.whole_BTCHW) for f in flights]
        camera, times, texts, log_mass, given = (torch.cat(parts) for parts in zip(*each, strict=True))
        rollout = FastRollout(self.ema, camera, times, self.ema.dit.project_prompt(texts, log_mass))
        made = rollout.run(
            lambda chunk: rollout.denoise(chunk, self.schedule, generator, renoise=True), given, first_free=cut
        )
        true = torch.arange(given.shape[1], device=self.device) < cut * self.chunk
        for flight, context in zip(flights, made.split(self.feed.batch), strict=True):
            flight.context_BTCHW = flight.whole_BTCHW = context
            flight.true_T = true

    def step(self, flight: Flight) -> dict[str, Tensor]:
        """One optimiser step on the next turn of a flight; returns means to be logged."""
        index, generation = TURNS[flight.turn]
        generator = self._generator(1_000_003, self.steps)
        if generation > flight.generation:
            flight.answers_BSCHW, flight.generation = _known(flight.estimate_BSCHW), generation
            self._put_own(flight)
        loss, values = self._loss(flight, index, generator)
        loss.backward()
        self.team.average(parameter.grad for parameter in self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        flight.turn += 1
        decay = min(self.recipe.ema, self.steps / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return values

    def save(self, path: Path) -> None:
        """Everything that the next step depends on; to be called between cycles, when no batch is under way."""
        judge = None if self.judge is None else self.judge.state()
        checkpoint.write(path, checkpoint.state_of(self) | {"metric": self.metric_CC, "judge": judge})

    def load(self, path: Path) -> None:
        """Go on where `save` was called."""
        state = checkpoint.read(path, self.device)
        checkpoint.go_on(self, state)
        if self.judge is not None:
            self.judge.restore(state["judge"])
        self.metric_CC = state["metric"]

    def _make_metric(self, latents: Tensor) -> Tensor:
        with torch.enable_grad():
            metric = picture_metric(self.vae, latents, torch.Generator(self.device).manual_seed(0), probes=1)
        plain = torch.eye(len(metric), device=self.device) * metric.diagonal().mean()
        return torch.lerp(metric, plain, self.recipe.plain_share)

    def _put_own(self, flight: Flight) -> None:
        """Replace the end of the context by some of the model's own answers, in the order in which they were asked."""
        runs = -(-self.recipe.own_chunks // RUN)
        first_run = torch.randperm(self.feed.runs - runs + 1, generator=torch.Generator().manual_seed(self.steps))[0]
        begin = int(first_run) * RUN * self.chunk
        frames = self.recipe.own_chunks * self.chunk
        kept = flight.context_BTCHW.shape[1] - frames
        asked = slice(begin, begin + frames)
        own = _known(flight.answers_BSCHW)[:, asked]
        flight.context_BTCHW = torch.cat([flight.context_BTCHW[:, :kept], own], 1)
        flight.whole_BTCHW = torch.cat([flight.whole_BTCHW[:, :kept], own], 1)
        flight.camera_BTS2 = torch.cat([flight.camera_BTS2[:, :kept], flight.batch.question_camera_BSS2[:, asked]], 1)
        true = torch.arange(kept + frames, device=self.device) < kept
        flight.true_T = true if flight.true_T is None else flight.true_T & true

    def _draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(like.shape, device=self.device, generator=generator)

    def _noisy_context(self, flight: Flight, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The context and what it was before it faded with a little noise on some chunks, and its levels [B, T]."""
        context = flight.context_BTCHW
        shape = (context.shape[0], context.shape[1] // self.chunk)
        level = torch.rand(shape, device=self.device, generator=generator) * self.recipe.context_noise
        level *= torch.rand(shape, device=self.device, generator=generator) < self.recipe.noisy_share
        level = level.repeat_interleave(self.chunk, 1)
        noise, sigma = self._draw(context, generator), level[..., None, None, None]
        return add_noise(context, noise, sigma), add_noise(flight.whole_BTCHW, noise, sigma), level

    def _loss(self, flight: Flight, index: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one denoising step of all questions; keeps their clean estimates in the flight."""
        batch, sigma = flight.batch, self.schedule.sigmas[index]
        truth = batch.questions_BSCHW
        noise = self._draw(truth, generator)
        x = noise if index == 0 else add_noise(_known(flight.estimate_BSCHW), noise, sigma)
        context, whole, level = self._noisy_context(flight, generator)
        self.attention.place(batch.times_BT, batch.question_times_BS)
        made = clean_estimate(x, self._flow(self.model, flight, context, level, x, sigma), sigma)
        flight.estimate_BSCHW = made.detach()
        by_true, by_any = self._shown(flight)
        floor = _LATENT_FLOOR * self.recipe.picture_floor
        latents = log_mean(self._cost(made - truth), by_true, floor)
        memory, values = self.recipe.latent_weight * latents, {"latents": latents.detach()}
        if index in self.recipe.picture_steps:
            picture, psnr = self._picture_loss(flight, made, by_true)
            memory = memory + self.recipe.picture_weight * picture
            values[f"psnr_{flight.generation}_{index}"] = psnr
        loss, unknown = self.recipe.step_weights[index] * memory, ~by_any
        if self.steps % self.recipe.keep_every == 0:
            with torch.no_grad():
                kept = clean_estimate(x, self._flow(self.before, flight, whole, level, x, sigma), sigma)
            change = ((made - kept).square().mean(2) * unknown).sum() / (unknown.sum() + 1)
            loss = loss + self.recipe.keep_weight * change
            values["changed"] = change.detach()
        if self.judge is not None:
            loss = loss + self.recipe.critic_weight * self._land_loss(flight, made, unknown, values, generator)
        return loss, values

    def _land_loss(
        self, flight: Flight, made: Tensor, unknown: Tensor, values: dict[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """What the critic holds against new land of the early questions; it learns from the same chunks."""
        judge, early = self.judge, self.early
        assert judge is not None
        words = (flight.log_mass_BP == 0)[..., None]
        text = (flight.text_BPE * words).sum(1) / (words.sum(1) + 1)
        blame = judge.blame(made[:, early], text, unknown[:, early], generator)
        cells = unknown[:, early].sum() * made.shape[2]
        loss: Tensor = (made[:, early] * blame).sum() / (cells + 1)
        values["critic"] = judge.learn(flight.batch.questions_BSCHW[:, early], made[:, early], text, generator)
        values["skill"] = judge.skill
        return loss

    def _flow(
        self, model: WorldModel, flight: Flight, context: Tensor, level: Tensor, x: Tensor, sigma: float
    ) -> Tensor:
        b = self.backbone
        camera = torch.cat([flight.camera_BTS2, flight.batch.question_camera_BSS2], 1)
        control = model.dit.embed_control(control_maps(camera, b.width, b.height, b))
        levels = torch.cat([level, torch.full(x.shape[:2], sigma, device=self.device)], 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            keys = model.dit.project_prompt(flight.text_BPE, flight.log_mass_BP)
            flow: Tensor = model.dit(
                torch.cat([context, x], 1), levels * 1000, keys, self.attention, control_BQE=control
            )
        return flow[:, context.shape[1] :].float()

    def _shown(self, flight: Flight) -> tuple[Tensor, Tensor]:
        """Which cells of the questions the true part, and any part, of their context has shown; bool [B, S, H, W]."""
        size = flight.context_BTCHW.shape[-1]
        camera = flight.batch.question_camera_BSS2
        by_any = shown_cells(camera, flight.camera_BTS2, self.counts_ST, size)
        if flight.true_T is None:
            return by_any, by_any
        return shown_cells(camera, flight.camera_BTS2, self.counts_ST & flight.true_T, size), by_any

    def _cost(self, error_BSCHW: Tensor) -> Tensor:
        """Squared error of the picture that an error of the latents makes, for each cell [B, S, H, W]."""
        error = error_BSCHW.movedim(2, -1)
        return ((error @ _known(self.metric_CC)) * error).sum(-1)

    def _picture_loss(self, flight: Flight, made: Tensor, shown_BSHW: Tensor) -> tuple[Tensor, Tensor]:
        """Error of the decoded frames of the pictured questions where they are known, and its PSNR."""
        chunk, questions = self.chunk, self.feed.pictured
        base = flight.batch.questions_BSCHW if flight.answers_BSCHW is None else flight.answers_BSCHW
        latents, before, shown = [], [], []
        for question in questions:
            part = slice(question * chunk, (question + 1) * chunk)
            latents.append(made[:, part])
            shown.append(shown_BSHW[:, part])
            last = flight.context_BTCHW[:, -1] if question % RUN == 0 else base[:, question * chunk - 1]
            before.append(last)
        clips = made.shape[0]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            frames = self.vae.decode(torch.stack(latents, 1).flatten(0, 1), torch.stack(before, 1).flatten(0, 1))
        frames = frames.float().view(clips, len(questions), -1, *frames.shape[2:])
        error = (frames - flight.batch.pictures_BPFCHW.float()).square().mean(3)  # [B, P, F, h, w]
        mask = torch.stack(shown, 1).repeat_interleave(self.backbone.temporal_stride, 2)
        mask = mask.repeat_interleave(CELL_PX, 3).repeat_interleave(CELL_PX, 4)
        assert mask.shape[-1] == VIEW_PX
        error_B = (error * mask).flatten(1).sum(1) / (mask.flatten(1).sum(1) + 1)
        psnr = -10 * (error_B.detach() / 4 + 1e-6).log10().mean()
        return log_mean(error, mask, self.recipe.picture_floor), psnr


def _known(tensor: Any) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor

"""What the bundled model can do, measured on held-out worlds: memory, sharpness of new land, drift, following prompts.

Used by the training stages to see where they stand and by `tests/bench/world_model.py` for the published table.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.denoise import make_schedule
from workers.model.text_encoder import tokenize
from workers.model.vae import VideoVAE
from workers.quality.following import recognise_biome, recognise_direction
from workers.quality.landmarks import Quiz, make_quizzes
from workers.quality.reference import psnr_db, sharpness, ssim
from workers.quality.revisit import plan_revisit, seen_before
from workers.training.fast_rollout import FastRollout, Visible, sees_all, sees_none, sees_window
from workers.training.sequence import WorldModel
from workers.training.vae_train import HELD_OUT_SEED
from workers.worlds.camera import CameraMove, plan_camera, read_move
from workers.worlds.captions import write_caption, write_long_caption
from workers.worlds.clips import (
    VIEW_SIZE,
    Difficulty,
    Worlds,
    WorldSpec,
    build_worlds,
    draw_path,
    draw_spec,
    render_views,
)
from workers.worlds.terrain import WORLD_SIZE

STILL_AIR = Difficulty(max_movers=0, mover_share=0.0)
"""Without movers: a place looks the same when it is seen again."""

POLICIES: dict[str, Visible] = {"full": sees_all, "window": sees_window, "none": sees_none}


@dataclass(frozen=True)
class Sampling:
    """How chunks are made while measuring."""

    num_steps: int = 4
    shift: float = 3.0
    guidance: float = 1.0
    renoise: bool = False


@dataclass
class Revisit:
    """Returned views of n worlds, per policy ("vae" is what the VAE alone makes of the truth)."""

    psnr: dict[str, Tensor] = field(default_factory=dict)
    ssim: dict[str, Tensor] = field(default_factory=dict)
    landmarks: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Landmarks of the returned view that are recognised as their own kind and colour, and how many there are."""
    pictures: dict[str, Tensor] = field(default_factory=dict)
    """The middle frame of each returned view, [n, 3, 128, 128]."""
    seen: Tensor | None = None
    """Pixels of the returned views that were in view before, bool [n, 12, 1, 128, 128]; PSNR is of these alone."""
    whole_psnr: dict[str, Tensor] = field(default_factory=dict)
    """PSNR of whole views, the strips included that a displaced return shows for the first time."""


class Laboratory:
    """The model, the VAE and held-out worlds.

    Args:
        model: In evaluation, not compiled.
        vae: In evaluation.
        device: Of both.
    """

    def __init__(self, model: WorldModel, vae: VideoVAE, device: torch.device) -> None:
        self.model, self.vae, self.device = model, vae, device
        self.chunk = model.backbone.chunk_latent_frames
        self._drawn: dict[tuple[WorldSpec, ...], Worlds] = {}

    def worlds(self, specs: list[WorldSpec]) -> Worlds:
        """These worlds; drawn once, because one test after the other visits them."""
        key = tuple(specs)
        if key not in self._drawn:
            self._drawn[key] = build_worlds(specs, self.device)
        return self._drawn[key]

    def prompts(self, captions: list[str]) -> list:  # type: ignore[type-arg]
        """Cross-attention keys of captions."""
        rows, num_tokens = tokenize(captions, self.model.backbone)
        with torch.no_grad():
            return self.model.prompt_keys(rows.to(self.device), num_tokens.to(self.device))

    @torch.no_grad()
    def encode(self, worlds: Worlds, positions_BF2: Tensor) -> Tensor:
        """True latents along paths, a stretch at a time."""
        parts = []
        for start in range(0, positions_BF2.shape[1], 192):
            views = render_views(worlds.pictures_BCHW, positions_BF2[:, start : start + 192])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                parts.append(self.vae.encode(views).float())
        return torch.cat(parts, 1)

    @torch.no_grad()
    def decode(self, latents_BTCHW: Tensor, previous: Tensor | None = None) -> Tensor:
        """Frames of latents, float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.vae.decode(latents_BTCHW, previous).float()

    @torch.no_grad()
    def revisit(self, distance: int, num: int, sampling: Sampling, *, form: str, policies: tuple[str, ...]) -> Revisit:
        """Leave a place and return to it.

        Args:
            distance: Latent frames away.
            num: Worlds.
            sampling: How the returned chunk (in a rollout: every chunk after the place) is made.
            form: "cut" (true frames, hard cut back), "shifted" (the same, displaced by up to 16 pixels, judged where
                its land was in view before), "rollout" (out and back, generated after the place) or "generated" (all
                generated; compared with its own first view).
            policies: Which histories to compare.
        """
        specs = [draw_spec(HELD_OUT_SEED + 7000 + index, STILL_AIR) for index in range(num)]
        rng = np.random.default_rng(distance)
        shift = 16 if form == "shifted" else 0
        cut = form in ("cut", "shifted")
        paths = [plan_revisit(distance, rng, WORLD_SIZE, VIEW_SIZE, cut=cut, shift=shift) for _ in specs]
        captions = [write_caption(spec.scene, CameraMove("wander", 0, 2.0), rng) for spec in specs]
        positions = torch.from_numpy(np.stack([path.positions_F2 for path in paths])).to(self.device)
        latents, true, quizzes = [], [], []
        for start in range(0, num, 8):
            worlds = self.worlds(specs[start : start + 8])
            latents.append(self.encode(worlds, positions[start : start + 8]))
            true.append(render_views(worlds.pictures_BCHW, positions[start : start + 8, -12:]))
            quizzes += make_quizzes(worlds, positions[start : start + 8, -6])
        truth, z = torch.cat(true), torch.cat(latents)
        times = torch.arange(z.shape[1], device=self.device, dtype=torch.float32).expand(num, -1)
        free = {"rollout": paths[0].first_free_latent_frame // self.chunk, "generated": 0}.get(form)
        seen = np.stack([seen_before(path.positions_F2, 12, VIEW_SIZE) for path in paths])
        result = Revisit(seen=torch.from_numpy(seen)[:, :, None])
        self._keep(result, "vae", self.decode(z[:, -3:], z[:, -4]), truth, quizzes)
        keys = self.prompts(captions)
        for name in policies:
            rollout = FastRollout(self.model, positions.unflatten(1, (-1, 4)) + 512, times, keys, POLICIES[name])
            first_free = z.shape[1] // self.chunk - 1 if free is None else free
            made = self.run(rollout, z, first_free, sampling, seed=distance)
            if form == "generated":
                truth, quizzes = self.decode(made[:, 15:18], made[:, 14]).flip(1), []  # the same land: nothing is new
            self._keep(result, name, self.decode(made[:, -3:], made[:, -4]), truth, quizzes)
            del rollout
        result.pictures["true"] = truth[:, 6].cpu()
        return result

    def run(
        self,
        rollout: FastRollout,
        given: Tensor,
        first_free: int,
        sampling: Sampling,
        *,
        seed: int,
        empty: list | None = None,  # type: ignore[type-arg]
    ) -> Tensor:
        """Latents of a rollout whose chunks before ``first_free`` are given."""
        schedule = make_schedule(sampling.num_steps, sampling.shift)
        generator = torch.Generator(self.device).manual_seed(seed)

        def denoise(chunk: int) -> Tensor:
            return rollout.denoise(
                chunk, schedule, generator, renoise=sampling.renoise, guidance=sampling.guidance, empty=empty
            )

        return rollout.run(denoise, given, first_free)

    @torch.no_grad()
    def follow(self, num: int, sampling: Sampling, num_words: int = 0) -> tuple[Tensor, Tensor]:
        """Prompts that name a biome and a direction, planned and rendered as the service does it.

        Args:
            num: Prompts.
            sampling: How chunks are made.
            num_words: Least length of each prompt, if they are to be long ones.
        Returns:
            For each prompt whether its biome, and whether its direction, is recognised; bool [num].
        """
        specs, directions, captions, paths = draw_orders(num, num_words)
        biome_right, direction_right = [], []
        for start in range(0, num, 50):
            part = slice(start, min(num, start + 50))
            camera = torch.from_numpy(np.stack(paths[part])).to(self.device).unflatten(1, (-1, 4))
            times = torch.arange(12.0, device=self.device).expand(len(camera), -1)
            rollout = FastRollout(self.model, camera, times, self.prompts(captions[part]))
            frames = self.decode(self.run(rollout, torch.zeros(0), 0, sampling, seed=start))
            for clip, spec, direction in zip(frames, specs[part], directions[part], strict=True):
                biome_right.append(recognise_biome(clip[::4]) == spec.biomes[0])
                direction_right.append(recognise_direction(clip) == direction)
        return torch.tensor(biome_right), torch.tensor(direction_right)

    def _keep(self, result: Revisit, name: str, frames: Tensor, truth: Tensor, quizzes: list[Quiz]) -> None:
        assert result.seen is not None
        result.psnr[name] = psnr_db(frames, truth, result.seen.to(frames.device)).cpu()
        result.whole_psnr[name] = psnr_db(frames, truth).cpu()
        result.ssim[name] = ssim(frames.flatten(0, 1), truth.flatten(0, 1)).view(len(frames), -1).mean(1).cpu()
        result.pictures[name] = frames[:, 6].cpu()
        if quizzes:
            answers = [quiz.ask(picture) for quiz, picture in zip(quizzes, result.pictures[name], strict=True)]
            result.landmarks[name] = sum(right for right, _ in answers), sum(asked for _, asked in answers)

    @torch.no_grad()
    def explore(
        self, num: int, chunks: int, sampling: Sampling, visible: Visible = sees_all, first_seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Pans over never-seen land, from noise alone.

        Returns:
            Generated frames, true frames of the worlds that the captions describe, the same through the VAE
            ([num, F, 3, 128, 128] each, on the CPU when long), and the captions.
        """
        rng = np.random.default_rng(first_seed + 5)
        specs = [draw_spec(HELD_OUT_SEED + 9000 + first_seed + index, STILL_AIR) for index in range(num)]
        moves = [CameraMove("pan", index % 8, 2.0) for index in range(num)]
        captions = [write_caption(spec.scene, move, rng) for spec, move in zip(specs, moves, strict=True)]
        paths: list[NDArray[np.float32]] = [draw_path(move, chunks * 12, rng) for move in moves]
        positions = torch.from_numpy(np.stack(paths)).to(self.device)
        true, coded = [], []
        for start in range(0, num, 8):
            worlds = self.worlds(specs[start : start + 8])
            views = render_views(worlds.pictures_BCHW, positions[start : start + 8])
            true.append(views)
            coded.append(self.decode(self.encode(worlds, positions[start : start + 8])))
        keys, empty = self.prompts(captions), self.prompts([""] * num)
        times = torch.arange(chunks * self.chunk, device=self.device, dtype=torch.float32).expand(num, -1)
        rollout = FastRollout(self.model, positions.unflatten(1, (-1, 4)) + 512, times, keys, visible)
        latents = self.run(rollout, torch.zeros(0), 0, sampling, seed=first_seed, empty=empty)
        return self.decode(latents), torch.cat(true), torch.cat(coded), captions


def draw_orders(
    num: int, num_words: int = 0
) -> tuple[list[WorldSpec], list[int], list[str], list[NDArray[np.float32]]]:
    """Held-out worlds of one biome with captions whose words alone decide the direction, and the paths they plan."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    calm = Difficulty(second_biome=0.0, max_movers=0, mover_share=0.0)
    specs: list[WorldSpec] = []
    directions, captions, paths = [], [], []
    while len(specs) < num:
        seed = HELD_OUT_SEED + 20_000 + int(rng.integers(10**6))
        spec, move = draw_spec(seed, calm), CameraMove("pan", len(specs) % 8, 2.0)
        caption = write_caption(spec.scene, move, rng)
        if num_words:
            caption = write_long_caption(spec.scene, move, rng, num_words)
        heard = read_move(caption, np.random.default_rng(0)), read_move(caption, np.random.default_rng(1))
        if heard[0] == heard[1] and heard[0].kind == "pan":
            specs.append(spec)
            directions.append(move.direction)
            captions.append(caption)
            paths.append(plan_camera(caption, seed, 48))
    return specs, directions, captions, paths


def sharpness_ratio(made: Tensor, true: Tensor) -> float:
    """Mean sharpness of generated frames over that of true ones."""
    return (sharpness(made.flatten(0, 1)).mean() / sharpness(true.flatten(0, 1)).mean()).item()

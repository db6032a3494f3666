"""Run stage 3: `python -m workers.training.memory_run --start DIR --out DIR --minutes 10` (one GPU), or with
`torchrun --nproc-per-node N -m -- workers.training.memory_run ...` on N GPUs of one host, N batches a step.

DIR/weights of the result is what we ship, written anew every two minutes; DIR/stage3.pt is where a run that stopped
goes on. The same few tests before, in the middle and at the end say whether it was worth it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.checkpoints.files import Weights, open_weights, save_weights
from workers.config import BUNDLED_WEIGHTS
from workers.model.backbones import Backbone, find_backbone
from workers.model.vae import VideoVAE
from workers.training.compiled_code import keep_compiled_code
from workers.training.feed import batches_ahead
from workers.training.measure import Laboratory, Sampling, sharpness_ratio
from workers.training.memory import CYCLE, FLIGHTS, TURNS, MemoryRecipe, MemoryTrainer
from workers.training.memory_feed import MemoryFeed, MemoryFeedRecipe
from workers.training.progress import Log
from workers.training.sequence import WorldModel
from workers.training.team import Team, join_team

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 100.0
LOG_EVERY = 4  # cycles
NEW_LAND_SHARES = (0.0, 0.0, 0.03, 0.1, 0.25, 0.5, 1.0, 1.0)
"""Of the context, what each of many questions about new land sees."""
EXAMS = (("cut", 159), ("shifted", 159), ("rollout", 39))
"""Form and distance of the returns by which the result is judged, the most important one first."""

TIMES = ("before", "middle", "after")
"""When examinations can be held."""

Exam = dict[str, float]


class MemoryRun:
    """One run with its files.

    Args:
        start: Weights to begin with.
        out: Gets log, checkpoint and weights.
        recipe, feed: See there.
        device: Of everything.
        backbone: Sizes of the model.
        worlds: Held-out worlds of an examination.
        plain: Compile nothing: three times slower, for when a compiler fails.
        reference: Weights whose new land the model is held to; `start` if not given.
        team: The processes that train together; the first one examines and writes.
        exams: Which of "before", "middle", "after" are held; there is a verdict with the first and the last.
    """

    def __init__(
        self,
        start: Path,
        out: Path,
        recipe: MemoryRecipe,
        feed: MemoryFeedRecipe,
        device: torch.device,
        backbone: Backbone,
        *,
        worlds: int,
        plain: bool = False,
        reference: Path | None = None,
        team: Team | None = None,
        exams: Sequence[str] = TIMES,
    ) -> None:
        self.began = time.monotonic()
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.device, self.worlds = out, device, worlds
        self.team, self.held = team or Team(0, 1, device), exams
        weights = open_weights(start)
        self.card, self.revision = dict(weights.card), weights.revision
        self.start, self.vae = _open_model(weights, backbone).to(device).eval(), VideoVAE().to(device).eval()
        weights.fill("vae", self.vae)
        head: dict[str, Any] = {"start": self.revision, "memory": asdict(recipe), "feed": asdict(feed)}
        before: WorldModel | None = None
        if reference is not None:
            held_to = open_weights(reference)
            before = _open_model(held_to, backbone)
            head |= {"reference": held_to.revision}
        self.log = Log(out / "log.jsonl", head | {"processes": self.team.size}) if self.team.leads else None
        self.trainer = MemoryTrainer(
            recipe, feed, self.start, self.vae, device, plain=plain, before=before, team=self.team
        )
        if self.checkpoint.exists():
            self.trainer.load(self.checkpoint)
        self.feed = MemoryFeed(feed, backbone, self.vae, device)
        self.exams: dict[str, Exam] = {}

    @property
    def checkpoint(self) -> Path:
        return self.out / "stage3.pt"

    def train(self, minutes: float) -> bool:
        """Train until the time, counted from the construction, is spent; says whether the result is better."""
        batches: Iterator[Any] = batches_ahead(self.feed, self.trainer.steps // CYCLE * FLIGHTS)
        first = next(batches)  # planning goes on beside the examination
        begin = time.monotonic()
        self.examine("before", self.start)
        exams_s = (time.monotonic() - begin) * 2.2 if "before" in self.held else 0.0
        if self.team.size > 1:
            flight = self.trainer.board(first)
            with self.team.one_after_another():
                self.trainer.warm_up(flight)
        left = self.team.agree(minutes * 60 - (time.monotonic() - self.began) - exams_s - 5)
        self._cycles(itertools.chain([first], batches), self.trainer.seconds, self.trainer.seconds + left)
        batches.close()  # type: ignore[attr-defined]
        self.examine("after", self.trainer.ema)
        return self._judge()

    def _cycles(self, batches: Iterator[Any], start_s: float, total_s: float) -> None:
        """Cycles until so many seconds of training are spent; the log gets a line every few, the files every while."""
        trainer, sums = self.trainer, list[dict[str, Tensor]]()
        saved, half = time.monotonic(), (start_s + total_s) / 2
        while trainer.seconds < total_s:
            begin = time.monotonic()
            self._cycle(batches, trainer.seconds / total_s, sums)
            before, trainer.seconds = trainer.seconds, self.team.agree(trainer.seconds + time.monotonic() - begin)
            if trainer.steps // CYCLE % LOG_EVERY == 0:
                self._log_means(sums)
            if time.monotonic() - saved > SAVE_EVERY_S:
                self.save()
                saved = time.monotonic()
            if before < half <= trainer.seconds:
                self.examine("middle", trainer.ema)
        self._log_means(sums)

    def _cycle(self, batches: Iterator[Any], progress: float, sums: list[dict[str, Tensor]]) -> None:
        """All turns of a few batches, in an order that the number of steps decides."""
        flights = [self.trainer.board(next(batches)) for _ in range(FLIGHTS)]
        self.trainer.give_own_ends(flights[: self.trainer.recipe.own_ends])
        order = np.repeat(range(FLIGHTS), len(TURNS))
        for place in np.random.default_rng(self.trainer.steps).permutation(order):
            self.trainer.set_rate(progress)
            sums.append(self.trainer.step(flights[place]))

    def save(self) -> None:
        """Checkpoint and weights, by the first process."""
        if self.log is None:
            return
        self.trainer.save(self.checkpoint)
        model = self.trainer.ema
        parts = {"dit": model.dit, "text": model.text_encoder, "vae": self.vae}
        spent = {"gpu_minutes": self.team.size * self.trainer.seconds / 60, "steps": self.trainer.steps}
        card, gpu = dict(self.card), torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        for name, more in spent.items():  # what earlier runs of this stage have spent stays in
            before = self.card.get(name, {})
            card[name] = {**before, "stage3": round(before.get("stage3", 0) + more, 1)}
        starts = self.card.get("stage3_start", [])
        starts = [starts] if isinstance(starts, str) else starts
        card |= {"stage3_start": [*starts, self.revision], "stage3_device": gpu, "stage3_exams": self.exams}
        revision = save_weights(self.out / "weights", parts, card)
        self.log.write(stage="memory", step=self.trainer.steps, seconds=self.trainer.seconds, weights=revision)

    def examine(self, name: str, model: WorldModel) -> None:
        """Memory, sharpness of new land and following, on held-out worlds, if this examination is held."""
        if name not in self.held or self.log is None:
            return
        begin = time.monotonic()
        lab, sampling = Laboratory(model, self.vae, self.device), Sampling(renoise=True)
        exam: Exam = {}
        for form, distance in EXAMS:
            result = lab.revisit(distance, self.worlds, sampling, form=form, policies=("full",))
            full, ceiling = result.psnr["full"].mean().item(), result.psnr["vae"].mean().item()
            exam |= {f"{form}_{distance}_db": full, f"{form}_{distance}_below_vae_db": ceiling - full}
        made, true, _, _ = lab.explore(self.worlds, 8, sampling)
        exam["sharpness"] = sharpness_ratio(made, true)
        biome, direction = lab.follow(2 * self.worlds, sampling)
        exam["follow"] = (biome & direction).float().mean().item()
        self.exams[name] = {key: round(value, 4) for key, value in exam.items()}
        self.log.write(stage="memory", exam=name, took=time.monotonic() - begin, **exam)

    def _log_means(self, sums: list[dict[str, Tensor]]) -> None:
        if not sums or self.log is None:
            sums.clear()
            return
        means: dict[str, Any] = {}
        for name in sorted({key for one in sums for key in one}):
            means[name] = torch.stack([one[name] for one in sums if name in one]).mean().item()
        sums.clear()
        lr = self.trainer.optimisers[0].param_groups[0]["lr"]
        self.log.write(stage="memory", step=self.trainer.steps, seconds=self.trainer.seconds, lr=lr, **means)

    def _judge(self) -> bool:
        self.save()  # the card now holds the last examination
        if self.log is None or not {"before", "after"} <= self.exams.keys():
            return False
        before, after = self.exams["before"], self.exams["after"]
        closer = all(after[key] > before[key] for key in (f"{form}_{distance}_db" for form, distance in EXAMS))
        better = closer and after["sharpness"] >= 0.75 and after["follow"] >= 0.9
        (self.out / "summary.json").write_text(json.dumps({"better": better, **self.exams}, indent=1) + "\n")
        self.log.write(stage="memory", better=better)
        logger.info("BETTER than %s" if better else "NOT better than %s: keep the old weights", self.revision[:16])
        return better


def _open_model(weights: Weights, backbone: Backbone) -> WorldModel:
    model = WorldModel(backbone)
    weights.fill("dit", model.dit)
    weights.fill("text", model.text_encoder)
    return model


def recipes_of(options: argparse.Namespace) -> tuple[MemoryRecipe, MemoryFeedRecipe]:
    """What the command line asks for."""
    usual, usual_feed = MemoryRecipe(), MemoryFeedRecipe()
    feed = replace(
        usual_feed,
        batch=options.batch,
        chunks=options.chunks,
        shifted=options.shifted,
        seed=usual_feed.seed + options.seed - usual.seed,
    )
    if options.new_land:
        cuts = tuple(round(share * options.chunks) for share in NEW_LAND_SHARES)
        feed = replace(feed, runs=4, early_cuts=cuts)
    recipe = MemoryRecipe(
        muon_lr=options.rate * usual.muon_lr,
        adam_lr=options.rate * usual.adam_lr,
        own_chunks=options.own,
        keep_weight=options.keep,
        critic_weight=options.critic,
        fade_share=options.fade,
        own_ends=options.own_ends,
        own_from=tuple(options.own_from),
        picture_floor=options.floor,
        seed=options.seed,
    )
    return recipe, feed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, default=BUNDLED_WEIGHTS, help="weights to begin with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0, help="everything from start to end")
    parser.add_argument("--worlds", type=int, default=32, help="of an examination")
    parser.add_argument("--batch", type=int, default=MemoryFeedRecipe.batch)
    parser.add_argument("--chunks", type=int, default=MemoryFeedRecipe.chunks, help="of a context")
    parser.add_argument("--rate", type=float, default=1.0, help="times the recipe's learning rates")
    parser.add_argument("--seed", type=int, default=MemoryRecipe.seed)
    parser.add_argument("--shifted", type=float, default=MemoryFeedRecipe.shifted, help="share of displaced returns")
    parser.add_argument("--own", type=int, default=MemoryRecipe.own_chunks, help="own chunks at the end of a context")
    parser.add_argument("--reference", type=Path, help="weights whose new land is kept; those of --start if not given")
    parser.add_argument("--keep", type=float, default=MemoryRecipe.keep_weight, help="how strongly it is kept")
    parser.add_argument("--critic", type=float, default=0.0, help="weight of a critic of new land")
    parser.add_argument("--new-land", action="store_true", help="twice as many questions about new land")
    parser.add_argument("--fade", type=float, default=0.0, help="share of contexts that lose their looks")
    parser.add_argument("--own-ends", type=int, default=0, help=f"batches of {FLIGHTS} whose contexts end in rollouts")
    shares = MemoryRecipe.own_from
    parser.add_argument("--own-from", nargs=2, type=float, default=shares, help="shares of a context where they begin")
    parser.add_argument(
        "--floor", type=float, default=MemoryRecipe.picture_floor, help="squared error of a good picture"
    )
    parser.add_argument("--exams", nargs="*", choices=TIMES, default=TIMES, help="hold only these")
    parser.add_argument("--plain", action="store_true", help="compile nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_compiled_code(options.out)
    recipe, feed = recipes_of(options)
    team = join_team(options.device)
    feed = replace(feed, seed=feed.seed + 1000 * team.rank)
    run = MemoryRun(
        options.start,
        options.out,
        recipe,
        feed,
        team.device,
        find_backbone("longtake-world"),
        worlds=options.worlds,
        plain=options.plain,
        reference=options.reference,
        team=team,
        exams=options.exams,
    )
    run.train(options.minutes)
    team.part()


if __name__ == "__main__":
    main()

"""Make the bundled weights from nothing: `python -m workers.training.recipe --out DIR --minutes 25`.

Three stages: the VAE; the DiT with its text encoder by flow matching; distillation to four steps. Each stage leaves a
checkpoint in DIR and is skipped, or goes on, when it is found there. At the end DIR/weights holds what we ship.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from workers.checkpoints.files import save_weights
from workers.model.backbones import Backbone, find_backbone
from workers.model.vae import VideoVAE
from workers.training.compiled_code import keep_compiled_code
from workers.training.distil import Distiller, DistilRecipe
from workers.training.dit_train import DitRecipe, DitTrainer, Span, train
from workers.training.feed import Feed, FeedRecipe, batches_ahead
from workers.training.progress import Log
from workers.training.sequence import ParallelAttention, WorldModel
from workers.training.vae_train import VaeRecipe, load_vae
from workers.training.vae_train import train as train_vae

logger = logging.getLogger(__name__)

SHARES = {"vae": 0.2, "stage1": 0.45, "stage2": 0.35}
"""Parts of the whole time. Compiling, some 30 s a stage, comes on top."""
SHORT_SHARE = 0.58
"""Part of stage 1 with short contexts; the rest has twice as many chunks, against dilution in long histories."""
ACQUAINT_STEPS = 60


@dataclass(frozen=True)
class Recipe:
    """All stages."""

    vae: VaeRecipe = field(default_factory=VaeRecipe)
    dit: DitRecipe = field(default_factory=DitRecipe)
    short: FeedRecipe = field(default_factory=FeedRecipe)
    long: FeedRecipe = field(default_factory=lambda: FeedRecipe(seed=2, batch=12, chunks=20))
    distil: DistilRecipe = field(default_factory=DistilRecipe)
    distil_feed: FeedRecipe = field(default_factory=lambda: FeedRecipe(seed=3))


def run_stage1(recipe: Recipe, backbone: Backbone, vae: VideoVAE, seconds: float, out: Path, log: Log) -> WorldModel:
    """Flow matching, short contexts first; returns the running mean of the weights."""
    device = next(vae.parameters()).device
    trainer = DitTrainer(recipe.dit, backbone, recipe.short.chunks, device)
    checkpoint = out / "stage1.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    for feed_recipe, stop in ((recipe.short, SHORT_SHARE * seconds), (recipe.long, seconds)):
        if trainer.seconds < stop:
            trainer.attention = ParallelAttention(backbone, feed_recipe.chunks, device)
            feed = Feed(feed_recipe, backbone, vae, device)
            train(trainer, feed, Span(seconds, stop), checkpoint, log)
    return trainer.ema


def run_stage2(recipe: Recipe, start: WorldModel, vae: VideoVAE, seconds: float, out: Path, log: Log) -> WorldModel:
    """Distillation; returns the running mean of the student."""
    device = next(vae.parameters()).device
    distiller = Distiller(recipe.distil, start, recipe.distil_feed.chunks, device)
    checkpoint = out / "stage2.pt"
    if checkpoint.exists():
        distiller.load(checkpoint)
        return distiller.ema
    batches = batches_ahead(Feed(recipe.distil_feed, start.backbone, vae, device), 0)
    for _ in range(ACQUAINT_STEPS):
        distiller.acquaint_judge(next(batches))
    begin, batch = time.monotonic(), next(batches)
    while (spent := time.monotonic() - begin) < seconds:
        distiller.set_rate(spent / seconds)
        values = distiller.step(batch)
        if distiller.steps % 2 == 0:
            batch = next(batches)
        if distiller.steps % 50 == 0:
            numbers = {name: value.item() for name, value in values.items()}
            log.write(stage="distil", step=distiller.steps, seconds=spent, **numbers)
    distiller.save(checkpoint)
    return distiller.ema


def make_weights(recipe: Recipe, backbone: Backbone, seconds: float, out: Path, device: torch.device) -> str:
    """All stages that DIR does not hold yet, then the weights; returns their revision."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "vae.safetensors").exists():
        train_vae(recipe.vae, SHARES["vae"] * seconds, out, device)
    vae = load_vae(out, device)
    log = Log(out / "log.jsonl", asdict(recipe))
    stage1 = run_stage1(recipe, backbone, vae, SHARES["stage1"] * seconds, out, log)
    final = run_stage2(recipe, stage1, vae, SHARES["stage2"] * seconds, out, log)
    parts = {"dit": final.dit, "text": final.text_encoder, "vae": vae}
    card = {
        "name": backbone.name,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "recipe": asdict(recipe),
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    return save_weights(out / "weights", parts, card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    backbone = find_backbone("longtake-world")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    keep_compiled_code(options.out)
    revision = make_weights(Recipe(), backbone, options.minutes * 60, options.out, torch.device(options.device))
    logger.info("weights %s in %s", revision, options.out / "weights")


if __name__ == "__main__":
    main()

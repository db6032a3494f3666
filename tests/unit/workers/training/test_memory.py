"""The memory stage: answers are those of a rollout, what was seen is learnt, what the model was before stays."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from workers.checkpoints.files import open_weights, save_weights
from workers.config import BUNDLED_WEIGHTS
from workers.model.backbones import Backbone, find_backbone
from workers.model.control import control_maps
from workers.model.vae import VideoVAE
from workers.training.distil import shown_cells
from workers.training.fast_rollout import FastRollout
from workers.training.feed import batches_ahead
from workers.training.memory import FLIGHTS, TURNS, Flight, MemoryRecipe, MemoryTrainer
from workers.training.memory_feed import RUN, MemoryBatch, MemoryFeed, MemoryFeedRecipe, plan_memory_batch
from workers.training.memory_run import EXAMS, MemoryRun, recipes_of
from workers.training.new_land import CriticRecipe
from workers.training.picture_metric import picture_metric
from workers.training.sequence import ParallelAttention, WorldModel
from workers.worlds.clips import PATH_BOX

CPU = torch.device("cpu")
FEED = MemoryFeedRecipe(batch=1, chunks=3, pool=1, fresh=1, runs=1, early_cuts=(0, 2), go_on=0.0, pictures_per_run=1)
RECIPE = MemoryRecipe(picture_steps=(3,), own_chunks=2, warmup_steps=1, muon_lr=5e-3, adam_lr=1e-2)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return dataclasses.replace(
        find_backbone("tiny-test"), num_layers=2, dim=32, num_heads=2, width=128, height=128, text_tokens=512
    )


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    vae = VideoVAE()
    open_weights(BUNDLED_WEIGHTS).fill("vae", vae)
    return vae.eval()


@pytest.fixture(scope="module")
def batch(backbone: Backbone, vae: VideoVAE) -> MemoryBatch:
    drawn = MemoryFeed(FEED, backbone, vae, CPU).batch(0)
    assert isinstance(drawn, MemoryBatch)
    return drawn


@pytest.fixture(scope="module")
def model(backbone: Backbone) -> WorldModel:
    torch.manual_seed(1)
    model = WorldModel(backbone).eval()
    model.dit.reset_parameters(zero_output=False)
    return model


@torch.no_grad()
def test_a_question_is_answered_as_by_a_cached_rollout(model: WorldModel, batch: MemoryBatch) -> None:
    b = model.backbone
    attention = ParallelAttention(b, FEED.chunks, CPU, FEED.cuts)
    attention.place(batch.times_BT, batch.question_times_BS)
    noisy = torch.randn(batch.questions_BSCHW.shape, generator=torch.Generator().manual_seed(2))
    levels = torch.cat([torch.zeros_like(batch.times_BT), torch.full_like(batch.question_times_BS, 700.0)], 1)
    camera = torch.cat([batch.camera_BTS2, batch.question_camera_BSS2], 1)
    control = model.dit.embed_control(control_maps(camera, b.width, b.height, b))
    keys = model.prompt_keys(batch.rows_BPF, batch.num_tokens_B)
    latents = torch.cat([batch.context_BTCHW, noisy], 1)
    parallel = model.dit(latents, levels, keys, attention, control_BQE=control)[:, 3 * FEED.chunks :]
    for question, cut in enumerate(FEED.cuts):
        past, part = slice(0, 3 * cut), slice(3 * question, 3 * question + 3)
        camera = torch.cat([batch.camera_BTS2[:, past], batch.question_camera_BSS2[:, part]], 1)
        times = torch.cat([batch.times_BT[:, past], batch.question_times_BS[:, part]], 1)
        rollout = FastRollout(model, camera, times, keys)
        for chunk in range(cut):
            rollout.write(chunk, batch.context_BTCHW[:, 3 * chunk : 3 * chunk + 3])
        rollout.enter(cut)
        torch.testing.assert_close(rollout.flow(noisy[:, part], 0.7), parallel[:, part], rtol=1e-4, atol=1e-5)


def trainer_of(model: WorldModel, vae: VideoVAE, recipe: MemoryRecipe = RECIPE) -> MemoryTrainer:
    trainer = MemoryTrainer(recipe, FEED, model, vae, CPU)
    trainer.set_rate(0.0)
    return trainer


def fly(trainer: MemoryTrainer, batch: MemoryBatch) -> Flight:
    flight = trainer.board(batch)
    for _ in TURNS:
        trainer.set_rate(0.0)
        trainer.step(flight)
    return flight


@dataclass
class Flown:
    """A trainer after two flights over one batch, and what it was after the first."""

    trainer: MemoryTrainer
    flight: Flight
    errors: list[float]
    checkpoint: Path


@pytest.fixture(scope="module")
def flown(model: WorldModel, vae: VideoVAE, batch: MemoryBatch, tmp_path_factory: pytest.TempPathFactory) -> Flown:
    trainer, errors = trainer_of(model, vae), list[float]()
    checkpoint = tmp_path_factory.mktemp("memory") / "stage3.pt"
    for _ in range(2):
        flight = fly(trainer, batch)
        assert flight.estimate_BSCHW is not None
        by_true, by_any = trainer._shown(flight)
        assert (by_any | ~by_true).all()
        error = trainer._cost(flight.estimate_BSCHW - batch.questions_BSCHW)
        errors.append(((error * by_true).sum() / by_true.sum()).item())
        if not checkpoint.exists():
            trainer.save(checkpoint)
    return Flown(trainer, flight, errors, checkpoint)


def test_what_was_seen_is_learnt_and_what_the_model_was_stays(flown: Flown, model: WorldModel) -> None:
    assert flown.errors[1] < 0.98 * flown.errors[0]
    start = model.state_dict()
    for name, value in flown.trainer.before.state_dict().items():
        assert torch.equal(value, start[name]), name
    for name, value in flown.trainer.model.text_encoder.state_dict().items():
        assert torch.equal(value, start[f"text_encoder.{name}"]), name


def test_the_end_of_the_context_becomes_the_models_own(flown: Flown, batch: MemoryBatch) -> None:
    flight, own = flown.flight, 3 * RECIPE.own_chunks
    assert flight.answers_BSCHW is not None
    assert flight.generation == 2
    assert torch.equal(flight.context_BTCHW[:, -own:], flight.answers_BSCHW[:, :own])
    assert torch.equal(flight.camera_BTS2[:, -own:], batch.question_camera_BSS2[:, :own])
    assert torch.equal(flight.context_BTCHW[:, :-own], batch.context_BTCHW[:, :-own])
    assert flight.true_T.tolist() == [True] * (9 - own) + [False] * own


def test_contexts_that_the_model_rolls_out_itself_are_true_before_and_asked_for_there_alone(
    model: WorldModel, vae: VideoVAE, batch: MemoryBatch
) -> None:
    trainer = trainer_of(model, vae, dataclasses.replace(RECIPE, own_ends=1, own_from=(0.6, 0.7)))
    flight = trainer.board(batch)
    trainer.give_own_ends([flight])
    assert flight.true_T.tolist() == 6 * [True] + 3 * [False]
    assert torch.equal(flight.context_BTCHW[:, :6], batch.context_BTCHW[:, :6])
    keys = trainer.ema.dit.project_prompt(flight.text_BPE, flight.log_mass_BP)
    rollout = FastRollout(trainer.ema, flight.camera_BTS2, batch.times_BT, keys)
    generator = trainer._generator(4_000_037, 0)
    made = rollout.run(
        lambda chunk: rollout.denoise(chunk, trainer.schedule, generator, renoise=True), batch.context_BTCHW, 2
    )
    torch.testing.assert_close(flight.context_BTCHW, made)
    by_true, by_any = trainer._shown(flight)
    index = torch.arange(9) // 3
    cuts = torch.tensor(FEED.cuts).repeat_interleave(3)
    seen = (index[None] < cuts[:, None]) & flight.true_T
    assert torch.equal(by_true, shown_cells(batch.question_camera_BSS2, batch.camera_BTS2, seen, 16))
    assert (by_any | ~by_true).all()
    for _ in TURNS[:5]:
        trainer.step(flight)
    assert flight.true_T.tolist() == 3 * [True] + 6 * [False]


def test_a_memory_run_that_stopped_goes_on_as_if_it_never_had(
    flown: Flown, model: WorldModel, vae: VideoVAE, batch: MemoryBatch
) -> None:
    second = trainer_of(model, vae)
    second.load(flown.checkpoint)
    fly(second, batch)
    for name in ("model", "ema"):
        again = getattr(second, name).state_dict()
        for key, value in getattr(flown.trainer, name).state_dict().items():
            assert torch.equal(value, again[key]), key


def test_the_metric_says_what_an_error_of_the_latents_costs_in_the_picture(vae: VideoVAE, batch: MemoryBatch) -> None:
    latents = batch.context_BTCHW[:, :4]
    generator = torch.Generator().manual_seed(0)
    metric = picture_metric(vae, latents, generator)
    change = 1e-3 * torch.randn(latents.shape, generator=generator)
    with torch.no_grad():
        measured = (vae.decode(latents + change) - vae.decode(latents)).square().mean() / 1e-6
    assert metric.trace().item() == pytest.approx(measured.item(), rel=0.2)


def test_questions_ask_for_places_of_the_context(backbone: Backbone) -> None:
    recipe = MemoryFeedRecipe(batch=12, chunks=20, pool=12, fresh=4)
    plan, same = (plan_memory_batch(recipe, backbone, 3) for _ in range(2))
    assert np.array_equal(plan.camera_BF2, same.camera_BF2)
    low, high = PATH_BOX
    assert plan.positions_BF2.min() >= low
    assert plan.positions_BF2.max() <= high
    assert plan.positions_BF2.shape[1] == 12 * (20 + len(recipe.cuts))
    times = plan.times_BT.reshape(12, -1, 3)
    assert (times[:, 20 : 20 + RUN, 0] > times[:, 19:20, 0]).all()
    camera = torch.from_numpy(plan.camera_BF2).unflatten(1, (-1, 4))
    index = torch.arange(60) // 3
    cuts = torch.tensor(recipe.cuts).repeat_interleave(3)
    shown = shown_cells(camera[:, 60:], camera[:, :60], index[None] < cuts[:, None], 16)
    runs = 3 * RUN * recipe.runs
    assert shown[:, :runs].float().mean() > 0.6
    assert not shown[:, runs : runs + 3].any()
    assert set(recipe.pictured) <= set(range(RUN * recipe.runs))


def test_the_turns_begin_at_noise_and_end_clean_once_with_each_context() -> None:
    assert [turn for turn, generation in TURNS if generation < 2] == 2 * [0, 1, 2, 3]
    assert [turn for turn, generation in TURNS if generation == 2] == [0, 3]
    assert [generation for _, generation in TURNS] == sorted(generation for _, generation in TURNS)
    assert FLIGHTS > 1


def test_a_critic_and_faded_contexts_change_what_is_learnt_and_not_what_is_asked(
    model: WorldModel, vae: VideoVAE, batch: MemoryBatch, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, critic_weight=1.0, critic=CriticRecipe(width=8), fade_share=1.0, keep_every=1)
    trainer = trainer_of(model, vae, recipe)
    flight = trainer.board(batch)
    assert torch.equal(flight.whole_BTCHW, batch.context_BTCHW)
    assert not torch.equal(flight.context_BTCHW, batch.context_BTCHW)
    assert torch.equal(flight.context_BTCHW[:, :3], batch.context_BTCHW[:, :3])
    values = trainer.step(flight)
    assert {"critic", "skill", "changed", "psnr_0_3"} > values.keys() - {"latents"}
    trainer.save(tmp_path / "stage3.pt")
    again = trainer_of(model, vae, recipe)
    again.load(tmp_path / "stage3.pt")
    assert trainer.judge is not None
    assert again.judge is not None
    assert torch.equal(trainer.judge.skill, again.judge.skill)


@pytest.mark.slow
def test_a_run_leaves_weights_log_and_verdict_and_goes_on_where_it_stopped(
    model: WorldModel, vae: VideoVAE, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter((0.0, 30.0, 31.0, 30.0, 29.0))

    def examine(run: MemoryRun, name: str, model: WorldModel) -> None:
        score = next(scores)
        returns = {f"{form}_{distance}_db": score for form, distance in EXAMS}
        run.exams[name] = {**returns, "sharpness": 1.0, "follow": 1.0}

    monkeypatch.setattr(MemoryRun, "examine", examine)
    monkeypatch.setattr("workers.training.memory_run.LOG_EVERY", 1)
    parts = {"dit": model.dit, "text": model.text_encoder, "vae": vae}
    first = save_weights(
        tmp_path / "start", parts, {"name": "tiny", "steps": {"stage1": 5, "stage3": 7}, "stage3_start": "0"}
    )
    recipe = dataclasses.replace(RECIPE, picture_steps=())

    def run() -> MemoryRun:
        return MemoryRun(tmp_path / "start", tmp_path / "out", recipe, FEED, CPU, backbone, worlds=1)

    begun = run()
    begun._cycles(batches_ahead(begun.feed, 0), 0.0, 1e-3)
    begun.save()
    assert begun.trainer.steps == FLIGHTS * len(TURNS)
    assert run().trainer.steps == begun.trainer.steps
    begun.exams.clear()
    assert begun.train(0.0)
    assert not begun.train(0.0)
    made = open_weights(tmp_path / "out" / "weights")
    assert made.revision != first
    assert made.card["steps"] == {"stage1": 5, "stage3": 7 + begun.trainer.steps}
    assert made.card["stage3_start"] == ["0", first]
    made.fill("dit", WorldModel(backbone).dit)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert any("latents" in line for line in lines)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["better"] is False


def test_the_command_line_decides_what_a_run_asks() -> None:
    usual = {"batch": 6, "chunks": 36, "shifted": 0.35, "seed": 1, "rate": 1.0, "own": 8, "keep": 10.0, "critic": 0.0}
    usual |= {"own_ends": 0, "own_from": (0.25, 0.85), "floor": 4e-4}
    plain = recipes_of(argparse.Namespace(**usual, fade=0.0, new_land=False))
    assert plain == (MemoryRecipe(), MemoryFeedRecipe())
    recipe, feed = recipes_of(
        argparse.Namespace(**usual | {"seed": 3, "critic": 6.0, "floor": 1e-4}, fade=0.2, new_land=True)
    )
    assert (recipe.critic_weight, recipe.fade_share, recipe.picture_floor) == (6.0, 0.2, 1e-4)
    assert (recipe.seed, feed.seed) == (3, 6)
    assert feed.cuts == 16 * (36,) + (0, 0, 1, 4, 9, 18, 36, 36)
    assert len(feed.cuts) == len(MemoryFeedRecipe().cuts)

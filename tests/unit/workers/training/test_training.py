"""Training: the parallel pass is the rollout, losses fall, and a run that stopped goes on as if it never had."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.contracts import Moment
from workers.denoise import make_schedule
from workers.kernels.reference import ReferenceKernel
from workers.model.attend import RolloutAttention
from workers.model.backbones import Backbone, find_backbone
from workers.model.rope import grid_positions
from workers.model.vae import VideoVAE
from workers.training.distil import Distiller, DistilRecipe, seen_cells
from workers.training.dit_train import DELAY, BatchTwice, DitRecipe, DitTrainer
from workers.training.fast_rollout import FastRollout, sees_window
from workers.training.feed import Batch, Feed, FeedRecipe, pick_chunks, plan_batch, stretch_times
from workers.training.muon import orthogonalise
from workers.training.sequence import ParallelAttention, WorldModel, predict_flow, prepare
from workers.training.vae_train import ClipFeed, VaeRecipe, VaeTrainer

CPU = torch.device("cpu")
FEED = FeedRecipe(batch=1, chunks=3, pool=1, fresh=1)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return dataclasses.replace(
        find_backbone("tiny-test"), num_layers=2, dim=32, num_heads=2, width=128, height=128, text_tokens=512
    )


@pytest.fixture(scope="module")
def batch(backbone: Backbone) -> Batch:
    torch.manual_seed(0)
    return Feed(FEED, backbone, VideoVAE().eval(), CPU).batch(0)


@pytest.fixture(scope="module")
def model(backbone: Backbone) -> WorldModel:
    torch.manual_seed(1)
    model = WorldModel(backbone).eval()
    model.dit.reset_parameters(zero_output=False)
    return model


@torch.no_grad()
def test_the_parallel_pass_equals_the_cached_rollout(model: WorldModel, batch: Batch) -> None:
    attention = ParallelAttention(model.backbone, 3, CPU)
    fixed = prepare(batch, attention, torch.zeros_like(batch.latents_BTCHW), torch.zeros_like(batch.times_BT))
    noisy = torch.randn(batch.latents_BTCHW.shape, generator=torch.Generator().manual_seed(2))
    parallel = predict_flow(model, fixed, noisy, torch.full_like(batch.times_BT, 0.7), attention)
    keys = model.prompt_keys(batch.rows_BPF, batch.num_tokens_B)
    rollout = FastRollout(model, batch.camera_BTS2, batch.times_BT, keys)
    for chunk in range(3):
        part = slice(3 * chunk, 3 * chunk + 3)
        rollout.enter(chunk)
        torch.testing.assert_close(rollout.flow(noisy[:, part], 0.7), parallel[:, part], rtol=1e-4, atol=1e-5)
        rollout.write(chunk, batch.latents_BTCHW[:, part])


@torch.no_grad()
def test_the_fast_rollout_equals_the_services_own(model: WorldModel, batch: Batch) -> None:
    b = model.backbone
    keys = model.prompt_keys(batch.rows_BPF, batch.num_tokens_B)
    times = torch.arange(9.0)
    fast = FastRollout(model, batch.camera_BTS2, times[None], keys)
    attention = RolloutAttention(b, DenseCache(b.num_layers), DenseAttention(), ReferenceKernel())
    for chunk in range(3):
        part = slice(3 * chunk, 3 * chunk + 3)
        clean = batch.latents_BTCHW[:, part]
        fast.write(chunk, clean)
        fast.enter(chunk)
        attention.begin_chunk(grid_positions(times[part], 8, 8))
        timestep = torch.full((1, 3), 500.0)
        slow = model.dit(clean, timestep, keys, attention, control_BQE=fast._control)
        torch.testing.assert_close(fast.flow(clean, 0.5), slow, rtol=1e-4, atol=1e-5)
        attention.begin_call(Moment(0, is_clean_pass=True))
        model.dit(clean, torch.zeros(1, 3), keys, attention, control_BQE=fast._control)
        attention.end_chunk()
        fast.write(chunk, clean)


def test_a_window_sees_the_first_chunk_and_the_last_seven() -> None:
    assert list(sees_window(0)) == []
    assert list(sees_window(3)) == [0, 1, 2]
    assert list(sees_window(20)) == [0, 13, 14, 15, 16, 17, 18, 19]


def test_a_few_steps_lower_the_loss(backbone: Backbone, batch: Batch) -> None:
    trainer = DitTrainer(DitRecipe(warmup_steps=1, adam_lr=5e-3), backbone, 3, CPU)
    generator = torch.Generator(CPU)
    before = trainer.loss(batch, generator.manual_seed(5)).mean().item()
    for _ in range(6):
        trainer.set_rate(0.0)
        trainer.step(batch)
    assert trainer.loss(batch, generator.manual_seed(5)).mean().item() < 0.97 * before


def test_a_run_that_stopped_goes_on_as_if_it_never_had(backbone: Backbone, batch: Batch, tmp_path: Path) -> None:
    unbroken = DitTrainer(DitRecipe(), backbone, 3, CPU)
    for _ in range(4):
        unbroken.set_rate(0.1)
        unbroken.step(batch)
    first = DitTrainer(DitRecipe(), backbone, 3, CPU)
    for _ in range(2):
        first.set_rate(0.1)
        first.step(batch)
    first.save(tmp_path / "dit.pt")
    second = DitTrainer(DitRecipe(seed=99), backbone, 3, CPU)
    second.recipe = first.recipe
    second.load(tmp_path / "dit.pt")
    for _ in range(2):
        second.set_rate(0.1)
        second.step(batch)
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_the_same_batches_come_after_a_restart() -> None:
    class Numbers:
        device = CPU

        def batch(self, index: int) -> int:
            return index

    def run(first: int, steps: int) -> list[int]:
        twice = BatchTwice(Numbers(), first)  # type: ignore[arg-type]
        return [twice.at(step) for step in range(first, first + steps)]  # type: ignore[misc]

    whole = run(0, 40)
    for stop in (1, 7, 8, 23):
        assert run(stop, 40 - stop) == whole[stop:]
    assert whole[20:24] == [10, 10 - DELAY, 11, 11 - DELAY]


def test_a_batch_is_a_function_of_seed_and_index(backbone: Backbone) -> None:
    one, same, other = (plan_batch(FEED, backbone, index) for index in (4, 4, 5))
    assert one.captions == same.captions
    assert np.array_equal(one.camera_BF2, same.camera_BF2)
    assert not np.array_equal(one.camera_BF2, other.camera_BF2)


def test_contexts_ascend_and_half_of_them_are_contiguous() -> None:
    rng = np.random.default_rng(0)
    recipe = FeedRecipe(batch=200, chunks=6)
    paths = rng.uniform(0, 800, size=(200, 84, 12, 2)).astype(np.float32)
    picks = pick_chunks(paths, recipe, rng)
    assert (np.diff(picks, axis=1) > 0).all()
    contiguous = (np.diff(picks, axis=1) == 1).all(1).mean()
    assert 0.4 < contiguous < 0.65
    times = stretch_times(picks, 3, rng)
    assert (np.diff(times, axis=1) >= 1).all()
    assert times.max() > 84 * 3


def test_seen_cells_are_those_that_an_earlier_chunk_showed() -> None:
    corners = torch.tensor([[0.0, 0.0]] * 3 + [[64.0, 0.0]] * 3 + [[500.0, 500.0]] * 3 + [[0.0, 0.0]] * 3)
    seen = seen_cells(corners[None, :, None, :].expand(1, 12, 4, 2), 3, 16)[0]
    assert not seen[:3].any()
    assert seen[3, :, :8].all()
    assert not seen[3, :, 8:].any()
    assert not seen[6:9].any()
    assert seen[9:].all()


def test_distilling_moves_the_student_and_leaves_the_teacher(model: WorldModel, batch: Batch, tmp_path: Path) -> None:
    recipe = DistilRecipe(num_steps=2, rollout_every=1, warmup_steps=1)
    distiller = Distiller(recipe, model, 3, CPU)
    assert make_schedule(2, recipe.shift).num_steps == 2
    for _ in range(2):
        distiller.set_rate(0.0)
        values = distiller.step(batch)
    assert all(torch.isfinite(value) for value in values.values())
    start = model.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in distiller.teacher.state_dict().items())
    assert any(not torch.equal(value, start[name]) for name, value in distiller.student.state_dict().items())
    assert distiller.own is not None
    distiller.save(tmp_path / "stage2.pt")
    again = Distiller(recipe, model, 3, CPU)
    again.load(tmp_path / "stage2.pt")
    assert again.steps == distiller.steps
    for name, value in distiller.ema.state_dict().items():
        assert torch.equal(value, again.ema.state_dict()[name])


def test_muon_makes_singular_values_alike() -> None:
    matrices = torch.randn(2, 12, 40, generator=torch.Generator().manual_seed(0))
    for x in (orthogonalise(matrices), orthogonalise(matrices.transpose(1, 2))):
        values = torch.linalg.svdvals(x.float())
        assert values.min() > 0.5
        assert values.max() < 1.5


@pytest.mark.slow
def test_a_few_steps_lower_the_vae_loss() -> None:
    recipe = VaeRecipe(batch=1, pool=1, fresh=1, warmup_steps=1, latent_noise=0.0)
    trainer, feed = VaeTrainer(recipe, CPU), ClipFeed(recipe, CPU)
    trainer.vae.train()
    trainer.frames.copy_(feed.clips())
    losses = []
    for _ in range(4):
        trainer.set_rate(0.0)
        trainer.compute()
        losses.append(trainer.loss.item())
    assert losses[-1] < 0.95 * losses[0]

"""The weights that are shipped: they fit, they fit into the repository, they see, and they remember."""

from __future__ import annotations

import pytest
import torch

from workers.checkpoints.files import Weights, open_weights
from workers.config import BUNDLED_WEIGHTS
from workers.model.backbones import find_backbone
from workers.model.vae import VideoVAE
from workers.training.measure import Laboratory, Sampling
from workers.training.sequence import WorldModel
from workers.training.vae_train import held_out_psnr

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> Weights:
    return open_weights(BUNDLED_WEIGHTS)


@pytest.fixture(scope="module")
def laboratory(weights: Weights) -> Laboratory:
    model, vae = WorldModel(find_backbone("longtake-world")), VideoVAE()
    weights.fill("dit", model.dit)
    weights.fill("text", model.text_encoder)
    weights.fill("vae", vae)
    return Laboratory(model.eval(), vae.eval(), CPU)


def test_the_weights_are_light_enough_to_be_carried(weights: Weights) -> None:
    sizes = [(BUNDLED_WEIGHTS / name).stat().st_size for name in weights.card["files"]]
    assert max(sizes) < 16_000_000
    assert sum(sizes) < 24_000_000


def test_the_sampler_is_the_one_that_the_weights_were_distilled_for(weights: Weights) -> None:
    assert weights.card["sampling"]["sampler"] == find_backbone("longtake-world").sampler


@pytest.mark.slow
def test_the_vae_reproduces_held_out_clips(laboratory: Laboratory) -> None:
    assert held_out_psnr(laboratory.vae, CPU, 8).mean() > 32


@pytest.mark.slow
def test_a_place_outside_the_window_is_remembered_with_full_history_only(laboratory: Laboratory) -> None:
    result = laboratory.revisit(39, 2, Sampling(renoise=True), form="cut", policies=("full", "window"))
    assert result.psnr["full"].min() > 24
    assert (result.psnr["full"] - result.psnr["window"]).min() > 10


@pytest.mark.slow
def test_new_land_is_sharp_in_four_steps(laboratory: Laboratory) -> None:
    made, true, _, _ = laboratory.explore(6, 3, Sampling(renoise=True))
    ratio = (made[..., 1:] - made[..., :-1]).abs().mean() / (true[..., 1:] - true[..., :-1]).abs().mean()
    assert 0.6 < ratio < 1.6

"""A blend is the weighted mean of the DiTs and takes everything else from its first folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from workers.checkpoints.files import open_weights, save_weights
from workers.model.backbones import find_backbone
from workers.model.vae import VideoVAE
from workers.training.blend import blend, write_dit
from workers.training.sequence import WorldModel


def test_a_blend_is_the_weighted_mean_of_dits(tmp_path: Path) -> None:
    backbone = dataclasses.replace(find_backbone("tiny-test"), num_layers=1, dim=32, num_heads=2)
    vae, models = VideoVAE(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(WorldModel(backbone))
        models[-1].dit.reset_parameters(zero_output=False)
        parts = {"dit": models[-1].dit, "text": models[-1].text_encoder, "vae": vae}
        save_weights(tmp_path / str(seed), parts, {"name": str(seed)})
    write_dit(tmp_path / "2", tmp_path / "files" / "two.safetensors", backbone)
    revisions = [
        blend([(tmp_path / "1", 3.0), (second, 1.0)], tmp_path / f"out{index}", backbone)
        for index, second in enumerate((tmp_path / "2", tmp_path / "files" / "two.safetensors"))
    ]
    assert revisions[0] == revisions[1]
    made, found = open_weights(tmp_path / "out0"), WorldModel(backbone)
    assert made.card["name"] == "1"
    assert sorted(made.card["blend"].values()) == [0.25, 0.75]
    made.fill("dit", found.dit)
    made.fill("text", found.text_encoder)
    for name, tensor in found.dit.state_dict().items():
        mean = 0.75 * models[0].dit.state_dict()[name] + 0.25 * models[1].dit.state_dict()[name]
        torch.testing.assert_close(tensor, mean, rtol=2e-3, atol=1e-4)
    for name, tensor in models[0].text_encoder.state_dict().items():
        torch.testing.assert_close(found.text_encoder.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="sum to zero"):
        blend([(tmp_path / "1", 0.0)], tmp_path / "none", backbone)

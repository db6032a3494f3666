"""Several processes train one model: gradients are averaged, clocks agree, and the model stays the same in all."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.servers import free_port
from workers.checkpoints.files import open_weights
from workers.config import BUNDLED_WEIGHTS
from workers.model.backbones import find_backbone
from workers.model.vae import VideoVAE
from workers.training.memory import TURNS, MemoryRecipe, MemoryTrainer
from workers.training.memory_feed import MemoryBatch, MemoryFeed, MemoryFeedRecipe
from workers.training.new_land import CriticRecipe
from workers.training.sequence import WorldModel
from workers.training.team import Team, join_team

CPU = torch.device("cpu")


def test_alone_a_team_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team, value = join_team("cpu"), torch.tensor([1.0, 2.0])
    assert team == Team(0, 1, CPU)
    assert team.leads
    team.average([value, None])
    assert value.tolist() == [1.0, 2.0]
    assert team.agree(0.1) == 0.1
    with team.one_after_another():
        pass


def take_part(rank: int, port: int, folder: Path) -> None:
    """One of two processes; leaves what it found in a file."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        team = join_team("cpu")
        values = [torch.full((2, 3), float(rank)), torch.tensor(4.0 + 2 * rank)]
        team.average([values[0], None, values[1]])
        found["average"] = torch.stack([values[0].mean(), values[1]])
        found["agreed"] = torch.tensor(team.agree(10.0 + rank))
        with team.one_after_another():
            begin = time.monotonic()
            time.sleep(0.2)
            found["stretch"] = torch.tensor([begin, time.monotonic()], dtype=torch.float64)
        found |= train_together(team)
        team.part()
    torch.save(found, folder / f"{rank}.pt")


def train_together(team: Team) -> dict[str, Any]:
    """A batch of one's own through all turns, its context rolled out from some chunk on."""
    feed = MemoryFeedRecipe(
        seed=4 + 1000 * team.rank, batch=1, chunks=3, pool=1, fresh=1, runs=1, early_cuts=(0, 2), pictures_per_run=1
    )
    recipe = MemoryRecipe(picture_steps=(3,), own_chunks=2, warmup_steps=1, critic_weight=1.0, own_ends=1)
    recipe = dataclasses.replace(recipe, critic=CriticRecipe(width=8))
    backbone = dataclasses.replace(
        find_backbone("tiny-test"), num_layers=2, dim=32, num_heads=2, width=128, height=128, text_tokens=512
    )
    vae = VideoVAE()
    open_weights(BUNDLED_WEIGHTS).fill("vae", vae)
    torch.manual_seed(1)
    model = WorldModel(backbone).eval()
    model.dit.reset_parameters(zero_output=False)
    trainer = MemoryTrainer(recipe, feed, model, vae.eval(), CPU, team=team)
    batch = MemoryFeed(feed, backbone, vae, CPU).batch(0)
    assert isinstance(batch, MemoryBatch)
    flight = trainer.board(batch)
    with team.one_after_another():
        trainer.warm_up(flight)
    trainer.give_own_ends([flight])
    for _ in TURNS[:6]:
        trainer.set_rate(0.0)
        trainer.step(flight)
    assert trainer.judge is not None
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    critic = torch.cat([parameter.detach().flatten() for parameter in trainer.judge.critic.parameters()])
    drawn = batch.context_BTCHW.mean()
    return {"weights": weights, "critic": critic, "skill": trainer.judge.skill, "drawn": drawn}


@pytest.mark.slow
def test_two_processes_average_wait_and_stay_one_model(tmp_path: Path) -> None:
    port = free_port()
    context = multiprocessing.get_context("spawn")
    members = [context.Process(target=take_part, args=(rank, port, tmp_path)) for rank in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join(240)
        assert member.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["average"].tolist() == second["average"].tolist() == [0.5, 5.0]
    assert first["agreed"] == second["agreed"] == 10.0
    assert first["stretch"][1] <= second["stretch"][0]
    assert first["drawn"] != second["drawn"]
    for name in ("weights", "critic", "skill"):
        assert torch.equal(first[name], second[name]), name

"""Checkpoints of training: all that the next step depends on, in a file that is there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch


class Trainer(Protocol):
    """What the trainers of stages 1 and 3 have in common."""

    optimisers: list[torch.optim.Optimizer]
    steps: int
    seconds: float

    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def ema(self) -> torch.nn.Module: ...


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Model, its running mean, optimisers and counters."""
    return {
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in trainer.optimisers],
        "steps": trainer.steps,
        "seconds": trainer.seconds,
    }


def go_on(trainer: Trainer, state: dict[str, Any]) -> None:
    """Become the trainer whose `state_of` this is."""
    trainer.model.load_state_dict(state["model"])
    trainer.ema.load_state_dict(state["ema"])
    for optimiser, saved in zip(trainer.optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    trainer.steps, trainer.seconds = state["steps"], state["seconds"]


def write(path: Path, state: dict[str, Any]) -> None:
    """Replace the file in one move."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """What `write` wrote; tensors only."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state

"""Several processes that train one model, one GPU each: every step takes the mean of their gradients.

Begun by `torchrun --nproc-per-node N -m -- MODULE ...` (`--`, because torchrun would take options of ours for its own);
a process that was begun alone is a team of one, and all of this costs it nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(minutes=8)  # the first process examines and writes files while the others wait


@dataclass(frozen=True)
class Team:
    """Who takes part.

    Attributes:
        rank: Number of this process; 0 writes the files.
        size: Processes in all.
        device: What this process computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def average(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace float tensors by their means over the team, in place; all processes must call it."""
        given = [tensor for tensor in tensors if tensor is not None]
        if self.size == 1 or not given:
            return
        flat = torch.cat([tensor.flatten() for tensor in given])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([tensor.numel() for tensor in given])
        torch._foreach_copy_(given, [part.view_as(tensor) for part, tensor in zip(parts, given, strict=True)])

    def agree(self, value: float) -> float:
        """The first process's number, for all: clocks differ, and whoever went by its own would leave the others."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return float(told.item())

    @contextmanager
    def one_after_another(self) -> Iterator[None]:
        """A stretch that each process goes through when the one before has left it."""
        for turn in range(self.size):
            if turn == self.rank:
                yield
            self.agree(0.0)

    def part(self) -> None:
        """End it; the others may go on for a while, but not together."""
        if self.size > 1:
            dist.destroy_process_group()


def join_team(device: str) -> Team:
    """The team that the environment of `torchrun` names, or a team of one.

    Args:
        device: "cuda" (each process takes the GPU of its local number) or another device.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size == 1:
        return Team(0, 1, torch.device(device))
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", timeout=_PATIENCE)
    return Team(rank, size, own)

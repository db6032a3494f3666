"""A half-made rollout in one file: what the cache holds after so many chunks, and which rollout that is.

All randomness is a function of (seed, chunk, step), so a cache that is restored exactly goes on to the same latents, on
another machine of the same kind too. Any cache can be written that has `state` and `restore`: a tile table as well as
the others. Pictures are no part of it: a decoder begins anew, so a take that was half encoded is decoded again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from workers.errors import CheckpointMismatch


class Resumable(Protocol):
    """A cache, seen as something that can be put down and taken up; see `contracts.KVCache`."""

    def state(self) -> Mapping[str, Tensor]: ...

    def restore(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class RolloutId:
    """Which rollout a snapshot is of: what its latents are a function of, beside prompt and camera."""

    render_fingerprint: str
    model_revision: str
    task_id: str
    seed: int


def write_snapshot(path: Path, rollout: RolloutId, next_chunk: int, cache: Resumable) -> int:
    """Write the file; it appears whole or not at all.

    Args:
        path: Where; what is there is replaced.
        rollout: Which one.
        next_chunk: The cache holds all chunks before it.
        cache: Between two chunks. The device is waited for; all of it passes through host memory.
    Returns:
        Bytes written.
    """
    tensors = {name: _on_host(tensor) for name, tensor in cache.state().items()}
    write_tensors(path, rollout, tensors, {"next_chunk": str(next_chunk)})
    return path.stat().st_size


def read_snapshot(path: Path, rollout: RolloutId, cache: Resumable, device: torch.device | None = None) -> int:
    """Fill a cache of the same configuration from a file.

    Args:
        path: From `write_snapshot`.
        rollout: Which one is to go on.
        cache: Empty; becomes the one that was written.
        device: Where the tensors are handed over; None leaves it to the cache to fetch them from the host.
    Returns:
        The chunk to go on with.
    Raises:
        CheckpointMismatch: The file is of another rollout; names what differs.
    """
    with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
        facts = check_rollout(path, rollout, file.metadata(), "a snapshot")
        cache.restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return int(facts["next_chunk"])


def write_tensors(path: Path, rollout: RolloutId, tensors: dict[str, Tensor], facts: Mapping[str, str]) -> None:
    """A file of this rollout, whole or not at all; tensors lie on the host, and no two share memory."""
    named = {name: str(value) for name, value in asdict(rollout).items()}
    unfinished = path.with_name(path.name + ".part")
    save_file(tensors, unfinished, metadata=named | dict(facts))
    os.replace(unfinished, path)


def check_rollout(path: Path, rollout: RolloutId, facts: Mapping[str, str] | None, what: str) -> Mapping[str, str]:
    """The facts that stand in a file.

    Raises:
        CheckpointMismatch: It is of another rollout.
    """
    facts = facts or {}
    for field in fields(rollout):
        expected, found = str(getattr(rollout, field.name)), facts.get(field.name)
        if found != expected:
            raise CheckpointMismatch(f"{path}: {what} with {field.name} {found}, this rollout has {expected}")
    return facts


def _on_host(tensor: Tensor) -> Tensor:
    """A copy of its own, as the file format wants it: no two share memory."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.is_cuda else tensor.clone()).contiguous()

"""Tensors of files into a module that has no memory yet: compare first, then place one by one.

The module is built on the meta device; each tensor is read straight into the dtype and onto the device where it stays.
So the host holds at most what the model itself takes there, plus one small buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from workers.checkpoints.tensor_files import Stored
from workers.errors import CheckpointMismatch

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)
NUM_NAMED = 5
"""Keys of each kind that a report names; all are counted."""


@dataclass(frozen=True)
class Fit:
    """How the tensors of a checkpoint compare with those of a module."""

    num_expected: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: tuple[str, ...]
    """Sentences: key, shape found, shape expected."""

    @property
    def is_good(self) -> bool:
        return not (self.missing or self.unexpected or self.misshaped)

    def text(self) -> str:
        """All that is wrong, the first of each kind by name."""
        kinds = (
            (self.missing, f"of {self.num_expected} tensors missing"),
            (self.unexpected, "not expected"),
            (self.misshaped, "of another shape"),
        )
        return "; ".join(f"{len(keys)} {kind} ({_some(keys)})" for keys, kind in kinds if keys) or "all fit"


def _some(keys: tuple[str, ...]) -> str:
    more = len(keys) - NUM_NAMED
    return ", ".join(keys[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def build_empty(make: Callable[[], M]) -> M:
    """A module without memory."""
    with torch.device("meta"):
        return make()


def compare(module: nn.Module, found: Mapping[str, Stored]) -> Fit:
    """What is missing, too much, or of another shape; reads no numbers."""
    places = _places(module)
    aliases = {name for names in places.values() for name in names}
    shapes = module.state_dict()
    missing = tuple(first for first, names in places.items() if not found.keys() & set(names))
    misshaped = tuple(
        f"{found[name].key} is {found[name].shape}, expected {tuple(shapes[name].shape)}"
        for name in sorted(aliases & found.keys())
        if found[name].shape != tuple(shapes[name].shape)
    )
    unexpected = tuple(found[name].key for name in sorted(found.keys() - aliases))
    return Fit(len(places), missing, unexpected, misshaped)


def fill(
    module: nn.Module, found: Mapping[str, Stored], *, what: str, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Give every parameter and buffer of a module built by `build_empty` its numbers.

    Args:
        module: On the meta device.
        found: By the names of the module.
        what: Name of the model, for the report.
        device, dtype: Where and as what they stay; floating-point tensors only are cast; None keeps the file's dtype.
    Raises:
        CheckpointMismatch: Something is missing, unexpected, of another shape, or not finite.
    """
    fit = compare(module, found)
    if not fit.is_good:
        files = sorted({str(stored.file) for stored in found.values()})
        raise CheckpointMismatch(
            f"{', '.join(files[:3])}{' ...' if len(files) > 3 else ''}: does not hold {what}: {fit.text()}"
        )
    parameters = {name for name, _ in module.named_parameters()}
    for names in _places(module).values():
        stored = found[next(name for name in names if name in found)]
        is_cast = dtype is not None and stored.dtype.is_floating_point
        tensor = stored.read(device, dtype if is_cast else None)
        is_parameter = names[0] in parameters
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        for name in names:  # tied tensors stay one
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, value)
    logger.info("placed %d tensors of %s on %s", fit.num_expected, what, device)


def _places(module: nn.Module) -> dict[str, list[str]]:
    """First name -> all names of each tensor; more than one where tensors are tied."""
    by_identity: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        by_identity.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in by_identity.values()}

"""LongVie 2: control weights over the Wan2.1-I2V-14B base, and replacements for some tensors of the base.

`control.safetensors` holds the two control branches, under the prefix `pipe.dual_controller.` or none;
`dit.safetensors` replaces tensors of the base (the fine-tuned self-attention). What was replaced is counted: a prefix
that nobody knows would otherwise replace nothing, in silence.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from workers.checkpoints.fetch import WeightFolder
from workers.checkpoints.place import fill
from workers.checkpoints.tensor_files import Stored
from workers.checkpoints.wan import fetch_tensors, our_names, strip_wrappers
from workers.errors import CheckpointMismatch

logger = logging.getLogger(__name__)

CONTROL_FILE, DIT_FILE = "control.safetensors", "dit.safetensors"
CONTROL_PREFIX = "pipe.dual_controller."
_DIT_PREFIX = "pipe.dit."


def read_control(folder: WeightFolder) -> dict[str, Stored]:
    """The control branches, by their published names without the prefix."""
    found = fetch_tensors(folder, _one_file(folder, CONTROL_FILE))
    return {strip_wrappers(key.replace(CONTROL_PREFIX, "")): stored for key, stored in found.items()}


def fill_control(
    module: nn.Module, folder: WeightFolder, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Give control branches built on the meta device their weights.

    Raises:
        CheckpointMismatch: They do not fit.
    """
    fill(module, read_control(folder), what="the control branches of LongVie 2", device=device, dtype=dtype)


def replace_tensors(base: Mapping[str, Stored], folder: WeightFolder) -> dict[str, Stored]:
    """The base transformer with the tensors of `dit.safetensors` in their places.

    Raises:
        CheckpointMismatch: A tensor has no place in the base, or another shape than there.
    """
    name = _one_file(folder, DIT_FILE)
    found = fetch_tensors(folder, name)
    new, _ = our_names({key.removeprefix(_DIT_PREFIX): stored for key, stored in found.items()})
    strangers = sorted(new.keys() - base.keys())
    misshaped = sorted(key for key in new.keys() & base.keys() if new[key].shape != base[key].shape)
    if strangers or misshaped:
        first = (strangers or misshaped)[0]
        raise CheckpointMismatch(
            f"{folder.store.url}/{name}: {len(strangers)} of {len(new)} tensors have no place in the base model and "
            f"{len(misshaped)} another shape (first: {new[first].key}); expected replacements for Wan2.1-I2V-14B: "
            "is it the file of another release?"
        )
    layers = {key.split(".")[1] for key in new if key.startswith("blocks.")}
    logger.info("%s/%s replaces %d tensors in %d layers", folder.store.url, name, len(new), len(layers))
    return {**base, **new}


def _one_file(folder: WeightFolder, name: str) -> str:
    if folder.only is not None:
        return folder.only
    if name not in folder.sizes:
        raise CheckpointMismatch(f"{folder.url}/{name}: no such file; files there: {', '.join(list(folder.sizes)[:6])}")
    return name

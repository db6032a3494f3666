"""Weight files with a card beside them: opened only when every byte is what the card says.

A folder of weights holds safetensors files and `card.json`, whose `files` maps each name to its SHA-256. All tensors of
a model may be spread over the files; their names begin with the part that they belong to ("dit.", "text.", "vae.").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from cluster.errors import NotFound, StoreError
from cluster.object_store import ObjectStore, open_store
from workers.errors import CheckpointMismatch

CARD_NAME = "card.json"
MAX_FILE_BYTES = 15 << 20  # the repository and what carries it refuse files of 16 MiB


@dataclass(frozen=True)
class Weights:
    """Verified tensors on the CPU, and the one number that names them."""

    tensors: Mapping[str, Tensor]
    revision: str
    """SHA-256 over the hashes of all files in order of their names."""
    card: Mapping[str, Any]

    def fill(self, part: str, module: nn.Module) -> None:
        """Copy the tensors of one part ("dit", "text", "vae") into a module, cast to the dtype of its own.

        Raises:
            CheckpointMismatch: A tensor is missing, unknown, or of another shape.
        """
        prefix = f"{part}."
        found = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        expected = module.state_dict()
        missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        shapes = [
            f"{prefix}{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & found.keys())
            if found[name].shape != expected[name].shape
        ]
        if missing or unknown or shapes:
            raise CheckpointMismatch(
                f"weights of {part!r} do not fit: missing {missing[:5]}, unknown {unknown[:5]}, shapes {shapes[:5]} "
                f"({len(missing)}, {len(unknown)} and {len(shapes)} in all)"
            )
        module.load_state_dict(found)


def open_weights(folder: Path | str) -> Weights:
    """Read and verify all weight files of a folder, local or s3://.

    Raises:
        CheckpointMismatch: The card or a file is missing, truncated, altered, or no safetensors file; the message
            names the file and the hash that it must have.
    """
    store = open_store(folder)
    card = _read_card(store)
    files: Mapping[str, str] = card["files"]
    tensors: dict[str, Tensor] = {}
    for name in sorted(files):
        tensors.update(_read_tensors(store, name, files[name]))
    return Weights(tensors, _revision(files), card)


def save_weights(folder: Path, parts: Mapping[str, nn.Module], card: Mapping[str, Any]) -> str:
    """Write modules as float16 files below MAX_FILE_BYTES with their card; returns the revision.

    Args:
        folder: Made if need be; files of an earlier card there are removed.
        parts: Modules by the name of their part ("dit", "text", "vae").
        card: What a reader should know (recipe, seed, losses, GPU time); JSON values. Its `files` is filled in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    groups: list[dict[str, Tensor]] = [{}]
    num_bytes = 0
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            tensor = tensor.detach().cpu()
            tensor = (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
            if num_bytes + tensor.nbytes > MAX_FILE_BYTES:
                groups.append({})
                num_bytes = 0
            groups[-1][f"{part}.{name}"] = tensor
            num_bytes += tensor.nbytes
    files = {}
    for index, group in enumerate(groups):
        name = f"weights-{index}.safetensors"
        save_file(group, str(folder / name))
        files[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    text = json.dumps({**card, "files": files}, indent=2, sort_keys=True)
    (folder / CARD_NAME).write_text(text + "\n")
    return _revision(files)


def _read_card(store: ObjectStore) -> Mapping[str, Any]:
    path = f"{store.url}/{CARD_NAME}"
    try:
        card = json.loads(store.get(CARD_NAME))
    except NotFound:
        raise CheckpointMismatch(
            f"{path}: no such file; a folder of weights holds safetensors and {CARD_NAME}"
        ) from None
    except (StoreError, ValueError) as error:
        raise CheckpointMismatch(f"{path}: cannot be read: {error}") from error
    files = card.get("files") if isinstance(card, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointMismatch(f'{path}: has no "files", a map from file name to SHA-256')
    if not all(isinstance(v, str) and Path(k).name == k for k, v in files.items()):
        raise CheckpointMismatch(f'{path}: "files" must map plain file names to SHA-256 in hex')
    checked: Mapping[str, Any] = card
    return checked


def _read_tensors(store: ObjectStore, name: str, sha256: str) -> dict[str, Tensor]:
    path = f"{store.url}/{name}"
    try:
        data = store.get(name)
    except NotFound:
        raise CheckpointMismatch(f"{path}: missing; expected a file with SHA-256 {sha256}") from None
    except StoreError as error:
        raise CheckpointMismatch(f"{path}: cannot be read ({error}); expected SHA-256 {sha256}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CheckpointMismatch(f"{path}: altered or cut off ({len(data)} bytes): SHA-256 {found}, expected {sha256}")
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise CheckpointMismatch(f"{path}: no safetensors file ({error}), although its SHA-256 is {sha256}") from error
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointMismatch(f"{path}: tensor {key} is not finite")
    return tensors


def _revision(files: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(files[name] for name in sorted(files)).encode()).hexdigest()

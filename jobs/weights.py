"""Which weights a job renders with, as far as a driver can know: it has no torch, and reads no large file."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.errors import NotFound
from cluster.object_store import open_store
from jobs.errors import SpecError
from workers.config import BackboneConfig
from workers.model.backbones import find_backbone

WEIGHTS_CARD = "card.json"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def identify_weights(config: BackboneConfig, bundled: Path | None) -> dict[str, str]:
    """File name -> what names its bytes: SHA-256 where a card says it, else the size.

    Published weights come without a card. Their hashes are computed where they are loaded and stand in each row.

    Args:
        config: Model and where its weights are.
        bundled: Folder of the weights that come with the package, if they are used.
    Raises:
        SpecError: There are no weights.
        ValueError, StoreError: The place cannot be a store, or does not answer.
    """
    if find_backbone(config.name).text is not None:
        folder = config.checkpoint or (str(bundled) if bundled is not None else None)
        return {} if folder is None else _read_card(folder)
    found: dict[str, str] = {}
    for url in filter(None, (config.checkpoint, config.finetune)):
        sizes = _list_weights(url)
        if not sizes:
            raise SpecError(
                f"render.backbone.checkpoint: {url}: no weights there (no {', '.join(WEIGHT_SUFFIXES)} file); "
                f"`longtake models show {config.name}` says what is needed and how to get it"
            )
        found |= sizes
    return found


def _read_card(folder: str) -> dict[str, str]:
    try:
        files = json.loads(open_store(folder).get(WEIGHTS_CARD))["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (NotFound, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(
            f"render.backbone.checkpoint: {folder}: no weights there (no readable {WEIGHTS_CARD}); name a folder or an "
            "s3:// prefix that holds safetensors files with their card"
        ) from error


def _list_weights(url: str) -> dict[str, str]:
    """Weight files below a folder, or the one that is named, by size."""
    folder, _, name = url.rstrip("/").rpartition("/")
    is_file = url.endswith(WEIGHT_SUFFIXES)
    store = open_store((folder or ".") if is_file else url)
    listed = store.list(name if is_file else "")
    return {info.key: f"{info.num_bytes} bytes" for info in listed if info.key.endswith(WEIGHT_SUFFIXES)}

"""Self-Forcing and Rolling-Forcing checkpoints: a `.pt` with one or more state dicts of a distilled Wan2.1-T2V-1.3B.

`generator_ema` holds averaged weights and is what both projects render with; `generator` those of the last step;
`critic` belongs to training. Names begin with the wrapper's `model.` and may carry FSDP's segments. Rolling-Forcing's
weights may be used for academic purposes only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from workers.checkpoints.fetch import WeightFolder
from workers.checkpoints.tensor_files import TORCH_SUFFIXES, Stored, as_stored, open_torch_file
from workers.checkpoints.wan import fetch_tensors, our_names
from workers.errors import CheckpointMismatch

logger = logging.getLogger(__name__)

EMA, PLAIN = "generator_ema", "generator"
_OTHERS = ("model", "state_dict")
"""Names of ODE initialisations and of conversions by others."""


def read_generator(folder: WeightFolder, *, use_ema: bool = True) -> dict[str, Stored]:
    """The transformer of a distilled checkpoint, by our names.

    Args:
        folder: Opened on one file.
        use_ema: Prefer the averaged weights; if only the others are there they are taken, and the log says so.
    Raises:
        CheckpointMismatch: The file holds no generator.
    """
    name = folder.only
    if name is None:
        there = [n for n in folder.sizes if n.endswith((".safetensors", *TORCH_SUFFIXES))]
        raise CheckpointMismatch(
            f"{folder.url}: is a folder; expected one file, such as self_forcing_dmd.pt. "
            f"Files there: {', '.join(there[:6]) or 'none'}"
        )
    if not name.endswith(TORCH_SUFFIXES):
        return our_names(fetch_tensors(folder, name))[0]
    path = folder.fetch(name)
    content = open_torch_file(path)
    part = choose_part(content, use_ema=use_ema, where=str(path))
    tensors = content if part is None else content[part]
    return our_names(as_stored(tensors, path))[0]


def choose_part(content: Mapping[str, Any], *, use_ema: bool, where: str) -> str | None:
    """Which state dict of a checkpoint to take; None means that it is a state dict itself.

    Raises:
        CheckpointMismatch: None of the known names is there.
    """
    parts = [key for key, value in content.items() if isinstance(value, Mapping)]
    if not parts:
        return None
    order = (EMA, PLAIN, *_OTHERS) if use_ema else (PLAIN, EMA, *_OTHERS)
    chosen = next((key for key in order if key in parts), None)
    if chosen is None:
        raise CheckpointMismatch(f"{where}: holds {', '.join(parts)}; expected {EMA} or {PLAIN}")
    wanted = order[0]
    log = logger.info if chosen == wanted else logger.warning
    log("%s: takes %s%s", where, chosen, "" if chosen == wanted else f", because there is no {wanted}")
    return chosen

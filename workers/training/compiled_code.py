"""Where a training keeps what it compiles: beside its checkpoints, so that trainings begun at once never meet there."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code(out: Path) -> Path:
    """Have the compiler use a folder of this run alone; to be called before anything is compiled.

    A run that goes on finds its compiled code again. The compiler's usual folder is one for all processes of a user: a
    second training that began at the same second has hung there while compiling.

    Args:
        out: Folder of the run.
    Returns:
        The folder of the compiled code: one in ``out``, or the one that the environment names, which wins.
    """
    return Path(os.environ.setdefault(CACHE_VARIABLE, str(out.resolve() / "compiled")))

"""The log of a training run: one JSON object a line, on disk and to the logger."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class Log:
    """Appends lines; a run that goes on from a checkpoint goes on in the same file."""

    def __init__(self, path: Path, recipe: dict[str, Any]) -> None:
        self.path = path
        self.write(recipe=recipe)

    def write(self, **values: Any) -> None:
        """One line; numbers are rounded to five digits."""
        rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps(rounded)
        with self.path.open("a") as file:
            file.write(line + "\n")
        logger.info("%s", line)

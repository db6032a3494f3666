"""What every part of a configuration is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Base of every configuration part: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


HistoryAt = Annotated[
    tuple[int, ...] | None,
    Field(
        min_length=1,
        strict=False,
        description="Denoising steps that look at the history, the first of them 0; the others take what the newest of "
        "them saw of it. Empty: all look.",
    ),
]


def check_steps(field: str, steps: Sequence[int] | None, num_steps: int | None = None) -> None:
    """Denoising steps begin with 0 and rise; with `num_steps`, all of them exist.

    Raises:
        ValueError: They do not; names the field.
    """
    if steps is None:
        return
    if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)):
        raise ValueError(f"{field}: {list(steps)} must begin with 0 and rise")
    if num_steps is not None and steps[-1] >= num_steps:
        raise ValueError(f"{field}: {steps[-1]} is no denoising step: they go from 0 to {num_steps - 1}")

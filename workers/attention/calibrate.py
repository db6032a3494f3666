"""Which layers are sparse enough to be thinned out: chosen once per model from a few prompts, kept in a small file.

The file says for which weights and density it was measured, so that it cannot serve others unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workers.errors import ConfigUnsupported


class Calibration(BaseModel):
    """What was found, and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    backbone: str
    revision: str
    """Of the weights."""
    policy: str
    """Whose recall was measured."""
    density: float = Field(gt=0.0, le=1.0)
    """Share of the history's tiles that the policy was given."""
    num_prompts: int = Field(ge=1)
    num_latent_frames: int = Field(ge=1)
    recall_by_layer: tuple[tuple[float, ...], ...]
    """For each layer, the recall of each head in [0, 1]."""
    sparse_layers: tuple[int, ...]
    """Ascending."""

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        num_layers = len(self.recall_by_layer)
        if num_layers == 0 or len({len(heads) for heads in self.recall_by_layer}) != 1 or not self.recall_by_layer[0]:
            raise ValueError("recall_by_layer: needs a row for each layer, all with the same number of heads")
        if not all(0 <= recall <= 1 for heads in self.recall_by_layer for recall in heads):
            raise ValueError("recall_by_layer: a recall lies outside [0, 1]")
        if list(self.sparse_layers) != sorted(set(self.sparse_layers)):
            raise ValueError(f"sparse_layers: {self.sparse_layers} is not ascending without repetition")
        if any(not 0 <= layer < num_layers for layer in self.sparse_layers):
            raise ValueError(f"sparse_layers: {self.sparse_layers} names a layer outside [0, {num_layers - 1}]")
        return self


def choose_layers(recall_by_layer: Sequence[float], share: float) -> tuple[int, ...]:
    """The share of layers that lose least at one and the same density: round(share * layers), ascending.

    Args:
        recall_by_layer: Mean recall of each layer.
        share: In [0, 1]; the paper's is 0.7.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: {share} lies outside [0, 1]")
    by_recall = sorted(range(len(recall_by_layer)), key=lambda layer: (-recall_by_layer[layer], layer))
    return tuple(sorted(by_recall[: round(share * len(recall_by_layer))]))


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file, whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(calibration.model_dump_json(indent=1) + "\n")
    fresh.replace(path)


def read_calibration(path: Path, *, backbone: str, revision: str, num_layers: int) -> Calibration:
    """The file of a model.

    Raises:
        ConfigUnsupported: There is no such file, it is damaged, or it is of another model.
    """
    field = "attention.calibration"
    try:
        calibration = Calibration.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigUnsupported(f"{field}: cannot read {path}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigUnsupported(f"{field}: {path} is no calibration: {place} {first['msg']}") from error
    if (calibration.backbone, calibration.revision) != (backbone, revision):
        raise ConfigUnsupported(
            f"{field}: {path} was made for {calibration.backbone} revision {calibration.revision[:12]}, "
            f"this is {backbone} revision {revision[:12]}: calibrate again"
        )
    if len(calibration.recall_by_layer) != num_layers:
        raise ConfigUnsupported(
            f"{field}: {path} has {len(calibration.recall_by_layer)} layers, {backbone} has {num_layers}"
        )
    return calibration

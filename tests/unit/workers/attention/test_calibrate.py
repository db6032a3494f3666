"""The file that says which layers are sparse: chosen, written, read, and refused where it does not belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workers.attention.calibrate import Calibration, choose_layers, read_calibration, write_calibration
from workers.checkpoints.files import open_weights
from workers.config import BUNDLED_WEIGHTS
from workers.errors import ConfigUnsupported

GOOD: dict[str, Any] = {
    "backbone": "tiny-test",
    "revision": "seed-20",
    "policy": "annsa quant",
    "density": 0.3,
    "num_prompts": 2,
    "num_latent_frames": 60,
    "recall_by_layer": ((0.9, 0.8), (0.5, 0.6), (1.0, 0.9)),
    "sparse_layers": (0, 2),
}


def read(path: Path, backbone: str = "tiny-test", revision: str = "seed-20", num_layers: int = 3) -> Calibration:
    return read_calibration(path, backbone=backbone, revision=revision, num_layers=num_layers)


def test_the_layers_that_lose_least_are_sparse() -> None:
    assert choose_layers([0.9, 0.5, 0.95, 0.7], 0.7) == (0, 2, 3)
    assert choose_layers([0.8] * 30, 0.7) == tuple(range(21))
    assert choose_layers([0.9, 0.5], 0.0) == ()
    assert choose_layers([0.9, 0.5], 1.0) == (0, 1)
    with pytest.raises(ValueError, match=r"share: 1\.5 lies outside \[0, 1\]"):
        choose_layers([0.9], 1.5)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    calibration = Calibration(**GOOD)
    write_calibration(tmp_path / "c.json", calibration)
    assert read(tmp_path / "c.json") == calibration
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 1.5}, "density.*less than or equal to 1"),
        ({"sparse_layers": (0, 3)}, r"names a layer outside \[0, 2\]"),
        ({"sparse_layers": (2, 0)}, "not ascending"),
        ({"recall_by_layer": ((0.9,), (0.5, 0.6), (1.0, 0.9))}, "same number of heads"),
        ({"recall_by_layer": ((1.9, 0.9),) * 3}, "outside"),
        ({"format": 2}, "format.*1"),
        ({"more": 1}, "more.*not permitted"),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ConfigUnsupported, match=rf"attention.calibration: .*c.json is no calibration: .*{message}"):
        read(path)


def test_a_file_of_another_model_or_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    with pytest.raises(ConfigUnsupported, match=r"cannot read .*c\.json"):
        read(path)
    path.write_text("{")
    with pytest.raises(ConfigUnsupported, match="is no calibration"):
        read(path)
    write_calibration(path, Calibration(**GOOD))
    with pytest.raises(ConfigUnsupported, match="made for tiny-test revision seed-20, this"):
        read(path, revision="seed-21")
    with pytest.raises(ConfigUnsupported, match="3 layers, tiny-test has 4"):
        read(path, num_layers=4)


def test_the_bundled_calibration_is_of_the_bundled_weights() -> None:
    revision = open_weights(BUNDLED_WEIGHTS).revision
    found = read_calibration(BUNDLED_WEIGHTS / "annsa.json", backbone="longtake-world", revision=revision, num_layers=8)
    means = [sum(heads) / len(heads) for heads in found.recall_by_layer]
    assert found.sparse_layers == choose_layers(means, 0.7)

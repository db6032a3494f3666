"""Weight files: a round trip, and a clear refusal of everything that is not what the card says."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from workers.checkpoints import files
from workers.checkpoints.files import open_weights, save_weights
from workers.errors import CheckpointMismatch


def make_parts() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {"dit": nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), "vae": nn.BatchNorm2d(3)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 300)
    save_weights(tmp_path, make_parts(), {"recipe": {"seed": 3}})
    return tmp_path


def test_what_was_saved_comes_back_in_the_dtype_of_the_module(folder: Path) -> None:
    saved, fresh = make_parts(), make_parts()
    weights = open_weights(folder)
    for part, module in fresh.items():
        for p in module.parameters():
            nn.init.constant_(p, 9.0)
        weights.fill(part, module)
        for name, tensor in module.state_dict().items():
            expected = saved[part].state_dict()[name]
            assert tensor.dtype == expected.dtype
            torch.testing.assert_close(tensor, expected, atol=1e-3, rtol=1e-3)
    assert weights.card["recipe"] == {"seed": 3}
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_revision_names_the_content(folder: Path, tmp_path: Path) -> None:
    first = open_weights(folder).revision
    assert save_weights(folder, make_parts(), {}) == first
    parts = make_parts()
    with torch.no_grad():
        next(parts["dit"].parameters()).add_(1.0)
    assert save_weights(folder, parts, {}) != first


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_a_damaged_file_is_named_with_the_hash_it_must_have(folder: Path, damage: str) -> None:
    name, sha256 = list(json.loads((folder / "card.json").read_text())["files"].items())[-1]
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointMismatch) as caught:
        open_weights(folder)
    assert str(path) in str(caught.value)
    assert sha256 in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": {}}', '{"files": {"../x": "00"}}', '{"files": {"x": 1}}'])
def test_a_broken_card_is_named(folder: Path, text: str) -> None:
    (folder / "card.json").write_text(text)
    with pytest.raises(CheckpointMismatch, match=r"card\.json"):
        open_weights(folder)


def test_a_folder_without_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"card\.json: no such file"):
        open_weights(tmp_path)


def test_tensors_of_another_model_are_listed(folder: Path) -> None:
    weights = open_weights(folder)
    with pytest.raises(CheckpointMismatch, match=r"missing \['2\.bias', '2\.weight'\]"):
        weights.fill("dit", nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 4)))
    with pytest.raises(CheckpointMismatch, match=r"dit\.1\.bias is \(4,\), expected \(5,\)"):
        weights.fill("dit", nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 5)))


def test_tensors_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, float("nan"))
    save_weights(tmp_path, {"dit": module}, {})
    with pytest.raises(CheckpointMismatch, match=r"dit\.weight is not finite"):
        open_weights(tmp_path)

"""Distilled checkpoints (.pt) and LongVie 2's files: prefixes, which weights are taken, what was replaced."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.wan_files import TINY, TINY_I2V, Tensors, make_dit, scramble, write_forcing, write_original
from workers.checkpoints.fetch import open_folder
from workers.checkpoints.longvie2 import fill_control, replace_tensors
from workers.checkpoints.place import build_empty
from workers.checkpoints.rolling_forcing import read_generator
from workers.checkpoints.wan import build_dit, read_dit
from workers.errors import CheckpointMismatch
from workers.model.backbones import ControlBranchSizes
from workers.model.control_branch import ControlBranch

CPU = torch.device("cpu")


def load(path: Path, *, use_ema: bool = True) -> Tensors:
    found = read_generator(open_folder(path, path.parent / "cache"), use_ema=use_ema)
    return build_dit(TINY, found, CPU, None).state_dict()


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("zip_form", [True, False], ids=["zip", "old"])
def test_the_averaged_weights_are_taken_unless_asked_otherwise(tmp_path: Path, zip_form: bool) -> None:
    ema, plain = make_dit(seed=1).state_dict(), make_dit(seed=2).state_dict()
    critic = {"head.weight": torch.ones(2)}
    parts = {"critic": critic, "generator": plain, "generator_ema": ema}
    path = write_forcing(tmp_path / "rolling_forcing_dmd.pt", parts, zip_form=zip_form)
    assert same(load(path), ema)
    assert same(load(path, use_ema=False), plain)


@pytest.mark.parametrize("part", ["generator_ema", "generator", "model"])
def test_what_exists_is_taken_and_said(tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture) -> None:
    tensors = make_dit().state_dict()
    path = write_forcing(tmp_path / "self_forcing_dmd.pt", {part: tensors})
    with caplog.at_level(logging.INFO):
        assert same(load(path), tensors)
    assert f"takes {part}" in caplog.text
    assert ("because there is no generator_ema" in caplog.text) == (part != "generator_ema")


def test_a_flat_state_dict_and_a_conversion_to_safetensors_load_too(tmp_path: Path) -> None:
    tensors = make_dit().state_dict()
    torch.save(tensors, tmp_path / "flat.pt")
    assert same(load(tmp_path / "flat.pt"), tensors)
    save_file({f"model.{key}": t for key, t in tensors.items()}, str(tmp_path / "converted.safetensors"))
    assert same(load(tmp_path / "converted.safetensors"), tensors)


def test_tensors_saved_with_strides_come_back_in_order(tmp_path: Path) -> None:
    tensors = make_dit().state_dict()
    key = "blocks.0.ffn.0.weight"
    torch.save(tensors | {key: tensors[key].t().contiguous().t()}, tmp_path / "strided.pt")
    assert same(load(tmp_path / "strided.pt"), tensors)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    torch.save({"generator": Bomb(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointMismatch, match=r"evil\.pt: holds Python objects besides tensors.*convert"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_foreign_and_cut_files_are_named(tmp_path: Path) -> None:
    path = write_forcing(tmp_path / "a.pt", {"generator": make_dit().state_dict()})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointMismatch, match=r"a\.pt: cut off.*fetch it again"):
        load(path)
    path.write_text("not a checkpoint at all" * 100)
    with pytest.raises(CheckpointMismatch, match=r"a\.pt: .*Expected a dict of tensors: fetch it again"):
        load(path)
    torch.save({"critic": {"x": torch.ones(1)}, "step": 3}, path)
    with pytest.raises(CheckpointMismatch, match="holds critic; expected generator_ema or generator"):
        load(path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(CheckpointMismatch, match="holds a list; expected a dict of tensors"):
        load(path)
    torch.save({"generator": {"model.step": 3}}, path)
    with pytest.raises(CheckpointMismatch, match=r"expected a flat dict of tensors, found model\.step \(int\)"):
        load(path)
    with pytest.raises(CheckpointMismatch, match=r"is a folder; expected one file.*a\.pt"):
        load(tmp_path)


LONGVIE = replace(TINY_I2V, control_branch=ControlBranchSizes(dim=40, num_layers=2, num_heads=1, ffn_dim=48))


@pytest.fixture
def longvie(tmp_path: Path) -> tuple[Path, Tensors, Tensors]:
    """Base model in a folder; replacements and control weights as tensors."""
    base = tmp_path / "base"
    base.mkdir()
    write_original(base, make_dit(LONGVIE, seed=1).state_dict())
    tuned = {key: t for key, t in make_dit(LONGVIE, seed=2).state_dict().items() if ".self_attn." in key}
    torch.manual_seed(3)
    branch = ControlBranch(LONGVIE)
    scramble(branch)
    return tmp_path, tuned, branch.state_dict()


@pytest.mark.parametrize("prefix", ["", "pipe.dit."])
def test_replacements_take_their_places_in_the_base(longvie: tuple[Path, Tensors, Tensors], prefix: str) -> None:
    folder, tuned, _ = longvie
    save_file({prefix + key: t for key, t in tuned.items()}, str(folder / "dit.safetensors"))
    base = read_dit(open_folder(folder / "base", folder / "cache"))
    found = replace_tensors(base, open_folder(folder / "dit.safetensors", folder / "cache"))
    state = build_dit(LONGVIE, found, CPU, None).state_dict()
    assert same(state, make_dit(LONGVIE, seed=1).state_dict() | tuned)


def test_replacements_without_a_place_are_refused(longvie: tuple[Path, Tensors, Tensors]) -> None:
    folder, tuned, _ = longvie
    base = read_dit(open_folder(folder / "base", folder / "cache"))
    save_file({f"x.{key}": t for key, t in tuned.items()} | {"y": torch.ones(1)}, str(folder / "dit.safetensors"))
    with pytest.raises(CheckpointMismatch, match=r"31 of 31 tensors have no place in the base model.*first: x\.blocks"):
        replace_tensors(base, open_folder(folder / "dit.safetensors", folder / "cache"))


@pytest.mark.parametrize("prefix", ["", "pipe.dual_controller."])
def test_control_weights_load_bit_for_bit(longvie: tuple[Path, Tensors, Tensors], prefix: str) -> None:
    folder, _, control = longvie
    save_file({prefix + key: t for key, t in control.items()}, str(folder / "control.safetensors"))
    branch = build_empty(lambda: ControlBranch(LONGVIE))
    fill_control(branch, open_folder(folder, folder / "cache"), CPU)
    assert same(branch.state_dict(), control)


def test_control_weights_that_do_not_fit_are_named(longvie: tuple[Path, Tensors, Tensors]) -> None:
    folder, _, control = longvie
    del control["control_t_mod.weight"]
    save_file(control, str(folder / "control.safetensors"))
    branch = build_empty(lambda: ControlBranch(LONGVIE))
    with pytest.raises(
        CheckpointMismatch, match=r"the control branches of LongVie 2: 1 of \d+ tensors missing \(control_t"
    ):
        fill_control(branch, open_folder(folder, folder / "cache"), CPU)
    (folder / "control.safetensors").unlink()
    with pytest.raises(CheckpointMismatch, match=r"control\.safetensors: no such file; files there"):
        fill_control(branch, open_folder(folder, folder / "cache"), CPU)

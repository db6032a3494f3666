"""Compiled code of a training: a folder of its own, unless the environment names another."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from workers.training import memory_run, recipe
from workers.training.compiled_code import CACHE_VARIABLE, keep_compiled_code


def compilers_folders() -> tuple[Path, Path]:
    """Of the compiler and of Triton. The import takes seconds, and not every process needs it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    return Path(cache_dir()), Path(triton_cache_dir(0))


@pytest.fixture(autouse=True)
def no_folder_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards the environment is what it was, whatever a test or the compiler puts there."""
    for name in (CACHE_VARIABLE, "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_the_compiler_writes_into_the_folder_of_the_run(tmp_path: Path) -> None:
    kept = keep_compiled_code(tmp_path / "one")
    own, of_triton = compilers_folders()
    assert own == kept == tmp_path / "one" / "compiled"
    assert kept in of_triton.parents


def test_runs_do_not_meet_and_a_run_that_goes_on_finds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    for name in ("one", "two", "one"):
        monkeypatch.delenv(CACHE_VARIABLE, raising=False)
        folders.append(keep_compiled_code(tmp_path / name))
    assert folders[0] == folders[2] != folders[1]


def test_a_folder_that_the_environment_names_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "shared"))
    assert keep_compiled_code(tmp_path / "one") == compilers_folders()[0] == tmp_path / "shared"


@pytest.mark.parametrize(("trainer", "begin"), [(memory_run, "MemoryRun"), (recipe, "make_weights")])
def test_every_trainer_begins_so(
    trainer: ModuleType, begin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class HasBegun(Exception):
        pass

    def begun(*_: Any, **__: Any) -> None:
        raise HasBegun

    monkeypatch.setattr(trainer, begin, begun)
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(tmp_path), "--device", "cpu"])
    with pytest.raises(HasBegun):
        trainer.main()
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "compiled")

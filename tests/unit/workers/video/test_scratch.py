"""Scratch folders vanish with their owner, also when it is killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from workers.video.scratch import ScratchFolder, remove_dead_folders

REPOSITORY = Path(__file__).parents[4]


@pytest.fixture(autouse=True)
def _own_temporary_root(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_removed_folder_is_gone_and_may_be_removed_again(tmp_path):
    folder = ScratchFolder()
    (folder.path / "x").write_bytes(b"x")
    folder.remove()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_living_folder_is_kept(tmp_path):
    folder = ScratchFolder()
    other = ScratchFolder()
    assert remove_dead_folders() == 0
    assert folder.path.exists()
    folder.remove()
    other.remove()


def test_folder_of_a_killed_process_is_removed_by_the_next(tmp_path):
    code = (
        f"import os, tempfile; tempfile.tempdir = {str(tmp_path)!r}\n"
        "from workers.video.scratch import ScratchFolder\n"
        "(ScratchFolder().path / 'x').write_bytes(b'x'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == -9
    (dead,) = tmp_path.iterdir()
    folder = ScratchFolder()
    assert not dead.exists()
    folder.remove()


def test_folder_without_a_lock_is_left_alone(tmp_path):
    (tmp_path / "longtake-video-of-somebody").mkdir()
    assert remove_dead_folders() == 0
    assert (tmp_path / "longtake-video-of-somebody").exists()

"""Owned folders vanish with their owner, also when it is killed."""

import fcntl
import subprocess
import sys
from pathlib import Path

from cluster.owned_folder import OwnedFolder, remove_dead_folders

REPOSITORY = Path(__file__).parents[3]
PREFIX = "mine-"


def test_removed_folder_is_gone_and_may_be_removed_again(tmp_path):
    folder = OwnedFolder(PREFIX, tmp_path)
    (folder.path / "x").write_bytes(b"x")
    folder.remove()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_living_folder_is_kept(tmp_path):
    folder = OwnedFolder(PREFIX, tmp_path)
    other = OwnedFolder(PREFIX, tmp_path)
    assert remove_dead_folders(PREFIX, tmp_path) == 0
    assert folder.path.exists()
    folder.remove()
    other.remove()


def test_folder_of_a_killed_process_is_removed_by_the_next(tmp_path):
    code = (
        "import os; from pathlib import Path; from cluster.owned_folder import OwnedFolder\n"
        f"(OwnedFolder({PREFIX!r}, Path({str(tmp_path)!r})).path / 'x').write_bytes(b'x'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == -9
    (dead,) = tmp_path.iterdir()
    folder = OwnedFolder(PREFIX, tmp_path)
    assert not dead.exists()
    folder.remove()


def test_folder_without_a_lock_is_left_alone(tmp_path):
    (tmp_path / f"{PREFIX}of-somebody").mkdir()
    assert remove_dead_folders(PREFIX, tmp_path) == 0
    assert (tmp_path / f"{PREFIX}of-somebody").exists()


def test_kept_folder_survives_its_owner_and_the_next_start(tmp_path):
    folder = OwnedFolder(PREFIX, tmp_path)
    (folder.path / "log").write_text("why it died")
    folder.keep()
    folder.remove()
    assert remove_dead_folders(PREFIX, tmp_path) == 0
    assert (folder.path / "log").read_text() == "why it died"


def test_folder_that_is_kept_while_somebody_looks_for_dead_ones_survives(tmp_path, monkeypatch):
    folder = OwnedFolder(PREFIX, tmp_path)
    (folder.path / "log").write_text("why it died")
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: (folder.keep(), flock(*arguments)))
    assert remove_dead_folders(PREFIX, tmp_path) == 0
    assert (folder.path / "log").read_text() == "why it died"

"""A private local folder for the files of one take, which vanishes with its owner, also after kill -9.

The owner holds a lock on a file inside; the kernel drops it when the process dies, however that happens, and the next
folder made on this machine takes the dead ones away.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "longtake-video-"
LOCK_NAME = "owner.lock"


class ScratchFolder:
    """A new folder under the system's temporary directory; call `remove` when done."""

    def __init__(self) -> None:
        remove_dead_folders()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        unlocked = self.path / "owner.new"
        self._lock = os.open(unlocked, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / LOCK_NAME)  # named only once locked: nobody sees a living folder without its lock

    def remove(self) -> None:
        """Delete it with all that is inside; a second call does nothing."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1


def remove_dead_folders() -> int:
    """Remove folders whose owner is dead; returns how many. Those of other users are passed over."""
    num_removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder / LOCK_NAME, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            continue  # being made or removed at this moment, or not ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its owner lives
        else:
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("removed the scratch folder of a dead process: %s", folder)
            num_removed += 1
        finally:
            os.close(lock)
    return num_removed

"""A private local folder that vanishes with its owner, also after kill -9.

The owner holds a lock on a file inside; the kernel drops it when the process dies, however that happens, and the next
folder of the same kind made on this machine takes the dead ones away.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_NAME = "owner.lock"


class OwnedFolder:
    """A new folder, open to this user alone; call `remove` when done.

    Args:
        prefix: Begins its name, and tells its kind.
        parent: Where it is made; None is the system's temporary directory.
    """

    def __init__(self, prefix: str, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        remove_dead_folders(prefix, parent)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        unlocked = self.path / "owner.new"
        self._lock = os.open(unlocked, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / LOCK_NAME)  # named only once locked: nobody sees a living folder without its lock

    def remove(self) -> None:
        """Delete it with all that is inside; a second call does nothing."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self._let_go()

    def keep(self) -> None:
        """Leave it to whoever wants to look at it: without its lock it is never taken away."""
        if self._lock < 0:
            return
        (self.path / LOCK_NAME).unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        os.close(self._lock)
        self._lock = -1


def remove_dead_folders(prefix: str, parent: Path) -> int:
    """Remove folders whose owner is dead; returns how many. Those of other users are passed over."""
    num_removed = 0
    for folder in parent.glob(f"{prefix}*"):
        try:
            lock = os.open(folder / LOCK_NAME, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            continue  # being made or removed at this moment, kept, or not ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its owner lives
        else:
            if os.fstat(lock).st_nlink == 0:
                continue  # it was kept, or removed, between our two looks
            shutil.rmtree(folder, ignore_errors=True)
            logger.info("removed the folder of a dead process: %s", folder)
            num_removed += 1
        finally:
            os.close(lock)
    return num_removed

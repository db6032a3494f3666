"""Uploads closed segments while later ones are being encoded, on one thread with a bounded queue."""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path

from cluster.errors import StoreError
from cluster.object_store import ObjectStore
from workers.errors import UploadFailed

logger = logging.getLogger(__name__)

MAX_WAITING_SEGMENTS = 8  # they wait on disk, not in memory; a network this far behind should be felt by the writer


class SegmentUploads:
    """Puts files under `prefix` in the order they come; after a failure it accepts and drops what follows.

    Args:
        store: Its `put_file` is called from this object's thread, and from the caller's in `upload`.
        prefix: Folder of the segments in the store.
    """

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self.failure: UploadFailed | None = None
        self.seconds = 0.0
        self._store, self._prefix = store, prefix.rstrip("/")
        self._attempted: list[str] = []
        self._waiting: queue.Queue[Path | None] = queue.Queue(MAX_WAITING_SEGMENTS)
        # A daemon: a process that is told to end must not wait for a network that does not answer.
        self._thread = threading.Thread(target=self._upload_all, name="upload-segments", daemon=True)
        self._thread.start()

    def submit(self, path: Path) -> None:
        """Upload this file under its own name, later; waits while the queue is full."""
        self._waiting.put(path)

    def wait(self) -> None:
        """Return when everything submitted is uploaded or has failed; nothing can be submitted afterwards."""
        self._waiting.put(None)
        self._thread.join()

    def upload(self, key: str, path: Path) -> None:
        """Upload one file now.

        Raises:
            UploadFailed: The store gave up, or holds another number of bytes than the file. It may hold the object.
        """
        self._put(key, path)
        stored, expected = self._size(key), path.stat().st_size
        if stored != expected:
            raise UploadFailed(f"{key}: the store holds {stored} bytes of {expected}")

    def remove_segments(self, *more_keys: str) -> None:
        """Delete all segments that may exist, and `more_keys`, in one call. Litter is no reason to fail a take."""
        keys = [*self._attempted, *more_keys]
        if not keys:
            return
        try:
            self._store.delete(keys)
        except StoreError as error:
            logger.warning("left %d objects under %s: %s", len(keys), self._prefix, error)

    def _upload_all(self) -> None:
        while (path := self._waiting.get()) is not None:
            if self.failure is not None:
                continue
            key = f"{self._prefix}/{path.name}"
            self._attempted.append(key)  # before the attempt: one that fails may still have written the object
            try:
                self._put(key, path)
            except UploadFailed as error:
                self.failure = error

    def _put(self, key: str, path: Path) -> None:
        started = time.perf_counter()
        try:
            self._store.put_file(key, path)
        except (StoreError, OSError) as error:
            raise UploadFailed(f"{key}: {error}") from error
        finally:
            self.seconds += time.perf_counter() - started

    def _size(self, key: str) -> int | None:
        try:
            return self._store.size(key)
        except StoreError as error:
            raise UploadFailed(f"{key}: {error}") from error

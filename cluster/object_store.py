"""ObjectStore: what Longtake needs of S3 or a local folder, and nothing more.

Keys are relative to the store's root, use `/`, and never begin with it. Every decision of the project rests on
`put_if_absent` alone: real servers ignore or mishandle the other conditional requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    num_bytes: int


class ObjectStore(Protocol):
    """A flat map from keys to bytes.

    Raises (every method): StoreUnavailable after the deadline, AccessDenied, NotFound where a key must exist.
    """

    url: str
    """Root of this store as the user would write it: s3://bucket/prefix or an absolute path."""

    def get(self, key: str) -> bytes:
        """The whole object."""
        ...

    def size(self, key: str) -> int | None:
        """Its size in bytes, or None if it does not exist."""
        ...

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix` and sorts after `start_after`, in key order, page by page."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or overwrite; whole or not at all for readers."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless the key exists; exactly one of any number of concurrent callers gets True.

        `data` must be unique to the caller (carry its nonce): after a lost answer the object is read back, and equal
        bytes count as our own success.

        Raises:
            OutcomeUnknown: The deadline passed while it was open whether the write had happened.
        """
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Upload a local file, in parts if it is large; unconditional, so `key` must be unique to the attempt."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Download to a local file, in constant memory."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that do not exist are passed over."""
        ...


def open_store(url: str) -> ObjectStore:
    """The store behind `s3://bucket/prefix`, `file:///path` or a local path; opens no connection by itself."""
    raise NotImplementedError(url)

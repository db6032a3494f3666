"""ObjectStore: what Longtake needs of S3 or a local folder, and nothing more.

Keys are relative to the store's root, use `/`, and never begin with it. Every decision of the project rests on
`put_if_absent` alone: real servers ignore or mishandle the other conditional requests. The two stores live in
`s3_store.py` and `local_store.py`.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from cluster.errors import StoreUnsuitable

MAX_KEY_BYTES = 1024  # S3's own limit, kept on local disks too so that a job can move
BAD_PART = re.compile(r"/\.{0,2}/")
BAD_LETTER = re.compile(r"[\x00-\x1f\x7f\\]")


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing."""

    key: str
    num_bytes: int


class ObjectStore(Protocol):
    """A flat map from keys to bytes; safe to use from many threads, and to pickle into another process.

    Raises (every method): StoreUnavailable after the deadline, AccessDenied, NotFound where a key must exist,
    ValueError for a key that is empty, absolute, or has empty, `.` or `..` parts.
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


@runtime_checkable
class SharesFlushes(Protocol):
    """A store on which several conditional writes together cost less than one after the other."""

    def put_each_if_absent(self, items: Sequence[tuple[str, bytes]]) -> int:
        """See `put_in_order`."""
        ...


@runtime_checkable
class MakesFolders(Protocol):
    """A store that has to make folders for its objects."""

    def remove_empty_folders(self) -> None:
        """Remove those below the root that hold nothing, and the root, as far as nobody has put anything there."""
        ...


def put_in_order(store: ObjectStore, items: Sequence[tuple[str, bytes]]) -> int:
    """put_if_absent for each item in turn, ending before the first whose key exists; returns how many were written.

    Whatever interrupts it, a beginning of the items exists and nothing behind it; all that were written are durable.

    Raises:
        As put_if_absent. Some of the items may have been written then.
    """
    if isinstance(store, SharesFlushes):
        return store.put_each_if_absent(items)
    for count, (key, data) in enumerate(items):
        if not store.put_if_absent(key, data):
            return count
    return len(items)


def retries_of(store: ObjectStore) -> Counter[str]:
    """Requests of this store that failed and were repeated so far, by code; none where that never happens."""
    return Counter(getattr(store, "retries", {}))


def open_store(url: str | Path) -> ObjectStore:
    """The store behind `s3://bucket/prefix`, `file:///path` or a local path; opens no connection by itself.

    Raises:
        ValueError: The URL has another scheme, no bucket, or carries a query, user or password.
    """
    text = str(url)
    # Imported here: the stores import this module for their types, and readers of local files need no boto3.
    if text.startswith("s3://"):
        from cluster.s3_store import S3Store

        return S3Store(*split_s3_url(text))
    from cluster.local_store import LocalStore

    return LocalStore(local_path(text))


def split_s3_url(url: str) -> tuple[str, str]:
    """`s3://bucket/some/prefix/` -> ("bucket", "some/prefix"); nothing is unquoted, as in the AWS command line."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    if "?" in url or "@" in bucket:
        raise ValueError(
            f"{redacted(url)}: no query, user or password in a store URL; credentials and endpoint come from the "
            "environment (AWS_PROFILE, AWS_ENDPOINT_URL_S3, AWS_REGION)"
        )
    if not bucket or ":" in bucket:
        raise ValueError(f"{url!r} names no bucket: write s3://bucket/prefix")
    prefix = prefix.strip("/")
    return bucket, check_key(prefix) if prefix else ""


def local_path(url: str) -> Path:
    """The absolute path behind `file:///path`, `~/path`, or a relative or absolute path."""
    if url.startswith("file:"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise ValueError(f"{url!r} is no local file URL: write file:///absolute/path")
        return Path(unquote(parts.path))
    if "://" in url:
        raise ValueError(f"{redacted(url)}: only s3://bucket/prefix, file:///path or a local path can be a store")
    if not url:
        raise ValueError("an empty string is no place to store anything")
    return Path(url).expanduser().absolute()


def redacted(url: str) -> str:
    """The URL without what may be secret in it (user, password, query)."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_key(key: str) -> str:
    """Return the key, or raise ValueError when it could escape the store's root or differ between stores."""
    if BAD_PART.search(f"/{key}/"):
        raise ValueError(f"{key!r} is no object key: it is empty, absolute, or has an empty, '.' or '..' part")
    if BAD_LETTER.search(key):
        raise ValueError(f"{key!r} is no object key: it has control characters or backslashes")
    if len(key.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"object key of more than {MAX_KEY_BYTES} bytes: {key[:80]!r}...")
    return key


def probe_conditional_writes(store: ObjectStore) -> None:
    """Two conditional puts on one new key must give one True and one False, and keep the first bytes.

    Raises:
        StoreUnsuitable: This store would let two drivers both believe that they won.
    """
    key = f"_state/probe/{secrets.token_hex(8)}"
    first, second = b"first " + key.encode(), b"second " + key.encode()
    try:
        outcomes = (store.put_if_absent(key, first), store.put_if_absent(key, second))
        kept = store.get(key)
    finally:
        store.delete([key])
        if isinstance(store, MakesFolders):
            store.remove_empty_folders()
    if outcomes != (True, False) or kept != first:
        raise StoreUnsuitable(
            f"{store.url} ignores PUT If-None-Match:* (two conditional writes of one key gave {outcomes}). Nothing "
            "can be committed exactly once there; use Amazon S3, Ceph, MinIO, Cloudflare R2 or another store that "
            "honours it, or a local folder"
        )

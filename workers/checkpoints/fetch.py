"""Published weight files, local or s3://, as files on this machine, with the hash of every byte.

Local files are used where they are. Those of a bucket are streamed into a cache folder: one process of a node downloads
(flock), the others wait for it, and a name appears only when the file is whole. Expected hashes come from `SHA256SUMS`
or `card.json` beside the files, or from what the Hugging Face client notes when it downloads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cluster.errors import NotFound, StoreError
from cluster.object_store import ObjectStore, open_store
from workers.errors import CheckpointMismatch

logger = logging.getLogger(__name__)

DEFAULT_CACHE = Path.home() / ".cache" / "longtake" / "checkpoints"
SUMS = ("SHA256SUMS", "SHA256SUMS.txt", "sha256sums.txt")
CARD = "card.json"
FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HF_NOTES = ".cache/huggingface/download"  # NAME.metadata: commit, etag (the SHA-256 of large files), time
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_FILES = 5000
"""A folder with more is no folder of weights."""
_SETTLED_NS = 2_000_000_000  # the coarsest clock of a file system in use


@dataclass
class WeightFolder:
    """A folder (or prefix) of weight files; `fetch` brings one here and checks it.

    Attributes:
        url: As the user would write it.
        only: The single file that was named, or None for the whole folder.
        hashes: SHA-256 of each file that was fetched so far.
    """

    store: ObjectStore
    only: str | None = None
    cache: Path = DEFAULT_CACHE
    hashes: dict[str, str] = field(default_factory=dict)
    num_bytes_downloaded: int = 0

    @property
    def url(self) -> str:
        return f"{self.store.url}/{self.only}" if self.only else self.store.url

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file by its path in the folder.

        Raises:
            CheckpointMismatch: There is nothing, or so much that it cannot be weights.
        """
        found: dict[str, int] = {}
        with self._readable(""):
            for info in self.store.list(self.only or ""):
                if not info.key.startswith(".cache/") and self.only in (None, info.key):
                    found[info.key] = info.num_bytes
                if len(found) > _MAX_FILES:
                    raise CheckpointMismatch(f"{self.url}: more than {_MAX_FILES} files; name the folder of weights")
        if not found:
            raise CheckpointMismatch(
                f"{self.url}: nothing there; name a file, folder or s3:// prefix of weights (a name on huggingface.co "
                "is downloaded first: `longtake models show` prints the command)"
            )
        return found

    @cached_property
    def expected(self) -> dict[str, str]:
        """SHA-256 that each file must have, where somebody said so."""
        known: dict[str, str] = {}
        for name in SUMS:
            for line in (self._text(name) or "").splitlines():
                digest, _, path = line.partition(" ")
                if _SHA256.fullmatch(digest.lower()):
                    known[path.strip().removeprefix("*").removeprefix("./")] = digest.lower()
        try:
            card = json.loads(self._text(CARD) or "{}")
            files = card.get("files", {}) if isinstance(card, dict) else {}
        except ValueError:
            files = {}
        return known | {str(k): str(v) for k, v in files.items()} if isinstance(files, dict) else known

    def fetch(self, name: str) -> Path:
        """The file on this machine, whole and with the hash that it must have.

        Raises:
            CheckpointMismatch: It is missing, cannot be read, or is not what was published.
        """
        is_remote = self.store.url.startswith("s3://")
        path = self._download(name) if is_remote else Path(self.store.url) / name
        if not path.exists():
            raise CheckpointMismatch(f"{path}: no such file")
        _refuse_pointer(path)
        digest = file_sha256(path, self.cache)
        expected = self._expected_of(name)
        if expected is not None and digest != expected:
            raise CheckpointMismatch(
                f"{self.store.url}/{name}: altered or cut off ({path.stat().st_size} bytes): SHA-256 {digest}, "
                f"expected {expected}; fetch it again"
            )
        self.hashes[name] = digest
        return path

    @property
    def revision(self) -> str:
        """SHA-256 over the hashes of all files fetched, in order of their names."""
        return hashlib.sha256("".join(f"{self.hashes[n]}" for n in sorted(self.hashes)).encode()).hexdigest()

    def _expected_of(self, name: str) -> str | None:
        if name in self.expected:
            return self.expected[name]
        if self.store.url.startswith("s3://"):
            return None
        note = Path(self.store.url) / _HF_NOTES / f"{name}.metadata"
        lines = note.read_text().splitlines() if note.exists() else []
        return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None

    def _download(self, name: str) -> Path:
        folder = self.cache / "s3" / hashlib.sha256(self.store.url.encode()).hexdigest()[:16]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._readable(name):
            size = self.store.size(name)
        if size is None:
            raise CheckpointMismatch(f"{self.store.url}/{name}: no such object")
        with _locked(path.with_name(path.name + ".lock")):
            if path.exists() and path.stat().st_size == size and self._is_current(name, path):
                return path
            free = shutil.disk_usage(folder).free
            if free < size:
                raise CheckpointMismatch(
                    f"{self.store.url}/{name}: {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {folder}"
                )
            part = path.with_name(path.name + ".part")  # alone under the lock; a killed process leaves it to us
            logger.info("downloading %s/%s (%.2f GB) to %s", self.store.url, name, size / 1e9, path)
            with self._readable(name):
                self.store.get_file(name, part)
            if part.stat().st_size != size:
                raise CheckpointMismatch(
                    f"{self.store.url}/{name}: {part.stat().st_size} bytes came, expected {size}; it changed meanwhile"
                )
            os.replace(part, path)
            self.num_bytes_downloaded += size
        return path

    def _is_current(self, name: str, path: Path) -> bool:
        """Is a file of the cache still what was downloaded, and what is expected now?"""
        noted = _noted_sha256(path, self.cache)
        digest = file_sha256(path, self.cache)
        return digest == self.expected.get(name, noted or digest)

    def _text(self, name: str) -> str | None:
        if self.only not in (None, name):
            return None
        try:
            return self.store.get(name).decode("utf-8", "replace")
        except NotFound:
            return None

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            raise CheckpointMismatch(f"{self.store.url}/{name}: cannot be read ({error})") from error


def open_folder(url: str | Path, cache: Path | None = None) -> WeightFolder:
    """The folder behind a path or s3:// URL; a file's name opens its folder with that file alone.

    Raises:
        CheckpointMismatch: The URL can be no store.
    """
    text = str(url).rstrip("/") or "/"
    head, _, name = text.rpartition("/")
    is_remote = text.startswith("s3://")
    is_file = text.endswith(FILE_SUFFIXES) if is_remote else Path(text).expanduser().is_file()
    if is_file and not is_remote:
        head = str(Path(text).expanduser().absolute().parent)
    try:
        store = open_store(head if is_file else text)
    except ValueError as error:
        raise CheckpointMismatch(f"{text}: {error}") from error
    return WeightFolder(store, name if is_file else None, cache or DEFAULT_CACHE)


def _refuse_pointer(path: Path) -> None:
    """A clone without Git LFS has small texts in place of large files."""
    with path.open("rb") as file:
        text = file.read(200)
    if text.startswith(_LFS_POINTER):
        size = re.search(rb"size (\d+)", text)
        stands_for = f"a file of {int(size[1]):,} bytes" if size else "a large file"
        raise CheckpointMismatch(
            f"{path}: is a Git LFS pointer that stands for {stands_for}; run `git lfs pull` where it was cloned, or "
            "fetch it with `hf download`"
        )


def file_sha256(path: Path, cache: Path) -> str:
    """SHA-256 of a file; read once, then remembered for as long as the file is not touched.

    One that was written a moment ago is read again the next time: a change within the same tick of the file system's
    clock would leave its time as it is.
    """
    stamp = _stamp(path)
    note = _note_path(path, cache)
    try:
        noted = json.loads(note.read_text())
        if noted["stamp"] == stamp:
            return str(noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no note, or one that another version wrote: the file is read again
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    is_settled = stamp == _stamp(path) and time.time_ns() - stamp[1] > _SETTLED_NS
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_name(f"{note.name}.{os.getpid()}")
        part.write_text(json.dumps({"path": str(path), "stamp": stamp if is_settled else None, "sha256": digest}))
        os.replace(part, note)
    except OSError as error:
        logger.warning("cannot remember hashes in %s (%s): files are hashed at every start", cache, error)
    return digest


def _noted_sha256(path: Path, cache: Path) -> str | None:
    try:
        return str(json.loads(_note_path(path, cache).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note_path(path: Path, cache: Path) -> Path:
    return cache / "hashes" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()}.json"


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process (or thread) of this machine at a time; the lock ends with its holder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

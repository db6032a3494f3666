"""S3Store: an ObjectStore in a bucket of Amazon S3 or of a server that speaks its protocol. The only home of boto3.

Every HTTP request is tried again by us, not by botocore, so that after a lost answer we know that an earlier try may
have been obeyed. What an error means is judged in one place, `s3_errors.py`. Endpoint, region, profile and credentials
come from boto3's default chain; they are never logged or pickled.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3.session
import botocore.loaders
import botocore.session
from botocore.config import Config
from tenacity import Retrying, retry_if_exception_type, stop_before_delay, wait_random_exponential

from cluster.errors import NotFound, OutcomeUnknown, StoreError, StoreUnavailable
from cluster.object_store import ObjectInfo, check_key
from cluster.s3_errors import FOREIGN_ERRORS, Verdict, judge

log = logging.getLogger(__name__)
T = TypeVar("T")

MIB = 1 << 20
MAX_PARTS = 10_000  # S3's limit for one multipart upload
MAX_DELETES = 1000  # S3's limit for one DeleteObjects request
CONTENT_TYPES = {
    ".mp4": "video/mp4",
    ".json": "application/json",
    ".png": "image/png",
    ".webp": "image/webp",
    ".html": "text/html; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".parquet": "application/vnd.apache.parquet",
}


@dataclass(frozen=True)
class S3Settings:
    """Patience and sizes. A request is repeated until `deadline_s` after the first try, plus one `read_timeout_s`."""

    deadline_s: float = 60.0
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0
    max_connections: int = 32
    multipart_above_bytes: int = 16 * MIB
    part_bytes: int = 8 * MIB  # at least 5 MiB, S3's minimum; four are in memory at once
    part_threads: int = 4


class _TryAgain(Exception):
    """This try failed in a way that a later one may not; carries the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.code)
        self.verdict = verdict


class _Tries:
    """Memory over all tries of one request: may an earlier one have been obeyed although we got no answer?"""

    maybe_obeyed = False


class S3Store:
    """A prefix in a bucket. Holds one thread-safe client, made at first use in each process.

    `retries` counts the tries that failed and were repeated, by S3 error code or exception name.
    """

    def __init__(self, bucket: str, prefix: str = "", settings: S3Settings | None = None) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self.settings = settings or S3Settings()
        self.retries: collections.Counter[str] = collections.Counter()
        self._forget_client()

    def __getstate__(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "prefix": self.prefix, "url": self.url, "settings": self.settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.retries = collections.Counter()
        self._forget_client()

    def get(self, key: str) -> bytes:
        where = self._where(key)
        return self._send(f"get {key}", lambda s3: bytes(s3.get_object(**where)["Body"].read()))

    def size(self, key: str) -> int | None:
        where = self._where(key)
        try:
            return self._send(f"head {key}", lambda s3: int(s3.head_object(**where)["ContentLength"]))
        except NotFound:
            return None

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        page: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        if start_after:
            page["StartAfter"] = self.prefix + start_after
        while True:
            answer = self._send(f"list {prefix}", partial(_list_page, page))
            for found in answer.get("Contents", ()):
                key = found["Key"].removeprefix(self.prefix)
                if key and not key.endswith("/"):  # the web consoles' markers of empty folders
                    yield ObjectInfo(key, found["Size"])
            if not answer.get("IsTruncated"):
                return
            page = {**page, "ContinuationToken": answer["NextContinuationToken"]}

    def put(self, key: str, data: bytes) -> None:
        """See ObjectStore. After a lost answer the bytes are sent again, so an older try may still land late."""
        where = self._where_to(key)
        self._send(f"put {key}", lambda s3: s3.put_object(**where, Body=data))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        where, tries = self._where_to(key), _Tries()

        def send(s3: Any) -> bool:
            s3.put_object(**where, Body=data, IfNoneMatch="*")
            return True

        try:
            return self._send(f"put new {key}", send, tries)
        except FileExistsError:
            # 412. If one of our tries went unanswered, the object that is there may be ours.
            return tries.maybe_obeyed and self.get(key) == data
        except StoreUnavailable as error:
            if tries.maybe_obeyed:
                raise OutcomeUnknown(f"{error}; an unanswered try may have been obeyed") from error
            raise

    def put_file(self, key: str, path: Path) -> None:
        num_bytes = path.stat().st_size
        if num_bytes > self.settings.multipart_above_bytes:
            self._put_in_parts(key, path, num_bytes)
            return
        where = self._where_to(key)

        def send(s3: Any) -> None:
            with path.open("rb") as file:
                s3.put_object(**where, Body=file)

        self._send(f"put {key}", send)

    def get_file(self, key: str, path: Path) -> None:
        where = self._where(key)

        def fetch(s3: Any) -> None:
            with path.open("wb") as file, contextlib.closing(s3.get_object(**where)["Body"]) as body:
                for piece in body.iter_chunks(MIB):
                    file.write(piece)

        self._send(f"get {key}", fetch)

    def delete(self, keys: Iterable[str]) -> None:
        rest = iter(keys)
        while some := [check_key(key) for key in islice(rest, MAX_DELETES)]:
            self._send(f"delete {len(some)} objects from {some[0]}", partial(self._delete_once, some))

    def _delete_once(self, keys: Sequence[str], s3: Any) -> None:
        names = {"Objects": [{"Key": self.prefix + key} for key in keys], "Quiet": True}
        answer = s3.delete_objects(Bucket=self.bucket, Delete=names)
        for error in answer.get("Errors", ()):
            if error.get("Code") != "NoSuchKey":
                raise s3.exceptions.ClientError({"Error": error}, "DeleteObjects")

    def _put_in_parts(self, key: str, path: Path, num_bytes: int) -> None:
        where = self._where(key)
        upload_id = self._send(
            f"begin upload {key}", lambda s3: s3.create_multipart_upload(**self._where_to(key))["UploadId"]
        )
        upload = {**where, "UploadId": upload_id}
        try:
            parts = self._send_parts(key, upload, path, num_bytes)
            self._complete(key, upload, parts, num_bytes)
        except BaseException:
            # The bucket's lifecycle rule catches what this abort cannot (a killed process, a dead network).
            with contextlib.suppress(StoreError, FileExistsError):
                self._send(f"abort upload {key}", lambda s3: s3.abort_multipart_upload(**upload))
            raise

    def _send_parts(self, key: str, upload: dict[str, Any], path: Path, num_bytes: int) -> Sequence[dict[str, Any]]:
        part_bytes = max(self.settings.part_bytes, -(-num_bytes // MAX_PARTS))
        numbers = range(1, -(-num_bytes // part_bytes) + 1)

        def send_part(number: int) -> dict[str, Any]:
            data = os.pread(file.fileno(), part_bytes, (number - 1) * part_bytes)
            answer = self._send(
                f"part {number} of {key}", lambda s3: s3.upload_part(**upload, PartNumber=number, Body=data)
            )
            checksum = {name: answer[name] for name in ("ChecksumCRC32",) if name in answer}
            return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

        with path.open("rb") as file, ThreadPoolExecutor(self.settings.part_threads, "s3-part") as threads:
            try:
                return list(threads.map(send_part, numbers))
            except BaseException:
                threads.shutdown(wait=True, cancel_futures=True)
                raise

    def _complete(self, key: str, upload: dict[str, Any], parts: Sequence[dict[str, Any]], num_bytes: int) -> None:
        tries = _Tries()
        request = {**upload, "MultipartUpload": {"Parts": list(parts)}}
        try:
            self._send(f"complete upload {key}", lambda s3: s3.complete_multipart_upload(**request), tries)
        except NotFound:
            # The upload is gone: the lost answer said yes, if the object is there. The key is ours alone.
            if not tries.maybe_obeyed or self.size(key) != num_bytes:
                raise

    def _where(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    def _where_to(self, key: str) -> dict[str, Any]:
        suffix = Path(key).suffix
        return {**self._where(key), "ContentType": CONTENT_TYPES.get(suffix, "application/octet-stream")}

    def _send(self, what: str, request: Callable[[Any], T], tries: _Tries | None = None) -> T:
        """Send a request until it is answered, refused, or the deadline is near; errors come out as ours."""
        tries = tries or _Tries()
        retrying = Retrying(
            stop=stop_before_delay(self.settings.deadline_s),
            wait=wait_random_exponential(multiplier=0.05, max=5.0),
            retry=retry_if_exception_type(_TryAgain),
            reraise=True,
        )
        try:
            outcome: T = retrying(self._try_once, what, request, tries)
            return outcome
        except _TryAgain as last:
            raise StoreUnavailable(
                f"{self.url}: {what}: no success within {self.settings.deadline_s:g} s; last answer: "
                f"{last.verdict.message}"
            ) from last.__cause__

    def _try_once(self, what: str, request: Callable[[Any], T], tries: _Tries) -> T:
        try:
            return request(self._s3())
        except FOREIGN_ERRORS as error:
            verdict = judge(error)
            tries.maybe_obeyed |= verdict.maybe_obeyed
            if verdict.raises is not None:
                raise verdict.raises(f"{self.url}: {what}: {verdict.message}") from error
            self.retries[verdict.code] += 1
            log.debug("%s: %s: %s; trying again", self.url, what, verdict.code)
            raise _TryAgain(verdict) from error

    def _forget_client(self) -> None:
        self._client: Any = None
        self._client_pid = 0
        self._client_lock = threading.Lock()

    def _s3(self) -> Any:
        if self._client_pid != os.getpid():  # a forked child must not share its parent's sockets
            with self._client_lock:
                if self._client_pid != os.getpid():
                    self._client = make_client(self.settings)
                    self._client_pid = os.getpid()
        return self._client


def _list_page(page: dict[str, Any], s3: Any) -> dict[str, Any]:
    answer: dict[str, Any] = s3.list_objects_v2(**page)
    return answer


def make_client(settings: S3Settings) -> Any:
    """A boto3 client from the default chain; path-style and plain checksums where the endpoint is not Amazon's.

    boto3 itself does not read AWS_REGION, which every other AWS SDK does.
    """
    variables = {"region": ("region", ["AWS_REGION", "AWS_DEFAULT_REGION"], None, None)}
    below = botocore.session.Session(session_vars=variables)
    session = boto3.session.Session(botocore_session=below)
    # After boto3 has added a folder of its own, for what is no client, to the loader that each session begins with.
    below.register_component("data_loader", _descriptions(below.get_config_variable("data_path")))
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        max_pool_connections=settings.max_connections,
        tcp_keepalive=True,
    )
    client = session.client("s3", config=config)
    host = urlsplit(client.meta.endpoint_url).hostname or ""
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return client
    client.close()
    other = Config(
        s3={"addressing_style": "path"},
        # Older servers know neither checksum trailers nor their verification (Ceph before 19, for one).
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client("s3", config=config.merge(other))


@functools.cache
def _descriptions(folders: str | None) -> Any:
    """Amazon's descriptions of its services: reading them takes most of the time that a client takes to make."""
    return botocore.loaders.create_loader(folders)

"""For readers of a job's output: the manifest as a dataset, and newly committed rows as they come.

Needs the store alone: no cluster, no driver, no model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from cluster.errors import NotFound
from cluster.object_store import ObjectStore, open_store
from jobs.columns import SCHEMA
from jobs.commit import MANIFEST, SUCCESS_KEY
from jobs.journal import read_entries, read_entry
from jobs.manifest import CommittedRow, PartHead, build_part, part_key, read_head, read_part

MAX_BATCH_ROWS = 1000


def open_manifest(url: str | Path) -> ds.Dataset:
    """All published rows of a job as a pyarrow dataset; its schema holds every user column of every part.

    Args:
        url: Root of a job (the folder that holds `manifest/`), local or s3://. On S3, endpoint, region and credentials
            come from the usual variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE ...).
    """
    filesystem, root = arrow_filesystem(str(url))
    folder = pafs.FileSelector(f"{root.rstrip('/')}/{MANIFEST}", allow_not_found=True)
    files = sorted(info.path for info in filesystem.get_file_info(folder) if info.base_name.startswith("part-"))
    if not files:
        return ds.dataset(pa.Table.from_batches([], schema=SCHEMA))
    found = ds.dataset(files, format="parquet", filesystem=filesystem)
    schemas = [fragment.physical_schema.remove_metadata() for fragment in found.get_fragments()]
    return found.replace_schema(pa.unify_schemas([SCHEMA, *schemas], promote_options="permissive"))


def arrow_filesystem(url: str) -> tuple[pafs.FileSystem, str]:
    """pyarrow's file system for a store URL and the path in it. For reading only: its S3 writer ignores conditions."""
    if url.startswith("s3://"):
        found: tuple[pafs.FileSystem, str] = pafs.FileSystem.from_uri(url)
        return found
    return pafs.LocalFileSystem(), open_store(url).url


@dataclass(frozen=True)
class NewRows:
    """Rows that were committed since the last ones, in commit order.

    `cursor` stands behind them: keep it with what you did with the rows, and `follow` goes on there.
    """

    table: pa.Table
    cursor: str


def follow(
    url: str | Path, cursor: str | None = None, *, poll_s: float = 5.0, until_done: bool = True
) -> Iterator[NewRows]:
    """Every committed row of a job exactly once, while it runs and afterwards.

    A row appears within `poll_s` of its commit, long before it stands in a manifest part.

    Args:
        url: Root of a job.
        cursor: Where to go on; None begins at the first row.
        poll_s: How long to sleep when there is nothing new.
        until_done: Wait for more until the job has its `_SUCCESS`; False ends at what is committed now.
    Raises:
        ValueError: The cursor is none of ours.
    """
    follower = _Follower(open_store(url), cursor)
    while True:
        is_done = not until_done or follower.store.size(SUCCESS_KEY) is not None
        num_batches = 0
        for new in follower.read_new():
            num_batches += 1
            yield new
        if not num_batches:
            if is_done:
                return
            time.sleep(poll_s)


def committed_tables(store: ObjectStore, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Every succeeded row as it stands now, published or not; all columns, or those of ours that are named."""
    for new in _Follower(store, None, columns).read_new():
        yield new.table


def committed_rows(store: ObjectStore, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The same, row by row as Python values."""
    for table in committed_tables(store, columns):
        for batch in table.to_batches(MAX_BATCH_ROWS):
            yield from batch.to_pylist()


class _Follower:
    """Reads parts as far as they go, then the journal behind them: the same rows, whichever of the two shows them.

    Invariant: every succeeded row with commit_seq <= `_seq` has been handed out, and none above it.
    """

    def __init__(self, store: ObjectStore, cursor: str | None, columns: Sequence[str] | None = None) -> None:
        self.store = store
        self._columns = None if columns is None else list(dict.fromkeys([*columns, "commit_seq"]))
        self._types: dict[str, pa.DataType] = {}
        self._seq, self._num_parts = _read_cursor(cursor)

    def read_new(self) -> Iterator[NewRows]:
        """Everything that is committed and was not handed out yet."""
        yield from self._from_parts()
        if read_entry(self.store, self._seq + 1) is not None:  # one GET instead of a LIST where nothing is new
            yield from self._from_journal()

    def _from_parts(self) -> Iterator[NewRows]:
        while True:
            try:
                data = self.store.get(part_key(MANIFEST, self._num_parts))
            except NotFound:
                return
            head = read_head(data)
            self._types = head.user_types
            self._num_parts += 1
            table = read_part(data, self._columns).filter(pc.field("commit_seq") > self._seq).sort_by("commit_seq")
            self._seq = max(self._seq, head.last_seq)
            if table.num_rows:
                yield NewRows(table.replace_schema_metadata(None), self._cursor())

    def _from_journal(self) -> Iterator[NewRows]:
        rows: list[CommittedRow] = []
        last_seq = self._seq
        for entry in read_entries(self.store, self._seq):
            rows += [CommittedRow.of(entry.seq, row) for row in entry.rows if row["status"] == "succeeded"]
            if len(rows) >= MAX_BATCH_ROWS:
                yield self._batch(rows, entry.seq)
                rows = []
            last_seq = entry.seq
        if rows:
            yield self._batch(rows, last_seq)
        self._seq = last_seq  # entries without videos need not be read again

    def _batch(self, rows: list[CommittedRow], last_seq: int) -> NewRows:
        head = PartHead("", len(rows), self._seq + 1, last_seq, 0, self._types)
        table = read_part(build_part(rows, head), self._columns).sort_by("commit_seq").replace_schema_metadata(None)
        self._seq = last_seq
        return NewRows(table, self._cursor())

    def _cursor(self) -> str:
        return f"{self._seq}-{self._num_parts}"


def _read_cursor(cursor: str | None) -> tuple[int, int]:
    if cursor is None:
        return 0, 0
    seq, _, num_parts = cursor.partition("-")
    if not (seq.isdecimal() and num_parts.isdecimal()):
        raise ValueError(f"{cursor!r} is no cursor of longtake.follow; start again with None, or keep NewRows.cursor")
    return int(seq), int(num_parts)

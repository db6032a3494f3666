"""Manifest parts: rows in, Parquet bytes out, and back. A part is a pure function of the rows it covers.

The same form serves manifest/ (succeeded rows) and quarantine/ (failed, rejected and reopened ones). Who may publish
which rows is decided in commit.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import from_json

from jobs.columns import COLUMN_NAMES, COLUMNS, SCHEMA, SCHEMA_VERSION, TIMESTAMP
from jobs.journal import encode_row
from jobs.rows import Row
from jobs.user_columns import to_arrays, unify_types

ZSTD_LEVEL = 3
BATCH_ROWS = 1000  # rows held as Python objects at once; a row costs about 6 KB as objects, 2 KB as JSON
GROUP_ROWS = 5 * BATCH_ROWS  # rows held as Arrow columns at once: the driver's memory, not the readers', asks for it


@dataclass(frozen=True, slots=True)
class CommittedRow:
    """A row and the journal entry that committed it; kept as JSON, a third of its size as objects."""

    seq: int
    data: bytes

    @classmethod
    def of(cls, seq: int, row: Row) -> CommittedRow:
        return cls(seq, encode_row(row))


@dataclass(frozen=True)
class PartHead:
    """What a part says of itself in its schema metadata."""

    job_id: str
    num_rows: int
    first_seq: int
    last_seq: int
    epoch: int
    user_types: dict[str, pa.DataType] = field(default_factory=dict)


def part_key(prefix: str, index: int) -> str:
    """Object key of a part; `prefix` is `manifest/` or `quarantine/`."""
    return f"{prefix}part-{index:05d}.parquet"


def build_part(rows: Sequence[CommittedRow], head: PartHead) -> bytes:
    """One Parquet file: sorted by item, zstd, statistics and page index.

    Args:
        rows: What the part covers, in any order.
        head: Its metadata; `num_rows` is taken from `rows`, and `user_types` are the types fixed by earlier parts.
    """
    ordered, types = _plan(rows, head.user_types)
    user_fields = [pa.field(name, kind) for name, kind in types.items()]
    schema = pa.schema([*SCHEMA, *user_fields], metadata=_metadata(head, len(rows)))
    sink = pa.BufferOutputStream()
    options = {"compression": "zstd", "compression_level": ZSTD_LEVEL, "write_page_index": True}
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for first in range(0, len(ordered), GROUP_ROWS):
            group = ordered[first : first + GROUP_ROWS]
            batches = [_batch(group[k : k + BATCH_ROWS], types, schema) for k in range(0, len(group), BATCH_ROWS)]
            writer.write_table(pa.Table.from_batches(batches, schema), row_group_size=GROUP_ROWS)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _plan(
    rows: Sequence[CommittedRow], fixed_types: Mapping[str, pa.DataType]
) -> tuple[list[CommittedRow], dict[str, pa.DataType]]:
    """Rows in the order of the part (lines that have no item last), and the types of the user's columns."""
    keys, user_rows = [], []
    for index, row in enumerate(rows):
        body = from_json(row.data)
        item_id = body.get("item_id")
        keys.append((item_id is None, item_id or "", body.get("sample_index") or 0, row.seq, index))
        if "user" in body:
            user_rows.append(body["user"])
    return [rows[key[-1]] for key in sorted(keys)], unify_types(user_rows, fixed_types)


def read_head(data: bytes) -> PartHead:
    """The metadata of a part.

    Raises:
        ValueError: This is no part of ours, or of a newer schema version.
    """
    schema = pq.read_schema(pa.BufferReader(data))
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    if "longtake.schema_version" not in metadata:
        raise ValueError("a Parquet file without longtake.* metadata is no manifest part")
    if int(metadata["longtake.schema_version"]) > SCHEMA_VERSION:
        raise ValueError(f"a part of schema {metadata['longtake.schema_version']}; this version reads {SCHEMA_VERSION}")
    return PartHead(
        job_id=metadata["longtake.job_id"],
        num_rows=int(metadata["longtake.part_rows"]),
        first_seq=int(metadata["longtake.first_seq"]),
        last_seq=int(metadata["longtake.last_seq"]),
        epoch=int(metadata["longtake.epoch"]),
        user_types={item.name: item.type for item in schema if item.name not in COLUMN_NAMES},
    )


def read_part(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a part, or some of its columns."""
    # By this thread alone: Arrow's threads let go of `data` late, and abort an interpreter that ends meanwhile.
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        table: pa.Table = file.read(columns=None if columns is None else list(columns), use_threads=False)
    return table


def _batch(rows: Sequence[CommittedRow], types: Mapping[str, pa.DataType], schema: pa.Schema) -> pa.RecordBatch:
    bodies = [from_json(row.data) for row in rows]
    users, misfits = to_arrays([body.get("user", {}) for body in bodies], types)
    arrays = []
    for column in COLUMNS:
        if column.name == "commit_seq":
            values: Sequence[Any] = [row.seq for row in rows]
        elif column.name == "user_misfits":
            values = misfits
        elif column.type == TIMESTAMP:
            values = [_timestamp(body.get(column.name)) for body in bodies]
        else:
            values = [body.get(column.name) for body in bodies]
        arrays.append(pa.array(values, column.type))
    return pa.record_batch([*arrays, *users.values()], schema=schema)


def _timestamp(text: Any) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _metadata(head: PartHead, num_rows: int) -> Mapping[str, str]:
    return {
        "longtake.schema_version": str(SCHEMA_VERSION),
        "longtake.job_id": head.job_id,
        "longtake.part_rows": str(num_rows),
        "longtake.first_seq": str(head.first_seq),
        "longtake.last_seq": str(head.last_seq),
        "longtake.epoch": str(head.epoch),
    }

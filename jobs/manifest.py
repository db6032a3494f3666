"""Manifest parts: rows in, Parquet bytes out, and back. A part is a pure function of the rows it covers.

The same form serves manifest/ (succeeded rows) and quarantine/ (failed, rejected and reopened ones). Who may publish
which rows is decided in commit.py.
"""

from __future__ import annotations

import io
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
    batches, user_rows = [], []
    for first in range(0, len(rows), BATCH_ROWS):
        batch = [from_json(row.data) for row in rows[first : first + BATCH_ROWS]]
        user_rows += [row.pop("user", {}) for row in batch]
        seqs = [row.seq for row in rows[first : first + BATCH_ROWS]]
        batches.append(_record_batch(batch, seqs))
    table = pa.Table.from_batches(batches, schema=SCHEMA)
    del batches  # sorting copies: two copies of a part are enough
    arrays, misfits = to_arrays(user_rows, unify_types(user_rows, head.user_types))
    table = table.set_column(SCHEMA.get_field_index("user_misfits"), "user_misfits", pa.array(misfits, pa.string()))
    for name, array in arrays.items():
        table = table.append_column(name, array)
    table = table.sort_by([("item_id", "ascending"), ("sample_index", "ascending"), ("commit_seq", "ascending")])
    table = table.replace_schema_metadata(_metadata(head, len(rows)))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=ZSTD_LEVEL, write_page_index=True)
    return sink.getvalue()


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
    # Neither a Python file nor a dataset scan: its threads let go of the file late, and abort an interpreter that ends.
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        table: pa.Table = file.read(columns=None if columns is None else list(columns))
    return table


def _record_batch(rows: Sequence[Row], seqs: Sequence[int]) -> pa.RecordBatch:
    arrays = []
    for column in COLUMNS:
        if column.name == "commit_seq":
            arrays.append(pa.array(seqs, column.type))
        elif column.type == TIMESTAMP:
            arrays.append(pa.array([_timestamp(row.get(column.name)) for row in rows], column.type))
        else:
            arrays.append(pa.array([row.get(column.name) for row in rows], column.type))
    return pa.record_batch(arrays, schema=SCHEMA)


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

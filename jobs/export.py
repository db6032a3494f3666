"""A finished (or running) job in other people's forms: webdataset shards, or a Hugging Face VideoFolder.

Exports are copies under a new prefix; the job's own prefix is never touched. Every exported video is checked against
the manifest's hash on its way.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.object_store import ObjectStore, open_store
from jobs.consume import committed_rows, follow
from jobs.errors import JobError, SpecError

ExportFormat = Literal["webdataset", "videofolder"]
SHARD_BYTES = 512 << 20
"""Size of a tar shard; loaders like 256 MB to 1 GB."""
METADATA_ROWS = 20_000


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    num_videos: int
    num_bytes: int
    num_files: int


class ExportError(JobError):
    """A video is not what the manifest says; nothing more is exported."""


def export(
    url: str | Path,
    destination: str | Path,
    export_format: ExportFormat,
    *,
    shard_bytes: int = SHARD_BYTES,
    dry_run: bool = False,
) -> ExportReport:
    """Write every video that is committed now.

    Args:
        url: Root of the job.
        destination: Where to; must be empty, and outside the job.
        export_format: webdataset writes `shard-00000.tar` with `<key>.mp4`, `<key>.txt` (the prompt) and `<key>.json`
            (the row); videofolder writes `metadata.parquet` with `file_name` beside the videos.
        shard_bytes: Tar shards are closed at about this size.
        dry_run: Only count.
    Raises:
        SpecError: The destination is not empty.
        ExportError: A video does not hash to what its row says.
    """
    source, target = open_store(url), open_store(destination)
    if dry_run:
        sizes = [row["bytes"] for row in committed_rows(source)]
        return ExportReport(len(sizes), sum(sizes), 0)
    if next(iter(target.list()), None) is not None:
        raise SpecError(f"{target.url}: is not empty; export to a folder of its own")
    with tempfile.TemporaryDirectory(prefix="longtake-export-") as folder:
        work = _Work(source, target, Path(folder))
        return _webdataset(work, shard_bytes) if export_format == "webdataset" else _videofolder(work)


@dataclass(frozen=True)
class _Work:
    source: ObjectStore
    target: ObjectStore
    folder: Path

    def videos(self) -> Iterator[tuple[dict[str, Any], Path]]:
        """Rows with a local copy of their video, which is removed when the next one is asked for."""
        for row in committed_rows(self.source):
            path = self.folder / "video.mp4"
            self.source.get_file(row["file_name"], path)
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != row["sha256"]:
                raise ExportError(f"{row['file_name']}: SHA-256 is {found}, the manifest says {row['sha256']}")
            yield row, path
            path.unlink()


def _videofolder(work: _Work) -> ExportReport:
    num_videos = num_bytes = 0
    metadata = work.folder / "metadata.parquet"
    pending: list[dict[str, Any]] = []
    writer: pq.ParquetWriter | None = None
    schema = _metadata_schema(work.source)
    try:
        for row, path in work.videos():
            name = _name(row)
            work.target.put_file(f"videos/{name}.mp4", path)
            pending.append({**row, "file_name": f"videos/{name}.mp4", "caption": row["prompt"]})
            num_videos, num_bytes = num_videos + 1, num_bytes + row["bytes"]
            if len(pending) >= METADATA_ROWS:
                writer = _flush(writer, metadata, pending, schema)
        writer = _flush(writer, metadata, pending, schema)
    finally:
        if writer is not None:
            writer.close()
    work.target.put_file("metadata.parquet", metadata)
    return ExportReport(num_videos, num_bytes, num_videos + 1)


def _metadata_schema(source: ObjectStore) -> pa.Schema:
    """Columns of all rows; a row of a later part may bring one that the first has not."""
    schemas = [new.table.schema for new in follow(source.url, until_done=False)]
    schema = pa.unify_schemas(schemas, promote_options="permissive") if schemas else pa.schema([])
    if schema.get_field_index("file_name") > 0:  # first, so that a preview shows it
        index = schema.get_field_index("file_name")
        schema = schema.remove(index).insert(0, schema.field(index))
    return schema.append(pa.field("caption", pa.string()))


def _flush(
    writer: pq.ParquetWriter | None, path: Path, rows: list[dict[str, Any]], schema: pa.Schema
) -> pq.ParquetWriter:
    writer = writer or pq.ParquetWriter(path, schema, compression="zstd")
    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        rows.clear()
    return writer


def _webdataset(work: _Work, shard_bytes: int) -> ExportReport:
    num_videos = num_bytes = num_shards = 0
    path = work.folder / "shard.tar"
    videos = work.videos()
    first = next(videos, None)
    while first is not None:
        with tarfile.open(path, "w") as tar:
            while first is not None and tar.offset < shard_bytes:
                _add(tar, *first)
                num_videos, num_bytes = num_videos + 1, num_bytes + first[0]["bytes"]
                first = next(videos, None)
        work.target.put_file(f"shard-{num_shards:05d}.tar", path)
        num_shards += 1
    return ExportReport(num_videos, num_bytes, num_shards)


def _add(tar: tarfile.TarFile, row: dict[str, Any], path: Path) -> None:
    name = _name(row)
    text = json.dumps(row, ensure_ascii=False, default=str, sort_keys=True)
    for suffix, data in ((".json", text.encode()), (".txt", row["prompt"].encode())):
        info = tarfile.TarInfo(name + suffix)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    info = tarfile.TarInfo(name + ".mp4")
    info.size = path.stat().st_size
    with path.open("rb") as file:
        tar.addfile(info, file)


def _name(row: dict[str, Any]) -> str:
    """Ids hold no dots, so the first dot of a member's name begins its suffix, as webdataset wants it."""
    return f"{row['item_id']}-{row['sample_index']}"

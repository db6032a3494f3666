"""A million manifest rows in 50 parts: how long readers take to count and to filter them on local files.

python -m tests.bench.manifest
"""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.object_store import open_store
from jobs.consume import open_manifest
from jobs.manifest import ZSTD_LEVEL, CommittedRow, PartHead, build_part, part_key
from tests.bench.record import median_and_spread, report
from tests.outputs import finished_row, planned

NUM_ROWS, ROWS_PER_PART, REPEATS = 1_000_000, 20_000, 5
WHERE = "gpu_seconds > 0.4 and rank % 100 = 7 and prompt like '%item%'"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="longtake-bench-") as folder:
        started = time.perf_counter()
        write_parts(Path(folder))
        num_bytes = sum(path.stat().st_size for path in (Path(folder) / "manifest").iterdir())
        print(f"{NUM_ROWS} rows, {num_bytes / 1e6:.0f} MB, written in {time.perf_counter() - started:.0f} s")
        rows = [measured(name, act) for name, act in readers(folder).items()]
    report("manifest", rows, f"{NUM_ROWS:,} rows in {NUM_ROWS // ROWS_PER_PART} parts, {num_bytes / 1e6:.0f} MB")


def write_parts(root: Path) -> None:
    """One part goes through the real writer; the others are copies of it with their own ids and numbers."""
    store = open_store(root)
    committed = [
        CommittedRow.of(1, finished_row(store, planned(f"item-{index:07d}", rank=index)))
        for index in range(ROWS_PER_PART)
    ]
    first = pq.read_table(io.BytesIO(build_part(committed, PartHead("night", 0, 1, 1, 1))))
    (root / "manifest").mkdir()
    for part in range(NUM_ROWS // ROWS_PER_PART):
        start = part * ROWS_PER_PART
        numbers = range(start, start + ROWS_PER_PART)
        table = replaced(first, "item_id", pa.array([f"item-{n:07d}" for n in numbers]))
        table = replaced(table, "rank", pa.array(numbers, pa.int64()))
        table = replaced(table, "seed", pa.array([n * 2_654_435_761 % 2**63 for n in numbers], pa.int64()))
        for column in ("sha256", "frames_sha256"):  # what does not compress, as in a real manifest
            table = replaced(table, column, pa.array([random.randbytes(32).hex() for _ in numbers]))
        path = root / part_key("manifest/", part)
        pq.write_table(table, path, compression="zstd", compression_level=ZSTD_LEVEL, write_page_index=True)


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index).with_type(values.type), values)


def readers(folder: str) -> dict[str, Callable[[], int]]:
    """What is timed: each opens the files anew and returns a count."""
    glob = f"{folder}/manifest/part-*.parquet"

    def in_duckdb(query: str) -> Callable[[], int]:
        return lambda: int(duckdb.sql(query).fetchall()[0][0])

    expression = (pc.field("gpu_seconds") > 0.4) & (pc.field("rank") < 10_000)
    return {
        "DuckDB: count": in_duckdb(f"select count(*) from '{glob}'"),  # noqa: S608
        "DuckDB: count where": in_duckdb(f"select count(*) from '{glob}' where {WHERE}"),  # noqa: S608
        "DuckDB: count distinct items": in_duckdb(f"select count(distinct item_id) from '{glob}'"),  # noqa: S608
        "Polars: count where": lambda: int(
            pl.scan_parquet(glob).filter(pl.col("rank") < 10_000).select(pl.len()).collect().item()
        ),
        "longtake.open_manifest: count": lambda: open_manifest(folder).count_rows(),
        "longtake.open_manifest: count where": lambda: open_manifest(folder).count_rows(filter=expression),
    }


def measured(name: str, act: Callable[[], int]) -> dict[str, Any]:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        count = act()
        times.append(time.perf_counter() - started)
    median, spread = median_and_spread(times[1:])
    return {"reader": name, "rows found": count, "first (s)": times[0], "median (s)": median, "+-": spread}


if __name__ == "__main__":
    main()

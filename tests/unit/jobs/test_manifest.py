"""Rows become Parquet and come back; the schema is pinned by a golden file; the reference page is generated from it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.columns import COLUMNS, SCHEMA, reference_page
from jobs.manifest import CommittedRow, PartHead, build_part, read_head, read_part
from jobs.rows import Row, shorten
from tests.render_rows import given_up, succeeded

HEAD = PartHead("night", 0, 1, 9, 3)
GOLDEN = Path(__file__).parent / "golden" / "manifest_schema_v1.json"


def part_of(*rows: Row, head: PartHead = HEAD) -> bytes:
    return build_part([CommittedRow.of(seq, row) for seq, row in enumerate(rows, 1)], head)


def test_the_schema_is_the_golden_one_or_extends_it() -> None:
    golden = json.loads(GOLDEN.read_text())
    now = {field.name: str(field.type) for field in SCHEMA}
    assert {name: now.get(name) for name in golden} == golden
    assert list(now)[: len(golden)] == list(golden) or set(golden) < set(now)


def test_the_reference_page_is_generated_from_the_schema() -> None:
    page = Path(__file__).parents[3] / "docs" / "manifest.md"
    assert page.read_text() == reference_page(), "run: python -m jobs.columns > docs/manifest.md"
    assert all(column.meaning.endswith(".") for column in COLUMNS)


def test_a_row_comes_back_with_its_values_types_and_order() -> None:
    data = part_of(succeeded("b", mood="calm", score=1), succeeded("a", score=2.5))
    table = read_part(data)
    assert table.column("item_id").to_pylist() == ["a", "b"]
    assert table.column("commit_seq").to_pylist() == [2, 1]
    row = table.to_pylist()[1]
    assert row["video_uri"] == "memory://job/" + row["file_name"]
    assert row["duration_s"] == 6.0
    assert row["stage_s"]["denoise"] == 1.0
    assert row["usd"] == 1.5 * 3.6 / 3600
    assert row["finished_at"].isoformat() == "2026-11-23T21:59:02.500000+00:00"
    assert (row["mood"], row["score"]) == ("calm", 1.0)
    assert table.schema.field("score").type == pa.float64()


def test_a_part_is_read_without_threads_that_could_outlive_the_interpreter(tmp_path: Path) -> None:
    """Seen once: a driver that had finished its job ended by SIGABRT, as such a thread let go of the bytes too late."""
    part = tmp_path / "part.parquet"
    part.write_bytes(part_of(succeeded("a", mood="calm")))
    code = """
import os, sys
from pathlib import Path
from jobs.manifest import read_part
before = os.listdir("/proc/self/task")
assert read_part(Path(sys.argv[1]).read_bytes()).num_rows == 1
assert os.listdir("/proc/self/task") == before
"""
    subprocess.run([sys.executable, "-c", code, str(part)], cwd=Path(__file__).parents[3], check=True, timeout=240)


def test_a_part_is_a_pure_function_of_its_rows() -> None:
    rows = [succeeded(f"i{n}", tag=n) for n in range(50)]
    assert part_of(*rows) == part_of(*[json.loads(json.dumps(row)) for row in rows])


def test_metadata_says_what_the_part_covers() -> None:
    head = read_head(part_of(succeeded("a", mood="x"), given_up("b")))
    assert (head.job_id, head.num_rows, head.first_seq, head.last_seq, head.epoch) == ("night", 2, 1, 9, 3)
    assert head.user_types == {"mood": pa.string()}


def test_the_file_has_zstd_statistics_and_a_page_index() -> None:
    metadata = pq.read_metadata(io.BytesIO(part_of(succeeded("a"))))
    column = metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"
    assert column.statistics.has_min_max
    assert column.has_column_index
    assert column.has_offset_index


def test_a_value_that_does_not_fit_an_earlier_part_is_kept_beside_it() -> None:
    head = PartHead("night", 0, 1, 9, 3, {"score": pa.int64()})
    table = read_part(part_of(succeeded("a", score=1), succeeded("b", score="high"), head=head))
    assert table.column("score").to_pylist() == [1, None]
    assert table.column("user_misfits").to_pylist() == [None, '{"score": "high"}']


def test_mixed_types_within_a_part_become_json_text() -> None:
    table = read_part(
        part_of(succeeded("a", x=1), succeeded("b", x="y"), succeeded("c", x=True), succeeded("d", x=None))
    )
    assert table.column("x").to_pylist() == ["1", "y", "true", None]


def test_a_user_column_with_one_of_our_names_gets_a_prefix() -> None:
    table = read_part(part_of(succeeded("a", status="mine", user_status="other")))
    assert table.column("status").to_pylist() == ["succeeded"]
    assert table.column("user_status").to_pylist() == ["other"]
    assert table.column("user_user_status").to_pylist() == ["mine"]


def test_an_error_message_is_cut_at_a_character() -> None:
    assert len(shorten("ä" * 5000).encode()) == 2048
    assert shorten("x" + "ä" * 5000).endswith("ä")

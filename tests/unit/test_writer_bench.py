"""The bench of the writer: rows say what was measured, and files that differ end it."""

from dataclasses import replace

import pytest

from tests.bench import writer
from workers.config import VideoConfig

SMALL = VideoConfig(width=32, height=32, segment_frames=12)


def test_rows_compare_each_number_of_encoders_with_the_first() -> None:
    rows = writer.measure(writer.film(60, SMALL), SMALL, [1, 3], None, 2)
    assert [(row["part"], row["encoders"]) for row in rows] == [("as fast as it can", 1), ("as fast as it can", 3)]
    assert rows[0]["of one encoder"] == 1.0
    assert all(row["FPS, sustained"] > 0 and row["encode_s"] > 0 and row["check_s"] > 0 for row in rows)


def test_a_paced_take_is_no_faster_than_its_pace() -> None:
    (row,) = writer.measure(writer.film(36, SMALL), SMALL, [1], 240.0, 1)
    assert row["part"] == "paced, 240 FPS"
    assert row["FPS, whole take"] <= 240


def test_files_that_differ_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    write, seen = writer.write_take, []

    def spoilt(*args: object) -> writer.Take:
        take = write(*args)  # type: ignore[arg-type]
        seen.append(take)
        return replace(take, video=replace(take.video, sha256=f"{len(seen)}"))

    monkeypatch.setattr(writer, "write_take", spoilt)
    with pytest.raises(AssertionError, match="changes the file"):
        writer.measure(writer.film(36, SMALL), SMALL, [1, 2], None, 1)


def test_parts_of_a_picture_add_up() -> None:
    (row,) = writer.parts(writer.film(12, SMALL), SMALL)
    assert row["sum ms"] == pytest.approx(sum(row[f"{name} ms"] for name in ("hash", "convert", "encode", "check")))

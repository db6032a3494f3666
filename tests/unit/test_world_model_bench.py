"""A measurement made in several calls becomes one file that says of every row where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.world_model import collect, main
from workers.quality.drift import BANDS

NOTES = "weights 0123456789abcdef; 4 denoising steps"


def record(command: str, *rows: dict[str, Any], notes: str = NOTES) -> dict[str, Any]:
    where = {"name": "world_model", "date": "2026-01-01", "device": "a GPU", "command": command, "commit": "abc"}
    return where | {"notes": notes, "rows": list(rows)}


def revisit(form: str, value: float) -> dict[str, Any]:
    return {"figure": "revisit", "form": form, "distance": 159, "value": value}


def drift(sharpness: float) -> dict[str, Any]:
    inside = {name: (low + high) / 2 for name, (low, high) in BANDS.items()}
    return {"figure": "drift_band", "form": "full", "value": 0.7} | inside | {"sharpness": sharpness}


def missing(part: str) -> dict[str, Any]:
    return {"figure": part, "value": None, "form": "not measured: out of time"}


def test_rows_measured_later_replace_what_was_missing_and_name_their_command() -> None:
    first = record("first", revisit("cut", 33.0), missing("drift-full"), missing("generated-159"))
    found = collect([first, record("second", drift(0.9), revisit("cut", 33.5))])
    assert {name: found[name] for name in ("command", "device", "date")} == {
        name: first[name] for name in ("command", "device", "date")
    }
    rows = {(row["figure"], row["form"]): row for row in found["rows"]}
    assert rows["revisit", "cut"]["value"] == 33.5
    assert rows["revisit", "cut"]["command"] == "second"
    assert rows["drift_band", "full"]["command"] == "second"
    assert [row["figure"] for row in found["rows"] if row["value"] is None] == ["generated-159"]


@pytest.mark.parametrize(("sharpness", "inside"), [(0.9, True), (0.1, False)])
def test_drift_is_judged_by_its_medians(sharpness: float, inside: bool) -> None:
    assert collect([record("first", drift(sharpness))])["rows"][0]["medians_in_band"] is inside


def test_records_of_different_weights_are_not_put_together() -> None:
    other = record("second", revisit("cut", 30.0), notes="weights fedcba9876543210; 4 denoising steps")
    with pytest.raises(ValueError, match="second: 'weights fedcba"):
        collect([record("first", revisit("cut", 33.0)), other])


def test_frames_per_second_stand_beside_what_the_same_weights_can_do() -> None:
    row = {"figure": "cpu_fps", "form": "full 180", "value": 15.0}
    fps = [row | {"dtype": dtype} for dtype in ("float32", "bfloat16")]
    timed = record("speed", *fps, notes="weights 0123456789abcdef; median of 8 chunks")
    rows = collect([record("first", revisit("cut", 33.0)), timed])["rows"]
    assert [(row["figure"], row.get("dtype")) for row in rows] == [
        ("revisit", None), ("cpu_fps", "float32"), ("cpu_fps", "bfloat16"),
    ]  # fmt: skip


def test_the_file_of_several_bears_the_name_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for file, value in zip(files, (33.0, 33.5), strict=True):
        file.write_text(json.dumps(record(file.stem, revisit("cut", value)) | {"name": file.stem}))
    command = ["world_model", "--collect", *map(str, files), "--name", "both", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    main()
    both = json.loads((tmp_path / "both.json").read_text())
    assert (both["name"], both["command"], both["rows"][0]["command"]) == ("both", "first", "second")

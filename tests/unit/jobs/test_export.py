"""Exports: complete, checked against the manifest, and outside the job."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.errors import SpecError
from jobs.export import ExportError, export
from tests.outputs import make_output


def test_webdataset_shards_hold_each_video_with_prompt_and_row(tmp_path: Path) -> None:
    make_output(tmp_path / "job", 3)
    report = export(tmp_path / "job", tmp_path / "wds", "webdataset", shard_bytes=1)
    assert (report.num_videos, report.num_files) == (3, 3)
    members: dict[str, bytes] = {}
    for shard in sorted((tmp_path / "wds").glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    assert sorted(members) == sorted(f"item-{i}-0.{suffix}" for i in range(3) for suffix in ("mp4", "txt", "json"))
    assert members["item-1-0.txt"] == b"a view of item-1"
    assert json.loads(members["item-1-0.json"])["mood"] == "wild"


def test_videofolder_has_metadata_with_relative_file_names(tmp_path: Path) -> None:
    make_output(tmp_path / "job", 3)
    export(tmp_path / "job", tmp_path / "hf", "videofolder")
    table = pq.read_table(tmp_path / "hf" / "metadata.parquet")
    assert table.column_names[0] == "file_name"
    for row in table.to_pylist():
        assert (tmp_path / "hf" / row["file_name"]).stat().st_size == row["bytes"]
        assert row["caption"] == row["prompt"]


def test_a_damaged_video_is_never_exported(tmp_path: Path) -> None:
    make_output(tmp_path / "job", 2)
    video = next((tmp_path / "job" / "videos").rglob("*.mp4"))
    video.write_bytes(video.read_bytes() + b"x")
    with pytest.raises(ExportError, match="the manifest says"):
        export(tmp_path / "job", tmp_path / "hf", "videofolder")


def test_a_destination_in_use_is_refused_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    make_output(tmp_path / "job", 2)
    report = export(tmp_path / "job", tmp_path / "hf", "videofolder", dry_run=True)
    assert report.num_videos == 2
    assert not (tmp_path / "hf").exists()
    with pytest.raises(SpecError, match="not empty"):
        export(tmp_path / "job", tmp_path / "job", "videofolder")

"""Readers of a job: the dataset, and `follow` with its exactly-once cursor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.object_store import open_store
from jobs.commit import write_success
from jobs.consume import follow, open_manifest
from tests.outputs import finished_row, make_output, planned, take


def ids(url: Path, cursor: str | None = None) -> tuple[list[str], str | None]:
    """Everything committed now, with the cursor behind it."""
    found: list[str] = []
    for new in follow(url, cursor, until_done=False):
        found += new.table["item_id"].to_pylist()
        cursor = new.cursor
    return found, cursor


def row(store: Any, item_id: str, **columns: object) -> Any:
    return finished_row(store, planned(item_id, **columns))


def test_dataset_of_a_job_without_parts_is_empty_but_typed(tmp_path: Path) -> None:
    found = open_manifest(tmp_path)
    assert found.count_rows() == 0
    assert found.schema.field("num_frames").type == "int32"


def test_dataset_holds_the_user_columns_of_every_part(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job = take(store)
    job.commit([row(store, "a", mood="calm")])
    job.publish()
    job.commit([row(store, "b", rank=3)])
    job.close()
    table = open_manifest(str(tmp_path)).to_table(columns=["item_id", "mood", "rank"]).sort_by("item_id")
    assert table.to_pylist() == [
        {"item_id": "a", "mood": "calm", "rank": None},
        {"item_id": "b", "mood": None, "rank": 3},
    ]


def test_follow_hands_out_each_row_once_whether_in_parts_or_in_the_journal(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job = take(store)
    job.commit([row(store, "a"), row(store, "b")])
    first, cursor = ids(tmp_path)
    job.publish()  # the same rows now stand in a part too
    job.commit([row(store, "c")])
    second, cursor = ids(tmp_path, cursor)
    job.publish()
    job.commit([row(store, "d")])
    job.close()
    third, cursor = ids(tmp_path, cursor)
    assert (first, second, third) == (["a", "b"], ["c"], ["d"])
    assert ids(tmp_path, cursor)[0] == []


def test_follow_from_the_start_needs_no_journal_once_parts_are_complete(tmp_path: Path) -> None:
    store = make_output(tmp_path, 5, with_videos=False)
    store.delete([info.key for info in list(store.list("_state/"))])
    assert sorted(ids(tmp_path)[0]) == [f"item-{i}" for i in range(5)]


def test_every_cursor_on_the_way_leads_to_the_rest(tmp_path: Path) -> None:
    make_output(tmp_path, 6, with_videos=False, num_parts=3)
    batches = list(follow(tmp_path))  # ends by itself: the job is done
    seen: list[str] = []
    for new in batches:
        seen += new.table["item_id"].to_pylist()
        assert sorted(seen + ids(tmp_path, new.cursor)[0]) == [f"item-{i}" for i in range(6)]
    assert len(batches) == 3


def test_follow_waits_until_the_job_is_done(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job = take(store)
    job.commit([row(store, "a")])
    seen = []
    for new in follow(tmp_path, poll_s=0.01):
        seen += new.table["item_id"].to_pylist()
        if seen == ["a"]:
            job.commit([row(store, "b")])
            job.close()
            write_success(store, "night", {})
    assert seen == ["a", "b"]


def test_rows_from_the_journal_and_from_a_part_have_the_same_types(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job = take(store)
    job.commit([row(store, "a", rank=1)])
    (live,) = follow(tmp_path, until_done=False)
    job.close()
    (published,) = follow(tmp_path, until_done=False)
    assert live.table.equals(published.table)


def test_a_foreign_cursor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no cursor"):
        next(follow(tmp_path, "yesterday"))

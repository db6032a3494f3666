"""The arithmetic of the scaling bench: what actors logged and what cards said, as shares and rates."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bench.busy_times import (
    Hold,
    idle_shares,
    losses,
    read_holds,
    second_half_frames_per_s,
    steady_takes_per_s,
    steady_window,
)
from tests.bench.gpu_watch import by_card, read_samples
from tests.bench.scaling_run import Part, Run, read_chunk_seconds, table_of

# Two actors: a works from 0 to 20 with a gap of 2 s, b begins at 4 and ends at 16.
HOLDS = [Hold("a", "1", 0.0, 8.0), Hold("b", "2", 4.0, 16.0), Hold("a", "3", 10.0, 20.0)]


def test_lost_capacity_and_work_add_up_to_the_capacity() -> None:
    lost = losses(HOLDS, until=21.0)
    assert (lost.before_s, lost.between_s, lost.after_s) == (4.0, 2.0, 1.0 + 5.0)
    assert sum(hold.seconds for hold in HOLDS) + lost.before_s + lost.between_s + lost.after_s == 2 * 21.0


def test_the_steady_window_begins_with_the_last_actor_and_ends_with_the_first() -> None:
    assert steady_window(HOLDS) == (4.0, 16.0)
    # In it: half of take 1, all of take 2, six tenths of take 3.
    assert steady_takes_per_s(HOLDS) == pytest.approx((4 / 8 + 1 + 6 / 10) / 12)
    assert steady_takes_per_s([Hold("a", "1", 0.0, 1.0), Hold("b", "2", 1.0, 2.0)]) is None


def test_idle_shares_are_of_an_actors_own_time() -> None:
    assert idle_shares(HOLDS) == pytest.approx({"a": 0.1, "b": 0.0})


def test_holds_are_read_from_the_lines_of_one_job(tmp_path: Path) -> None:
    end = datetime(2026, 11, 28, 15, 25, 1, 500_000, tzinfo=UTC)
    line = {"time": end.isoformat(), "job": "bench", "message": "take left the GPU", "task": "i-0", "actor": "actor-0"}
    lines = [line | {"held_s": 1.25}, line | {"held_s": 9.0, "job": "other"}, line | {"message": "video finished"}]
    log = tmp_path / "worker-1.err"
    log.write_text("\n".join([*map(json.dumps, lines), "not ours", '{"cut": ']))
    assert read_holds([log], "bench") == [Hold("actor-0", "i-0", end.timestamp() - 1.25, end.timestamp())]


def test_samples_of_cards_that_worked_are_averaged_and_broken_lines_left_out() -> None:
    text = "\n".join(
        [
            "2026/11/28 15:25:00.250, 0, 90, 1980, 600.5, 20000",
            "2026/11/28 15:25:00.251, 1, 0, 345, 70.0, 4",
            "2026/11/28 15:25:00.500, 0, 100, 1960, 610.5, 21000",
            "2026/11/28 15:25:00.501, 1, 0, [N/A], 70.0, 4",
            "2026/11/28 15:2",
        ]
    )
    samples = read_samples(text)
    assert len(samples) == 3
    (card,) = by_card(samples)
    assert card == {"card": 0, "used_percent": 95.0, "clock_mhz": 1970.0, "power_w": 605.5, "memory_mib": 21000.0}


def test_the_later_half_of_takes_has_a_pace_of_its_own() -> None:
    assert second_half_frames_per_s([[4.0, 4.0, 1.0, 1.0], [2.0, 2.0, 3.0, 3.0]], 40) == pytest.approx(40 / 8)


def test_seconds_of_chunks_are_read_take_by_take_in_order(tmp_path: Path) -> None:
    rows = [{"task_id": task, "chunk_index": index, "seconds": 1.0 + index} for task in "ba" for index in (1, 0)]
    pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], "task_id": "c"}]), tmp_path / "part-0.parquet")
    assert read_chunk_seconds(tmp_path) == [[1.0, 2.0], [1.0, 2.0], [2.0]]
    assert read_chunk_seconds(tmp_path / "nothing") == []


def test_a_run_of_one_actor_says_what_was_idle_and_what_has_a_cause() -> None:
    figures = {row["figure"]: row["tiles, 1 x 1 GPU"] for row in table_of([(ONE_ACTOR, None)])}
    assert "ratio" not in figures
    # Takes from 100 to 130 and from 130.5 to 160, the second one committed at 162.
    assert figures["idle share, first start to last commit"] == pytest.approx((0.5 + 2.0) / 62)
    assert figures["s idle between takes"] == pytest.approx(0.5)
    assert figures["s idle after the last take"] == pytest.approx(2.0)
    assert figures["s from leaving the GPU to the video"] == pytest.approx(1.5)
    assert figures["s from the video to its commit"] == pytest.approx(0.5)
    assert figures["frames/s first start to last commit"] == pytest.approx(2 * 1197 / 62)
    assert figures["frames/s, second half of a take"] == pytest.approx(1197 / 2 / 20)
    assert figures["cards used within 1 s of a change of takes"] == "95.0%"
    assert figures["GPU s by cause, sum / held"] == pytest.approx(0.999)
    assert figures["GPU s by cause, of those held"] == "useful 59.5%, load 30.0%, idle 10.4%"
    assert figures["idle share of what was held after loading"] == pytest.approx(10.4 / 70)


def a_row(item_id: str, finished: float) -> dict[str, Any]:
    """Of the manifest, as far as it is looked at."""
    stages = dict.fromkeys(("text", "denoise", "cache", "vae", "check", "encode", "upload"), 1.0)
    at = {"finished_at": _time(finished), "committed_at": _time(finished + 0.5)}
    return {"item_id": item_id, "sample_index": 0, "frames_sha256": item_id, "stage_s": stages, **at} | {
        "peak_gpu_bytes": 10**9,
        "backend": "sdpa",
        "kv_policy": "tiles",
    }


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


ONE_ACTOR = Run(
    part=Part("tiles", 2, 1197, ()),
    num_actors=1,
    gpus_per_actor=1.0,
    command_s=100.0,
    first_begin=100.0,
    last_commit=162.0,
    rows=[a_row("a", 131.5), a_row("b", 161.5)],
    holds=[Hold("actor-0", "a-0", 100.0, 130.0), Hold("actor-0", "b-0", 130.5, 160.0)],
    by_cause={"useful": 59.5, "load": 30.0, "idle": 10.4},
    held_s=100.0,
    cards=[],
    used_at_changes=[0.95],
    chunk_seconds=[[5.0, 10.0, 10.0, 10.0]] * 2,
)

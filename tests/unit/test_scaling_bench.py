"""The arithmetic of the scaling bench: what actors logged and what cards said, as shares and rates."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.bench.busy_times import Hold, idle_shares, losses, read_holds, steady_takes_per_s, steady_window
from tests.bench.gpu_watch import by_card, read_samples

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

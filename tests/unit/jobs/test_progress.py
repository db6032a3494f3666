"""Progress: rates, ETA, one line per interval."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.console import Console

from cluster.log_lines import JsonFormatter, TextFormatter
from jobs.progress import FrameRate, JobProgress, LineDisplay, LogDisplay, draw, duration_text
from jobs.view import ActorView
from tests.fakes import ManualClock


def progress(frames_done: int, **changes: object) -> JobProgress:
    values: dict[str, object] = {
        "num_tasks": 10,
        "num_succeeded": 2,
        "num_failed": 1,
        "num_rejected": 0,
        "num_running": 2,
        "frames_done": frames_done,
        "num_frames": 1000,
    }
    return JobProgress(**(values | changes))  # type: ignore[arg-type]


def test_rate_and_eta_follow_the_last_minutes() -> None:
    clock = ManualClock()
    rate = FrameRate(clock.monotonic)
    for done in (0, 100, 200):
        rate.add(done)
        clock.advance(10)
    assert rate.frames_per_s == pytest.approx(10)
    assert rate.eta_s(progress(200)) == pytest.approx(80)


def test_lost_frames_give_no_negative_speed() -> None:
    clock = ManualClock()
    rate = FrameRate(clock.monotonic)
    rate.add(100)
    clock.advance(5)
    rate.add(40)
    assert rate.frames_per_s is None


def test_one_line_per_interval_and_the_last_state_at_the_end() -> None:
    clock, out = ManualClock(), io.StringIO()
    display = LineDisplay(out, interval_s=30, clock=clock.monotonic)
    for done in range(0, 70, 10):
        display.update(progress(done))
        clock.advance(10)
    display.update(progress(75))
    display.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("2/10 done, 2 running, 1 failed, 0 rejected, 1.1 frames/s, ETA")


def test_a_note_is_told_at_once_and_not_repeated_before_its_time() -> None:
    clock, out = ManualClock(), io.StringIO()
    display = LineDisplay(out, interval_s=30, clock=clock.monotonic)
    for note in ("", "", "stopping", "stopping"):
        display.update(progress(10, note=note))
        clock.advance(1)
    assert [line.endswith("(stopping)") for line in out.getvalue().splitlines()] == [False, True]


def test_an_unknown_total_is_not_guessed() -> None:
    out = io.StringIO()
    LineDisplay(out).update(progress(0, num_tasks=None, num_frames=None))
    assert out.getvalue().startswith("2/? done")
    assert "ETA unknown" in out.getvalue()


def test_the_terminal_shows_a_line_per_actor() -> None:
    actors = (
        ActorView("actor-1", "n1", "running", "lagoon-0", 48, 96, 2, 300 << 20),
        ActorView("actor-2", "n1", "loading", None, 0, 0, 0, 0),
    )
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(draw(progress(48, actors=actors), FrameRate()))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert lines[-2:] == ["actor-1 running lagoon-0 48/96 frames 300 MB", "actor-2 loading"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "unknown"), (12.4, "12 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


def test_json_lines_carry_job_item_and_attempt() -> None:
    record = logging.LogRecord("jobs.driver", logging.WARNING, "f", 1, "lost %s", ("it",), None)
    record.item, record.shard, record.attempt = "a", 3, "e1a2"
    line = json.loads(JsonFormatter({"job": "night"}).format(record))
    assert (line["job"], line["item"], line["shard"], line["attempt"]) == ("night", "a", 3, "e1a2")
    assert (line["message"], line["level"]) == ("lost it", "warning")
    assert TextFormatter().format(record).endswith("WARNING lost it [item a, shard 3, attempt e1a2]")


def test_with_json_logs_progress_is_a_record_too(caplog: pytest.LogCaptureFixture) -> None:
    display = LogDisplay()
    with caplog.at_level(logging.INFO, "jobs.progress"):
        display.update(progress(10))
        display.close()
    (record,) = caplog.records
    assert json.loads(JsonFormatter({"job": "night"}).format(record))["frames"] == 10

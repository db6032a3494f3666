"""Status, report and plan: what can be said of a job from the store alone."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.object_store import open_store
from jobs.commit import write_result
from jobs.errors import SpecChanged, SpecError
from jobs.job_record import begin_record, check_same_pixels, read_spec
from jobs.plan import make_plan
from jobs.prompts import PromptScan
from jobs.report import _Sample, make_report, report_text
from jobs.spec_text import build_spec
from jobs.status import read_status, wait_for_end
from jobs.stop_request import is_stop_requested, request_stop
from tests.outputs import finished_row, make_output, output_spec, planned, take

SCAN = PromptScan(4, 4, 4, 32, {}, ())


def test_a_finished_job_counts_its_rows_without_a_cluster(tmp_path: Path) -> None:
    make_output(tmp_path, 4, with_videos=False)
    status = read_status(tmp_path)
    assert (status.state, status.num_succeeded, status.num_tasks, status.num_parts) == ("finished", 4, 4, 2)
    ended = wait_for_end(tmp_path)
    assert ended is not None
    assert ended.state == "finished"


def test_a_job_with_a_living_driver_is_running_and_wait_times_out(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    begin_record(store, output_spec("out"), SCAN, {})
    job = take(store)
    job.commit([finished_row(store, planned("a"))])
    assert read_status(tmp_path).state == "running"
    assert wait_for_end(tmp_path, timeout_s=0.1, poll_s=0.05) is None
    assert request_stop(store) == job.epoch
    assert is_stop_requested(store, job.epoch)
    assert not is_stop_requested(store, job.epoch + 1)
    assert read_status(tmp_path).state == "stopping"
    job.close()
    write_result(store, {"exit_code": 4, "is_resumable": True})
    stopped = read_status(tmp_path)
    assert (stopped.state, stopped.exit_code, stopped.num_succeeded) == ("stopped", 4, 1)


def test_a_driver_that_died_on_this_machine_leaves_an_interrupted_job(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    begin_record(store, output_spec("out"), SCAN, {})
    code = (
        "import sys; from cluster.object_store import open_store; from tests.outputs import take;"
        "take(open_store(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[3])
    assert read_status(tmp_path).state == "interrupted"


def test_status_of_no_job_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="job's own folder"):
        read_status(tmp_path)


def test_report_adds_up_the_rows_and_draws_a_contact_sheet(tmp_path: Path) -> None:
    make_output(tmp_path, 3)
    report = make_report(tmp_path)
    assert (report.num_videos, report.num_frames, report.gpu_s) == (3, 24, 1.5)
    assert (tmp_path / "report" / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "3 of 3 videos" in report_text(report)


def test_resuming_with_other_pixels_is_refused_with_a_diff(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record = begin_record(store, output_spec("out"), SCAN, {})
    assert read_spec(store) == output_spec("out")
    assert begin_record(store, output_spec("elsewhere"), SCAN, {}) == record  # the rest may change
    base = {("prompts", "url"): "p.jsonl", ("out",): "out", ("job_id",): "night"}
    with pytest.raises(SpecChanged, match=r"render\.video\.fps: 8 -> 24"):
        check_same_pixels(record, build_spec(flags=base | {("render", "video", "fps"): 24}), {}, "x")
    with pytest.raises(SpecChanged, match=r"weights\.w\.safetensors"):
        begin_record(store, output_spec("out"), SCAN, {"w.safetensors": "ab" * 32})


def test_plan_measures_its_speed_on_an_earlier_job_or_says_that_it_is_unknown(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\n\nb\n")
    flags = {("prompts", "url"): str(prompts), ("out",): str(tmp_path / "out"), ("actors", "count"): 2}
    spec = build_spec(flags=flags | {("pricing", "usd_per_gpu_hour"): 3.0})
    unknown = make_plan(spec)
    assert (unknown.num_tasks, unknown.num_rejected, unknown.gpu_hours, unknown.usd) == (2, 1, None, None)
    assert any("speed unknown" in note for note in unknown.notes)
    make_output(tmp_path / "night", 4, with_videos=False)
    plan = make_plan(spec, like=str(tmp_path / "night"))
    frames = 2 * 96
    assert plan.gpu_hours == pytest.approx(frames * 0.5 / 8 / 3600)
    assert plan.wall_hours == pytest.approx(frames * 0.5 / 8 / 3600 / 2)
    assert plan.usd == pytest.approx(3 * frames * 0.5 / 8 / 3600)
    assert plan.num_bytes == pytest.approx(frames * 1000 / 8)
    assert any("another look" in note for note in plan.notes)
    assert asdict(plan)["rate_source"].startswith("measured on 4 videos")


@pytest.mark.parametrize("sizes", [[5], [24], [25], [10, 100, 1000], [1] * 60])
def test_a_sheet_shows_takes_spread_over_the_whole_job(sizes: list[int]) -> None:
    sample, start = _Sample(24), 0
    for size in sizes:
        sample.add(pa.table({"n": range(start, start + size)}))
        start += size
    numbers = [row["n"] for row in sample.rows]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert min(start, 12) <= len(numbers) <= 24
    assert start - numbers[-1] <= 2 * max(1, start // 12)
    assert len({b - a for a, b in itertools.pairwise(numbers)}) <= 1

"""verify: finds what is missing, altered, cut or nobody's, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cluster.object_store import open_store
from jobs.verify import VerifyReport, is_sampled, verify
from tests.outputs import finished_row, make_output, planned, take, write_video


def videos(root: Path) -> list[Path]:
    return sorted((root / "videos").rglob("*.mp4"))


def kinds(report: VerifyReport) -> list[str]:
    return sorted(problem.kind for problem in report.problems)


def test_a_good_job_has_no_problems(tmp_path: Path) -> None:
    make_output(tmp_path, 3)
    report = verify(tmp_path)
    assert report.is_good
    assert (report.num_videos, report.num_decoded, report.num_orphans) == (3, 3, 0)


def test_missing_truncated_and_altered_videos_are_told_apart(tmp_path: Path) -> None:
    make_output(tmp_path, 3)
    missing, cut, altered = videos(tmp_path)
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    data = bytearray(altered.read_bytes())
    data[len(data) // 2] ^= 0xFF
    altered.write_bytes(data)
    report = verify(tmp_path)
    assert set(kinds(report)) <= {"missing", "size", "hash", "damaged"}
    assert {"missing", "size", "hash"} <= set(kinds(report))
    assert {p.key for p in report.problems} == {str(v.relative_to(tmp_path)) for v in (missing, cut, altered)}
    assert set(kinds(verify(tmp_path, deep=False))) == {"missing", "size"}


def test_a_wrong_frame_count_is_found_although_the_file_is_sound(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    job = take(store)
    task = planned("a", frames=8)
    row = finished_row(store, task, write_video(store, task))
    job.commit([row | {"num_frames": 9}])
    job.close()
    assert kinds(verify(tmp_path)) == ["frames"]


def test_sweep_removes_litter_of_ended_epochs_and_nothing_that_a_row_names(tmp_path: Path) -> None:
    store = make_output(tmp_path, 2)
    write_video(store, planned("item-0"), "e1a7")  # a zombie's
    store.put("_state/segments/item-0-0-e1a8/00000.mp4", b"half a take")
    report = verify(tmp_path)
    assert (report.num_orphans, report.num_swept, report.is_good) == (2, 0, True)
    assert verify(tmp_path, sweep=True).num_swept == 2
    after = verify(tmp_path)
    assert (after.num_orphans, after.num_videos, after.is_good) == (0, 2, True)


def test_what_a_living_driver_may_still_commit_is_no_orphan(tmp_path: Path) -> None:
    store = make_output(tmp_path, 1)
    job = take(store)
    write_video(store, planned("item-9"), f"e{job.epoch}a1")
    report = verify(tmp_path, sweep=True)
    assert (report.num_orphans, report.num_in_progress, report.num_swept) == (0, 1, 0)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_a_sample_is_always_the_same_and_of_the_size_asked_for(share: float) -> None:
    ids = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    chosen = {i for i in ids if is_sampled(i, share)}
    assert len(chosen) == pytest.approx(share * 4000, abs=80)
    assert chosen <= {i for i in ids if is_sampled(i, share + 0.1)}

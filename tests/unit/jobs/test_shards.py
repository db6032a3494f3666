"""Tasks: ids, seeds and names follow from content alone."""

from __future__ import annotations

import hashlib

from jobs.prompt_row import Prompt, Rejected, RowLimits, read_row
from jobs.shards import TaskDefaults, plan_tasks, task_seed, tasks_of, video_key

DEFAULTS = TaskDefaults(seed=3, samples=2, num_frames=96)


def prompt(line: int = 1, **columns: object) -> Prompt:
    row = read_row(line, {"prompt": "a meadow", **columns}, RowLimits())
    assert isinstance(row, Prompt)
    return row


def test_seed_is_63_bits_of_the_documented_hash() -> None:
    digest = hashlib.sha256(b"longtake-seed\x003\x00item\x001").digest()
    assert task_seed(3, "item", 1) == int.from_bytes(digest, "big") >> (256 - 63)


def test_tasks_do_not_depend_on_the_place_in_the_list() -> None:
    first = list(tasks_of(prompt(1), DEFAULTS))
    later = list(tasks_of(prompt(900), DEFAULTS))
    assert [(t.task_id, t.seed) for t in first] == [(t.task_id, t.seed) for t in later]
    assert [t.task_id for t in first] == [f"{first[0].item_id}-0", f"{first[0].item_id}-1"]


def test_more_samples_leave_the_earlier_ones_as_they_are() -> None:
    for row in (prompt(), prompt(seed=7)):
        two = list(tasks_of(row, DEFAULTS))
        four = list(tasks_of(row, TaskDefaults(seed=3, samples=4, num_frames=96)))
        assert four[:2] == two
        assert len({t.seed for t in four}) == 4


def test_a_rows_own_seed_is_used_as_it_stands() -> None:
    assert next(tasks_of(prompt(seed=7), DEFAULTS)).seed == 7


def test_rejected_rows_pass_through_in_place() -> None:
    rows = [prompt(1), Rejected(2, "empty_prompt", "prompt is empty"), prompt(3, id="z", frames=10)]
    kinds = [type(r).__name__ for r in plan_tasks(rows, DEFAULTS)]
    assert kinds == ["PlannedTask", "PlannedTask", "Rejected", "PlannedTask", "PlannedTask"]


def test_an_attempt_carries_what_the_worker_needs() -> None:
    task = next(tasks_of(prompt(id="z", frames=10), DEFAULTS))
    attempt = task.attempt("e2a1", ladder_rung=1)
    assert (attempt.task_id, attempt.attempt, attempt.num_frames, attempt.ladder_rung) == ("z-0", "e2a1", 10, 1)


def test_video_keys_of_two_attempts_differ() -> None:
    a, b = (video_key("z-0", "f" * 64, name) for name in ("e1a1", "e1a2"))
    assert a != b
    assert a.startswith(f"videos/{hashlib.sha256(b'z-0').hexdigest()[:2]}/z-0-ffffffff-")

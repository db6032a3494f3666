"""A finished job of 100,000 items, asked for again: how long until the answer is "nothing to do"?

    python -m tests.bench.nothing_to_do

Measures the whole command, from a cold interpreter to its exit: reading the list, the ledger, the report.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs.commit import write_success
from jobs.flags import arguments_of
from jobs.held_job import take_job
from jobs.job_record import begin_record
from jobs.lease import Owner, SystemClock
from jobs.preflight import check_before_start
from jobs.prompts import read_prompts
from jobs.replay import Replay
from jobs.shards import PlannedTask, plan_tasks
from jobs.spec import JobSpec
from jobs.spec_text import build_spec
from tests.bench.record import ROOT, median_and_spread, report
from tests.outputs import finished_row

NUM_ITEMS, ROWS_PER_ENTRY, REPEATS = 100_000, 500, 3


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="longtake-bench-") as folder:
        spec = make_finished_job(Path(folder))
        command = [sys.executable, "-m", "jobs.render", *arguments_of(spec), "--no-sheet"]
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            times.append(time.perf_counter() - started)
            assert f"{NUM_ITEMS} of {NUM_ITEMS} videos" in done.stdout, done.stdout
    median, spread = median_and_spread(times)
    row = {"job": f"{NUM_ITEMS:,} items, finished", "command to its exit (s)": median, "+-": spread, "goal (s)": 10}
    report("nothing-to-do", [row])


def make_finished_job(folder: Path) -> JobSpec:
    """Rows through the real journal and parts; of imagined videos."""
    prompts = folder / "p.jsonl"
    with prompts.open("w") as file:
        file.writelines(
            f'{{"id": "item-{n}", "prompt": "a green meadow with {n} red houses"}}\n' for n in range(NUM_ITEMS)
        )
    flags = {("prompts", "url"): str(prompts), ("out",): str(folder), ("job_id",): "night"}
    spec = build_spec(flags=flags | {("render", "backbone", "name"): "tiny-test"})
    found = check_before_start(spec, is_ray_job=False)
    begin_record(found.store, spec, found.scan, found.weights)
    job = take_job(found.store, Replay(found.store, "night"), Owner.current(), clock=SystemClock(), ttl_s=60.0)
    rows = []
    for task in plan_tasks(read_prompts(spec.source), spec.task_defaults):
        assert isinstance(task, PlannedTask)
        rows.append(finished_row(found.store, task))
        if len(rows) == ROWS_PER_ENTRY:
            job.commit(rows)
            rows = []
        if job.num_unpublished >= 20_000:
            job.publish()
    job.commit(rows)
    job.close()
    write_success(found.store, "night", job.ledger.summary())
    return spec


if __name__ == "__main__":
    main()

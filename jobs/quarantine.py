"""Tasks that were given up and lines that were refused: read them by kind, and the way back into the queue."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from cluster.object_store import ObjectStore
from jobs.commit import QUARANTINE, PartSeries, remove_success
from jobs.held_job import take_job
from jobs.lease import Clock, Owner
from jobs.replay import Replay
from jobs.rows import Row, reopened_row, task_id_of

FAILED_COLUMNS = (
    "job_id",
    "item_id",
    "sample_index",
    "input_row",
    "input_uri",
    "prompt",
    "status",
    "error_type",
    "error_message",
    "reject_kind",
    "generation",
    "node_id",
    "commit_seq",
)


def read_quarantine(store: ObjectStore, replay: Replay) -> Iterator[Row]:
    """All failed, rejected and reopened rows of a job in commit order, published or not."""
    parts = PartSeries(store, QUARANTINE, "")
    for table in parts.read_new(FAILED_COLUMNS):
        yield from table.sort_by("commit_seq").to_pylist()
    for row in replay.unpublished_quarantine:
        if row.seq > parts.last_seq:
            yield json.loads(row.data)


def open_failures(store: ObjectStore, replay: Replay) -> list[Row]:
    """The last failed row of every task that is given up now; what `retry` chooses from."""
    last: dict[str, Row] = {}
    for row in read_quarantine(store, replay):
        if row["status"] == "failed":
            last[task_id_of(row)] = row
    return [row for task_id, row in last.items() if _is_given_up(replay, task_id)]


def reopen(
    store: ObjectStore,
    job_id: str,
    select: Callable[[Row], Any],
    *,
    owner: Owner,
    clock: Clock,
    ttl_s: float,
    takeover: bool = False,
) -> int:
    """Give the failed tasks that `select` chooses another chance: the next run of the job renders them.

    Returns:
        How many tasks were reopened.
    Raises:
        LeaseHeld: A driver is at work on the job; its failures can be reopened when it has ended.
    """
    replay = Replay(store, job_id)
    if not any(select(row) for row in open_failures(store, replay)):
        return 0
    job = take_job(store, replay, owner, clock=clock, ttl_s=ttl_s, takeover=takeover)
    now = clock.utc_now().isoformat()
    rows = [reopened_row(row, now) for row in open_failures(store, replay) if select(row)]
    remove_success(store)
    num_reopened = job.commit(rows)
    job.close()
    return num_reopened


def _is_given_up(replay: Replay, task_id: str) -> bool:
    return replay.ledger.is_settled(task_id) and not replay.ledger.has_succeeded(task_id)

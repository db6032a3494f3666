"""`longtake retry`: failed videos get another chance. Which ones is chosen here; the record is the journal's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cluster.object_store import open_store
from jobs.driver import SystemClock
from jobs.errors import SpecError
from jobs.job_record import read_spec
from jobs.lease import Owner
from jobs.quarantine import open_failures, reopen
from jobs.replay import Replay
from jobs.rows import Row, task_id_of
from jobs.spec import JobSpec


@dataclass(frozen=True)
class Reopened:
    """The failed tasks that were chosen, and the spec to render them with."""

    spec: JobSpec
    task_ids: tuple[str, ...]


def reopen_failures(
    url: str | Path, *, kinds: Collection[str] = (), items: Collection[str] = (), dry_run: bool = False
) -> Reopened:
    """Reopen the given-up tasks of a job.

    Args:
        url: Root of the job.
        kinds: Only those that failed with one of these error types; empty means any.
        items: Only those of these item ids; empty means any.
        dry_run: Only say which.
    Raises:
        SpecError: There is no job.
        LeaseHeld: A driver is at work on it.
    """
    store = open_store(url)
    spec = read_spec(store)
    out, _, name = store.url.rpartition("/")
    if name != spec.job_id:
        raise SpecError(f"{store.url}: this folder was {spec.job_id!r} when the job was begun; give it that name again")
    spec = spec.model_copy(update={"out": out})  # where it is now, not where it was begun

    def is_chosen(row: Row) -> bool:
        return (not kinds or row["error_type"] in kinds) and (not items or row["item_id"] in items)

    chosen = [task_id_of(row) for row in open_failures(store, Replay(store, spec.job_id)) if is_chosen(row)]
    if chosen and not dry_run:
        ttl_s = spec.limits.lease_ttl_s
        reopen(store, spec.job_id, is_chosen, owner=Owner.current(), clock=SystemClock(), ttl_s=ttl_s)
    return Reopened(spec, tuple(chosen))

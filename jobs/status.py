"""Progress and failures of a job, read from the store alone, cluster or not; and waiting for its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cluster.object_store import ObjectStore, open_store
from jobs.commit import RESULT_KEY, SUCCESS_KEY, read_json
from jobs.errors import SpecError
from jobs.job_record import JOB_KEY, RUN_KEY
from jobs.lease import Owner, read_holder
from jobs.replay import Replay
from jobs.stop_request import is_stop_requested

JobState = Literal["not_started", "running", "stopping", "interrupted", "stopped", "failed", "finished"]
OVER: frozenset[JobState] = frozenset({"interrupted", "stopped", "failed", "finished"})


@dataclass(frozen=True)
class JobStatus:
    """What the store says of a job now."""

    job_id: str
    job_url: str
    state: JobState
    num_tasks: int
    num_succeeded: int
    num_failed: int
    num_rejected: int
    failures: dict[str, int]
    num_parts: int
    num_unpublished: int
    driver: dict[str, Any] | None
    last_result: dict[str, Any] | None
    resume_command: str | None

    @property
    def exit_code(self) -> int | None:
        """Of the last run, if the job is not running now."""
        if self.state not in OVER or self.last_result is None:
            return None
        return int(self.last_result["exit_code"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"exit_code": self.exit_code}


def read_status(url: str | Path) -> JobStatus:
    """Look at a job.

    Args:
        url: Root of the job, <out>/<job_id>.
    Raises:
        SpecError: There is no job.
    """
    store = open_store(url)
    record = read_json(store, JOB_KEY)
    if record is None:
        raise SpecError(f"{store.url}: no {JOB_KEY} here; name the job's own folder, <out>/<job_id>")
    replay = Replay(store, record["job_id"])
    result = read_json(store, RESULT_KEY)
    holder = read_holder(store)
    run = read_json(store, RUN_KEY) or record["input"]
    return JobStatus(
        job_id=record["job_id"],
        job_url=store.url,
        state=_state(store, holder, result),
        num_tasks=run["tasks"],
        num_succeeded=replay.ledger.num_succeeded,
        num_failed=replay.ledger.num_failed,
        num_rejected=replay.ledger.num_rejected,
        failures={kind: count for kind, count in replay.ledger.failures.items() if count},
        num_parts=replay.manifest.num_parts,
        num_unpublished=len(replay.unpublished) + len(replay.unpublished_quarantine),
        driver=holder,
        last_result=result,
        resume_command=run.get("resume_command"),
    )


def wait_for_end(
    url: str | Path,
    *,
    timeout_s: float | None = None,
    poll_s: float = 5.0,
    on_status: Callable[[JobStatus], None] | None = None,
) -> JobStatus | None:
    """Return the status when nothing drives the job any more; None when `timeout_s` has passed before.

    A driver on another machine that dies without a word looks alive until its lease runs out; this waits for one
    silent lease before it calls the job interrupted.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    patience = _patience_s(open_store(url))
    heard: tuple[object, object] | None = None
    heard_at = time.monotonic()
    while True:
        status = read_status(url)
        if on_status is not None:
            on_status(status)
        if status.state in OVER:
            return status
        now = time.monotonic()
        if status.driver is not None and (beat := (status.driver["epoch"], status.driver["beats"])) != heard:
            heard, heard_at = beat, now
        if heard is not None and now - heard_at > patience:
            return replace(status, state="interrupted")
        if deadline is not None and now >= deadline:
            return None
        time.sleep(poll_s if deadline is None else min(poll_s, max(0.05, deadline - now)))


def _state(store: ObjectStore, holder: dict[str, object] | None, result: dict[str, Any] | None) -> JobState:
    if holder is None:  # `_state/` was removed by a lifecycle rule, or no driver has come yet
        return "finished" if store.size(SUCCESS_KEY) is not None else "not_started"
    if not holder["released"]:
        owner = Owner(**{name: holder[name] for name in Owner.__dataclass_fields__})  # type: ignore[arg-type]
        if owner.is_dead(Owner.current()):
            return "interrupted"
        return "stopping" if is_stop_requested(store, int(str(holder["epoch"]))) else "running"
    if store.size(SUCCESS_KEY) is not None:
        return "finished"
    return "stopped" if result is None or result.get("is_resumable", True) else "failed"


def _patience_s(store: ObjectStore) -> float:
    record = read_json(store, JOB_KEY)
    return 2.0 * float(record["spec"]["limits"]["lease_ttl_s"]) if record is not None else 120.0

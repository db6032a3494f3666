"""What a driver is given and how a run ends: inputs, exit code, and the job's closing records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.object_store import ObjectStore
from jobs.accounting import Cause
from jobs.commit import MANIFEST, SUCCESS_KEY, write_card, write_result, write_success
from jobs.ledger import Ledger
from jobs.prompt_row import Rejected
from jobs.replay import Replay
from jobs.rows import JobFacts, rejected_id
from jobs.shards import PlannedTask
from workers.task import RenderResult

EXIT_DONE, EXIT_ITEMS_FAILED, EXIT_STOPPED = 0, 3, 4
SourceRow = PlannedTask | Rejected


@dataclass(frozen=True)
class JobInputs:
    """What is rendered. `source` is read once, lazily, and may be longer than memory."""

    facts: JobFacts
    source: Iterable[SourceRow]
    seed: int = 0
    allowed_failures: int = 0
    """So many failed or rejected items still count as success."""
    card: dict[str, str] = field(default_factory=dict)
    """Lines of the table in the job's README.md."""
    on_result: Callable[[RenderResult, int], None] | None = None
    """Told of every finished take and the shard that it came in, from the loop's thread; must be quick."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `epoch` is None if there was nothing to do, so that no lease was taken."""

    exit_code: int
    reason: str
    counts: dict[str, Any]
    gpu_seconds: dict[Cause, float] = field(default_factory=dict)
    held_s: float = 0.0
    run_succeeded: int = 0
    elapsed_s: float = 0.0
    epoch: int | None = None
    started_at: str = ""
    finished_at: str = ""

    @property
    def is_complete(self) -> bool:
        """Is every item succeeded or finally given up?"""
        return self.exit_code in (EXIT_DONE, EXIT_ITEMS_FAILED)


def id_of(row: SourceRow) -> str:
    """Id under which the ledger knows a task or a rejected line."""
    return rejected_id(row.line, row.kind) if isinstance(row, Rejected) else row.task_id


def exit_code(ledger: Ledger, allowed_failures: int) -> int:
    """Of a run that left nothing undone."""
    num_bad = ledger.num_failed + ledger.num_rejected
    return EXIT_DONE if num_bad <= allowed_failures else EXIT_ITEMS_FAILED


def is_closed(store: ObjectStore, replay: Replay) -> bool:
    """Has a run already written everything there is to write about these rows?"""
    is_published = not replay.unpublished and not replay.unpublished_quarantine
    return is_published and (replay.last_seq == 0 or store.size(SUCCESS_KEY) is not None)


def write_closing_records(store: ObjectStore, inputs: JobInputs, outcome: Outcome, num_parts: int) -> None:
    """`_SUCCESS` if the job is complete, `_result.json` and the card always. Call only while holding the job."""
    facts = inputs.facts
    if outcome.is_complete:
        write_success(
            store, facts.job_id, outcome.counts | {"num_parts": num_parts, "finished_at": outcome.finished_at}
        )
    result = asdict(outcome) | {
        "job_id": facts.job_id,
        "status": {EXIT_DONE: "succeeded", EXIT_ITEMS_FAILED: "items_failed", EXIT_STOPPED: "stopped"}.get(
            outcome.exit_code, "broken"
        ),
        "is_resumable": not outcome.is_complete,
        "manifest": f"{facts.store_url}/{MANIFEST}part-*.parquet",
        "code_version": facts.code_version,
        "render_fingerprint": facts.render_fingerprint,
    }
    write_result(store, result)
    counts = {name: str(count) for name, count in outcome.counts.items() if not isinstance(count, dict)}
    write_card(store, facts.job_id, inputs.card | counts)

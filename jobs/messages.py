"""What goes into the state machine besides the pool's own events, and what comes out: plain records."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.rows import AttemptFacts
from jobs.shards import PlannedTask
from workers.task import FailureKind, RenderResult, RenderTask


@dataclass(frozen=True, slots=True)
class TaskOffered:
    """A task that is not settled; `generation` counts how often it was reopened."""

    task: PlannedTask
    generation: int = 0


@dataclass(frozen=True, slots=True)
class SourceEnded:
    """No more tasks will be offered."""


@dataclass(frozen=True, slots=True)
class ActorSpawned:
    """A `Spawn` was carried out."""

    actor_id: str


@dataclass(frozen=True, slots=True)
class LinesRejected:
    """So many rejected lines of the list are on their way to the journal: rows that nobody renders."""

    count: int


@dataclass(frozen=True, slots=True)
class RowsCommitted:
    """So many of the rows of `CommitSuccess`, `CommitFailure` and `LinesRejected` are true now."""

    count: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Give out nothing more; end when nothing is in hand, at the latest after `grace_s`."""

    reason: str
    exit_code: int
    grace_s: float


OwnEvent = TaskOffered | LinesRejected | SourceEnded | ActorSpawned | RowsCommitted | StopRequested


@dataclass(frozen=True, slots=True)
class Spawn:
    avoid_nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Submit:
    actor_id: str
    call_id: str
    tasks: tuple[RenderTask, ...]


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take a call back, as far as it has not begun."""

    actor_id: str
    attempts: tuple[tuple[str, str], ...]
    """Task id and attempt of each."""


@dataclass(frozen=True, slots=True)
class Drain:
    actor_id: str


@dataclass(frozen=True, slots=True)
class Kill:
    actor_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class CommitSuccess:
    task: PlannedTask
    result: RenderResult
    attempt: AttemptFacts


@dataclass(frozen=True, slots=True)
class CommitFailure:
    task: PlannedTask
    kind: FailureKind
    message: str
    attempt: AttemptFacts


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over for this driver. `exit_code` 0 means that nothing is left to do, whatever the rows say."""

    exit_code: int
    reason: str


Command = Spawn | Submit | Withdraw | Drain | Kill | CommitSuccess | CommitFailure | Finish

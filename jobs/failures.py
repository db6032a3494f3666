"""What follows a failure: another try, when and how, or none; and when the whole job should stop. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

from jobs.limits import Limits
from workers.task import FailureKind, RenderFailure

INFRASTRUCTURE: frozenset[FailureKind] = frozenset({"upload", "actor_died", "preempted_exhausted"})
PREEMPTED = ("preempted", "node_lost", "unavailable", "killed")
"""Causes of a loss for which no task can be to blame."""
MAX_NAN_TRIES = 2  # once more in float32; the numbers of a third try would be the same
EXIT_BROKEN, EXIT_TEMPFAIL = 1, 75


@dataclass(slots=True)
class Tries:
    """What a task has been through under this driver."""

    number: int = 0
    """Attempts given out, any outcome; names the next one."""
    failures: int = 0
    kills: int = 0
    preemptions: int = 0
    rung: int = 0
    full_precision: bool = False
    wasted_s: float = 0.0

    def is_suspect(self) -> bool:
        """Was it in hand when an actor died? Then it shares no call with others."""
        return self.kills > 0


@dataclass(frozen=True, slots=True)
class TryAgain:
    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    kind: FailureKind
    message: str


Verdict = TryAgain | GiveUp


class RetryPolicy:
    """Counts a failure in `Tries` and answers what follows. Waits are drawn from (seed, task, try), so they repeat."""

    def __init__(self, limits: Limits, seed: int) -> None:
        self._limits = limits
        self._seed = seed

    def after_failure(self, task_id: str, tries: Tries, failure: RenderFailure) -> Verdict:
        """The actor lives and says what went wrong."""
        tries.wasted_s += failure.gpu_s
        if failure.kind == "preempted_exhausted" and failure.retryable:  # it was told to end; nothing went wrong
            return self.after_preemption(tries, failure.message)
        tries.failures += 1
        if not failure.retryable:
            return GiveUp(failure.kind, failure.message)
        if failure.kind == "oom":
            return self._down_the_ladder(task_id, tries, failure.message)
        tries.full_precision = tries.full_precision or failure.kind == "nan"
        most = min(self._limits.attempts, MAX_NAN_TRIES) if failure.kind == "nan" else self._limits.attempts
        if tries.failures >= most:
            return GiveUp(failure.kind, f"{failure.message} (try {tries.failures} of {most})")
        return TryAgain(self._delay(task_id, tries.failures))

    def after_kill(self, task_id: str, tries: Tries, *, out_of_memory: bool, detail: str) -> Verdict:
        """Its actor died while the task may have been running; alone it is known to be the cause."""
        was_alone = self.must_be_alone(tries)
        tries.kills += 1
        if was_alone:
            kind: FailureKind = "oom" if out_of_memory else "actor_died"
            return GiveUp(kind, f"{tries.kills} actors died with this task, the last one with nothing else: {detail}")
        if out_of_memory:
            tries.rung = min(tries.rung + 1, self._limits.ladder_rungs)
        return TryAgain(self._delay(task_id, tries.kills))

    def after_preemption(self, tries: Tries, detail: str) -> Verdict:
        """The machine went away; nobody's fault."""
        tries.preemptions += 1
        if tries.preemptions > self._limits.preemptions:
            return GiveUp("preempted_exhausted", f"{tries.preemptions} machines went away under this task: {detail}")
        return TryAgain(0.0)

    def must_be_alone(self, tries: Tries) -> bool:
        """Only on an actor that has nothing else in hand, so that its next victim proves its guilt."""
        return tries.kills >= self._limits.kills

    def _down_the_ladder(self, task_id: str, tries: Tries, message: str) -> Verdict:
        if tries.rung >= self._limits.ladder_rungs:
            return GiveUp("oom", f"{message} (on the last of {self._limits.ladder_rungs} rungs)")
        tries.rung += 1
        return TryAgain(self._delay(task_id, 1))

    def _delay(self, task_id: str, count: int) -> float:
        most = min(self._limits.max_backoff_s, self._limits.backoff_s * 2.0 ** (count - 1))
        return most * random.Random(f"{self._seed}/{task_id}/{count}").uniform(0.5, 1.0)


@dataclass
class CircuitBreaker:
    """Stops a job in which every item fails in the same way: the first few, or many in a row later."""

    limits: Limits
    num_failed: int = 0
    any_success: bool = False
    _run_kind: str = ""
    _run: int = 0

    def succeeded(self) -> None:
        self.any_success = True
        self._run = 0

    def gave_up(self, kind: FailureKind, message: str) -> tuple[int, str] | None:
        """Count a task that was given up; exit code and reason if the job should stop."""
        self.num_failed += 1
        self._run = self._run + 1 if kind == self._run_kind else 1
        self._run_kind = kind
        code = EXIT_TEMPFAIL if kind in INFRASTRUCTURE else EXIT_BROKEN
        is_all_there_is = not self.any_success and self._run == self.num_failed
        most = (
            min(self.limits.first_failures, self.limits.same_failures) if is_all_there_is else self.limits.same_failures
        )
        if self._run >= most:
            return code, f"{self._run} items in a row failed in the same way ({kind}); the last one: {message}"
        if self.limits.max_failures is not None and self.num_failed >= self.limits.max_failures:
            return EXIT_BROKEN, f"{self.num_failed} items failed, as many as limits.max_failures allows"
        return None

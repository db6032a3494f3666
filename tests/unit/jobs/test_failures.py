"""What follows a failure, rule by rule; whole runs with failures are in test_state.py."""

from __future__ import annotations

from jobs.failures import GiveUp, RetryPolicy, Tries, TryAgain
from jobs.limits import Limits
from tests.render_rows import failure_of, planned

TASK = planned("take").attempt("e1a1")


def test_a_drained_take_spends_the_preemption_budget_and_not_its_attempts() -> None:
    policy, tries = RetryPolicy(Limits(attempts=1, preemptions=2), seed=0), Tries()
    drained = failure_of(TASK, kind="preempted_exhausted", retryable=True, gpu_s=2.0)
    assert isinstance(policy.after_failure("take-0", tries, drained), TryAgain)
    assert isinstance(policy.after_failure("take-0", tries, drained), TryAgain)
    assert (tries.failures, tries.preemptions, tries.wasted_s) == (0, 2, 4.0)
    verdict = policy.after_failure("take-0", tries, drained)
    assert isinstance(verdict, GiveUp)
    assert verdict.kind == "preempted_exhausted"


def test_waits_grow_with_jitter_and_repeat_for_the_same_seed() -> None:
    def waits(seed: int) -> list[float]:
        policy, tries = RetryPolicy(Limits(attempts=6, backoff_s=1.0, max_backoff_s=100.0), seed), Tries()
        verdicts = [policy.after_failure("take-0", tries, failure_of(TASK, kind="upload")) for _ in range(5)]
        return [verdict.delay_s for verdict in verdicts if isinstance(verdict, TryAgain)]

    first = waits(1)
    assert len(first) == 5
    assert all(0.5 * 2**n <= wait <= 2**n for n, wait in enumerate(first))
    assert first == waits(1)
    assert first != waits(2)


def test_after_a_nan_one_more_attempt_is_made_in_full_precision() -> None:
    policy, tries = RetryPolicy(Limits(attempts=5), seed=0), Tries()
    nan = failure_of(TASK, kind="nan", retryable=True)
    assert not tries.full_precision
    assert isinstance(policy.after_failure("take-0", tries, nan), TryAgain)
    assert tries.full_precision
    assert planned("take").attempt("e1a2", full_precision=tries.full_precision).full_precision
    assert isinstance(policy.after_failure("take-0", tries, nan), GiveUp)

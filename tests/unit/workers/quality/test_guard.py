"""The guard's decisions, from estimates alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.attention.dense import DenseAttention
from workers.config import GuardConfig
from workers.contracts import AttentionPolicy
from workers.quality.guard import Decision, GuardState, RecallGuard, decide, weigh_dense

FLOOR = 0.85
recalls = st.one_of(st.floats(0.0, 1.0), st.just(math.nan))


def run(*estimates: float, state: GuardState | None = None) -> list[Decision]:
    """Decisions over chunks."""
    state, decisions = state or GuardState(), []
    for estimate in estimates:
        decisions.append(decide(state, estimate, FLOOR))
        state = decisions[-1].state
    return decisions


def test_above_the_floor_nothing_happens() -> None:
    assert [decision.action for decision in run(0.85, 0.9, 1.0)] == [None] * 3
    assert run(0.9)[0].state.factor == 1


def test_below_the_floor_the_following_chunks_are_tighter() -> None:
    decision = run(0.8)[0]
    assert (decision.action, decision.render_dense, decision.state.factor) == ("tightened", False, 1.5)


def test_still_below_after_tightening_the_chunk_is_rendered_again() -> None:
    decisions = run(0.8, 0.7, 0.6)
    assert [decision.render_dense for decision in decisions] == [False, True, True]
    assert decisions[-1].state.factor == 1.5**3


def test_a_good_chunk_between_two_bad_ones_means_that_tightening_helped() -> None:
    assert [decision.render_dense for decision in run(0.8, 0.86, 0.8, 0.86)] == [False] * 4


def test_without_gain_no_chunk_is_rendered_again_until_recall_comes_back() -> None:
    state = weigh_dense(run(0.8, 0.7)[-1].state, 0.7, 0.705)
    assert state.is_dense_futile
    assert not any(decision.render_dense for decision in run(0.7, 0.7, 0.7, state=state))
    assert [d.render_dense for d in run(0.7, 0.9, 0.7, 0.7, state=state)] == [False, False, False, True]
    assert not weigh_dense(state, 0.7, 0.95).is_dense_futile


def test_it_relaxes_slowly_and_only_well_above_the_floor() -> None:
    state = GuardState(level=2)
    assert [decision.action for decision in run(*[0.95] * 16, state=state)] == ([None] * 7 + ["relaxed"]) * 2
    assert not any(decision.action for decision in run(*[0.87] * 40, state=state))
    broken = run(*[0.95] * 7, 0.87, *[0.95] * 7, state=state)
    assert not any(decision.action for decision in broken)


@given(st.lists(recalls, max_size=60))
def test_the_factor_stays_in_its_range_and_an_action_changes_it(estimates: list[float]) -> None:
    state = GuardState()
    for estimate, decision in zip(estimates, run(*estimates), strict=True):
        change = decision.state.level - state.level
        assert 0 <= decision.state.level <= 8
        assert {None: 0, "tightened": 1, "relaxed": -1}[decision.action] == change
        assert not (decision.render_dense and estimate >= FLOOR)
        if math.isnan(estimate):
            assert decision == Decision(state)
        state = decision.state


@dataclass
class Script:
    """Estimates in order, one for each rendering."""

    estimates: list[float]

    def take(self) -> float:
        return self.estimates.pop(0)


@dataclass
class Part:
    """Can be tightened."""

    factors: list[float] = field(default_factory=list)

    def tighten(self, factor: float) -> None:
        self.factors.append(factor)


@dataclass
class Rolling:
    policy: AttentionPolicy


def test_a_take_is_judged_tightened_rendered_densely_and_begins_anew() -> None:
    sparse, dense, part = DenseAttention(), DenseAttention(), Part()
    rolling, script = Rolling(sparse), Script([0.95, 0.6, 0.7, 0.99, 0.9])
    guard = RecallGuard(GuardConfig(enabled=True), script, rolling, dense, [part])
    seen = []
    for _ in range(4):
        guard.begin_chunk()
        assert rolling.policy is sparse
        while guard.wants_again():
            assert rolling.policy is dense
        seen.append((guard.recall, guard.action, rolling.policy is dense))
    assert seen == [(0.95, None, False), (0.6, "tightened", False), (0.99, "dense", True), (0.9, None, False)]
    assert part.factors == [1, 1.5, 2.25]
    assert (guard.num_tightened, guard.num_dense_chunks) == (2, 1)
    RecallGuard(GuardConfig(enabled=True), script, rolling, dense, [part])
    assert part.factors[-1] == 1


def test_what_was_not_estimated_is_not_reported() -> None:
    guard = RecallGuard(
        GuardConfig(enabled=True), Script([math.nan, 0.5]), Rolling(DenseAttention()), DenseAttention(), []
    )
    guard.begin_chunk()
    assert not guard.wants_again()
    assert guard.chunk_facts() == {"recall": None, "guard": None}
    guard.begin_chunk()
    guard.wants_again()
    assert guard.chunk_facts() == {"recall": pytest.approx(0.5), "guard": "tightened"}

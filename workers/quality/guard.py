"""The quality guard: acts on the estimated attention recall of each chunk while a take is rendered.

A chunk below the floor makes the following ones attend and remember more (`Tightens`). If the next one is still below,
it is rendered again with dense attention over what the cache holds, before it becomes history. Well above the floor the
guard slowly gives the savings back. `decide` is pure: the state and an estimate in, the new state and an action out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from workers.config import GuardConfig
from workers.contracts import AttentionPolicy, Tightens
from workers.task import GuardAction

logger = logging.getLogger(__name__)

_STEP = 1.5  # how much tighter at a time: a density of 0.3 is 1 after three steps
_MAX_LEVEL = 8  # a merge threshold of 0.9 has come to 0.996: more finds nothing to merge
_ROOM = 0.05  # this far above the floor the guard may give back; nearer to it, it would only swing
_RELAX_AFTER = 8  # chunks well above the floor in a row; each step back is a risk, each step on a need
_LEAST_GAIN = 0.01  # of dense attention: with less, what is missing is no longer in the cache


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers from one chunk to the next."""

    level: int = 0
    """Steps by which policy and cache are tighter than configured."""
    was_below: bool = False
    """The chunk before was below the floor, so this one was rendered tighter."""
    num_good: int = 0
    """Chunks well above the floor in a row."""
    is_dense_futile: bool = False
    """The last chunk that was rendered again did not gain by it, and none has been above the floor since."""

    @property
    def factor(self) -> float:
        """For `Tightens`."""
        return _STEP**self.level


@dataclass(frozen=True)
class Decision:
    """What follows from one estimate."""

    state: GuardState
    action: GuardAction | None = None
    render_dense: bool = False
    """The chunk in hand is to be rendered again."""


def decide(state: GuardState, recall: float, floor: float) -> Decision:
    """What to do after a chunk was rendered as configured.

    Args:
        state: After the chunk before.
        recall: Estimate for this chunk, in [0, 1]; NaN if there is none, and then nothing changes.
        floor: Lowest recall that is accepted.
    """
    if math.isnan(recall):
        return Decision(state)
    if recall < floor:
        level = min(_MAX_LEVEL, state.level + 1)
        action: GuardAction | None = "tightened" if level > state.level else None
        render_dense = state.was_below and not state.is_dense_futile
        return Decision(replace(state, level=level, was_below=True, num_good=0), action, render_dense)
    num_good = state.num_good + 1 if recall >= floor + min(_ROOM, (1 - floor) / 2) else 0
    if state.level > 0 and num_good >= _RELAX_AFTER:
        return Decision(GuardState(state.level - 1), "relaxed")
    return Decision(GuardState(state.level, num_good=num_good))


def weigh_dense(state: GuardState, recall: float, dense_recall: float) -> GuardState:
    """The state after a chunk was rendered again, given its recall before and now."""
    return replace(state, is_dense_futile=not dense_recall >= recall + _LEAST_GAIN)


class Attends(Protocol):
    """Whose policy the guard may exchange."""

    policy: AttentionPolicy


class EstimatesRecall(Protocol):
    """A probe that is asked once after each rendering of a chunk."""

    def take(self) -> float:
        """Mean recall since this was last asked; NaN if nothing was seen."""
        ...


class RecallGuard:
    """Guards one take; begins with everything as configured.

    Args:
        config: Its floor.
        probe: Looks on in `attention`.
        attention: Of the rollout.
        dense: Policy for chunks that are rendered again.
        parts: The policy and the cache, or whatever of them can be tightened.
    """

    def __init__(
        self,
        config: GuardConfig,
        probe: EstimatesRecall,
        attention: Attends,
        dense: AttentionPolicy,
        parts: Sequence[Tightens],
    ) -> None:
        self.state = GuardState()
        self.recall = math.nan
        """Of the newest chunk, as it was delivered."""
        self.action: GuardAction | None = None
        """What the newest chunk led to."""
        self.num_tightened = self.num_dense_chunks = 0
        self._floor, self._probe, self._parts = config.floor, probe, parts
        self._attention, self._policy, self._dense = attention, attention.policy, dense
        self._is_dense = False
        self._tighten()

    def begin_chunk(self) -> None:
        """The next chunk is rendered as configured."""
        self._attention.policy, self._is_dense, self.action = self._policy, False, None

    def wants_again(self) -> bool:
        """Whether the chunk that was just denoised is to be denoised once more; then densely."""
        before, self.recall = self.recall, self._probe.take()
        if self._is_dense:
            self.state = weigh_dense(self.state, before, self.recall)
            logger.info("guard: recall %.3f, dense %.3f", before, self.recall)
            return False
        decision = decide(self.state, self.recall, self._floor)
        self.state, self.action = decision.state, decision.action
        if decision.action is not None:
            self._tighten()
            self.num_tightened += decision.action == "tightened"
            logger.info("guard: recall %.3f, %s to %.2f", self.recall, decision.action, self.state.factor)
        if decision.render_dense:
            self._attention.policy, self._is_dense, self.action = self._dense, True, "dense"
            self.num_dense_chunks += 1
        return decision.render_dense

    def chunk_facts(self) -> dict[str, object]:
        """Of the newest chunk, for its ChunkMetrics."""
        return {"recall": None if math.isnan(self.recall) else self.recall, "guard": self.action}

    def _tighten(self) -> None:
        for part in self._parts:
            part.tighten(self.state.factor)

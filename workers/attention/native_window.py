"""What published streaming models see: the sink and the newest keys, so many in all, the chunk's own included.

Needed where the number of own keys changes from call to call, as in a rolling window: then the cache alone cannot say
how many of its keys a call may see. The cache holds at least that many; this policy takes what fits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.contracts import AttentionPlan, KeyValues, Moment, PlanPart


@dataclass(frozen=True)
class NativeWindow:
    """The window of a published model, in tokens."""

    attended_tokens: int
    """Keys that a query sees at most, its own chunks included."""
    sink_tokens: int = 0
    """First keys of the rollout, seen besides the newest ones."""
    clean_pass_sees_sink: bool = True
    """False: a clean pass sees the newest keys alone, the sink only while it is among them (Rolling-Forcing)."""

    def __post_init__(self) -> None:
        if not 0 <= self.sink_tokens < self.attended_tokens:
            raise ValueError(f"sink_tokens {self.sink_tokens} must be in [0, attended_tokens {self.attended_tokens})")


class NativeWindowAttention:
    """Sink, newest keys and own keys, all dense.

    Args:
        window: How much is seen.
    """

    def __init__(self, window: NativeWindow) -> None:
        self._window = window

    def begin_chunk(self, position_Q3: Tensor) -> None:
        """Nothing is shared among steps."""

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        num_cached = 0 if cached is None else cached.num_tokens
        sink = self._window.sink_tokens
        if moment.is_clean_pass and not self._window.clean_pass_sees_sink:
            sink = 0
        sink = min(sink, num_cached)
        recent = max(0, min(num_cached - sink, self._window.attended_tokens - own.num_tokens - sink))
        parts = (
            PlanPart("cached", 0, sink),
            PlanPart("cached", num_cached - recent, num_cached),
            PlanPart("own", 0, own.num_tokens),
        )
        return AttentionPlan(tuple(part for part in parts if part.stop > part.start))

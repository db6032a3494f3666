"""Every query attends to every key that exists: the reference for all other policies."""

from __future__ import annotations

from torch import Tensor

from workers.contracts import AttentionPlan, KeyValues, Moment, PlanPart


class DenseAttention:
    """The cached keys and the chunk's own, whole."""

    def begin_chunk(self, position_Q3: Tensor) -> None:
        """Nothing is shared among steps."""

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        return plan_dense(cached, own)


def plan_dense(cached: KeyValues | None, own: KeyValues) -> AttentionPlan:
    """All keys for all queries."""
    parts = [PlanPart("own", 0, own.num_tokens)]
    if cached is not None:
        parts.insert(0, PlanPart("cached", 0, cached.num_tokens))
    return AttentionPlan(tuple(parts))

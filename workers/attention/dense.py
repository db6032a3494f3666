"""Every query attends to every key that exists: the reference for all other policies."""

from __future__ import annotations

from torch import Tensor

from workers.contracts import AttentionPlan, KeyValues


class DenseAttention:
    """The cached keys and the chunk's own, whole."""

    def plan(self, layer_index: int, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues) -> AttentionPlan:
        return AttentionPlan((own,) if cached is None else (cached, own))

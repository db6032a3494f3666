"""Which calls a sparse policy is given: the first denoising steps and the layers that show no sparsity stay dense.

Source: FAST-AR (arXiv 2602.01801), section 6.1: dense in the first 30% of the steps, sparse in about 70% of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from workers.attention.dense import plan_dense
from workers.contracts import (
    AttentionPlan,
    AttentionPolicy,
    KeyValues,
    Moment,
    PlansAfterRope,
    PromptAttention,
    PromptKeys,
    Tightens,
)


@dataclass(frozen=True)
class Gate:
    """Which calls of which layers stay dense.

    The floor(share * steps) first steps of each chunk do. The clean pass counts as the last step, so it does only if
    all steps do.
    """

    dense_step_share: float
    """In [0, 1]."""
    sparse_layers: Collection[int] | None = None
    """None means all."""

    def is_dense(self, layer_index: int, moment: Moment) -> bool:
        if self.sparse_layers is not None and layer_index not in self.sparse_layers:
            return True
        step = moment.num_steps - 1 if moment.is_clean_pass else moment.step_index
        # A share such as 0.3 of 10 steps is 3, not the 2 that rounding in binary would make of it.
        return step < math.floor(self.dense_step_share * moment.num_steps + 1e-9)


class GatedPromptAttention:
    """A choice of prompt rows in some steps and layers, all rows in the others.

    Args:
        policy: Asked where it is not dense.
        dense: All rows.
        gate: Where that is. The steps are heard of through `follow`, before each call.
    """

    def __init__(self, policy: PromptAttention, dense: PromptAttention, gate: Gate) -> None:
        self._policy, self._dense, self._gate = policy, dense, gate
        self._moment: Moment | None = None

    def follow(self, moment: Moment) -> None:
        """See `FollowsCalls`."""
        self._moment = moment

    def __call__(self, layer_index: int, q_BQND: Tensor, keys: PromptKeys) -> Tensor:
        assert self._moment is not None, "whoever calls the model announces each call first"
        is_dense = self._gate.is_dense(layer_index, self._moment)
        return (self._dense if is_dense else self._policy)(layer_index, q_BQND, keys)


class GatedAttention:
    """A policy in some steps and layers, dense in the others.

    Args:
        policy: Asked where it is not dense.
        dense_step_share: As of a `Gate`.
        sparse_layers: Layers that are given to the policy; None means all.
    """

    def __init__(
        self, policy: AttentionPolicy, *, dense_step_share: float, sparse_layers: Collection[int] | None = None
    ) -> None:
        self._policy = policy
        self._gate = Gate(dense_step_share, sparse_layers)
        if isinstance(policy, PlansAfterRope):
            self.plans_after_rope = policy.plans_after_rope

    def begin_chunk(self, position_Q3: Tensor) -> None:
        self._policy.begin_chunk(position_Q3)

    def tighten(self, factor: float) -> None:
        """See `Tightens`; passed on to a policy that can."""
        if isinstance(self._policy, Tightens):
            self._policy.tighten(factor)

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        if self.is_dense(layer_index, moment):
            return plan_dense(cached, own)
        return self._policy.plan(layer_index, moment, q_BQND, cached, own)

    def is_dense(self, layer_index: int, moment: Moment) -> bool:
        return self._gate.is_dense(layer_index, moment)

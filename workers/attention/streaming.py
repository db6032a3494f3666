"""Sink and window as a policy: the cache may hold more, queries see its first and newest keys only.

The cache `window` forgets the rest; this policy does not, so both can be compared on one cache, and calls that are to
stay dense still find the whole history. Source: StreamingLLM (arXiv 2309.17453), section 3.2; for video each chunk
takes the place of a token. Positions stay as they were made (the paper counts them within the window): the models
here are trained with absolute time, and re-indexing is a setting of its own.
"""

from __future__ import annotations

from torch import Tensor

from workers.attention.history import DenseRegion, plan_history
from workers.contracts import AttentionPlan, KeyValues, Moment


class StreamingAttention:
    """The cached keys of the sink, the newest ones and the chunk's own.

    Args:
        dense: What is seen.
    """

    def __init__(self, dense: DenseRegion) -> None:
        self._dense = dense

    def begin_chunk(self, position_Q3: Tensor) -> None:
        """Nothing is shared among steps."""

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        if cached is None:
            return plan_history(cached, own, None, None)
        return plan_history(cached, own, self._dense.history(cached.num_tokens), None)

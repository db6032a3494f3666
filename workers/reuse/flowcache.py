"""FlowCache's feature reuse: each chunk decides for itself which of its denoising steps are spared.

Source: Ma et al., "Flow Caching for Autoregressive Video Generation" (arXiv 2602.10825): the policy of a chunk looks at
the relative L1 change of that chunk's embedded latents between its steps, without a fitted polynomial, and does not
begin before a few warm-up steps of the chunk are done. Its other half, the compressed cache, is `cache/flow.py`.

Adapted to chunk-causal models: one call holds one chunk, so the decision for a chunk is the decision for the call.
"""

from __future__ import annotations

from torch import Tensor

from workers.reuse.teacache import TeaCache


class FlowReuse(TeaCache):
    """As `TeaCache`, but looking at the embedded latents; set with the identity as polynomial and its own warm-up."""

    def recall(self, x_BQE: Tensor, modulated_BQE: Tensor) -> Tensor | None:
        if self._moment.is_clean_pass:
            return None
        return self._decide(x_BQE)

"""Exact composition: attention over disjoint sets of keys, computed apart and merged by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from workers.contracts import Attended, KernelPart, KeyValues, TiledKeys


def merge(out_a_BQND: Tensor, lse_a_BQN: Tensor, out_b_BQND: Tensor, lse_b_BQN: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    Associative and commutative up to rounding. A side with lse -inf saw no key and counts for nothing; if both are,
    so is the union.
    """
    lse_BQN = torch.logaddexp(lse_a_BQN, lse_b_BQN)
    some_BQN = lse_BQN.masked_fill(lse_BQN.isneginf(), 0.0)
    share_b_BQN1 = torch.exp(lse_b_BQN - some_BQN).unsqueeze(-1).to(out_a_BQND.dtype)
    return torch.lerp(out_a_BQND, out_b_BQND, share_b_BQN1), lse_BQN


def attend_parts(
    attend_dense: Callable[[Tensor, KeyValues], tuple[Tensor, Tensor]],
    attend_tiled: Callable[[Tensor, TiledKeys], tuple[Tensor, Tensor]],
    q_BQND: Tensor,
    parts: tuple[KernelPart, ...],
) -> tuple[Tensor, Tensor]:
    """Run a kernel for one set of keys on each part, and merge."""

    def attend(part: KernelPart) -> tuple[Tensor, Tensor]:
        if isinstance(part, Attended):
            return part
        return attend_tiled(q_BQND, part) if isinstance(part, TiledKeys) else attend_dense(q_BQND, part)

    results = [attend(part) for part in parts]
    out_BQND, lse_BQN = results[0]
    for out_b_BQND, lse_b_BQN in results[1:]:
        out_BQND, lse_BQN = merge(out_BQND.to(lse_BQN.dtype), lse_BQN, out_b_BQND.to(lse_BQN.dtype), lse_b_BQN)
    return out_BQND.to(q_BQND.dtype), lse_BQN

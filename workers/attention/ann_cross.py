"""AnnCA: a prompt token is left out of a step as long as no query of the chunk falls into its bucket.

Source: FAST-AR (arXiv 2602.01801), section 5.3. Heads choose for themselves; a hidden token stays in its place with a
bias of -inf, so that all tensors stay rectangular and nothing waits for the device. So this saves attention mass, not
time: cross-attention is a few percent of a step, and folded padding (one row with log m) has already taken most of it.
Steps choose anew: on the bundled model a choice kept for a chunk would miss 8% of the rows that its later steps keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import PromptKeys
from workers.search.protocol import Search, bucketer

_FEW_ROWS = 64
"""On a CPU so few rows are attended by plain products: what a fused kernel costs by itself is twice as much."""
_PROMPTS_KEPT = 2
"""Of a layer: the prompt and the negative prompt take turns."""


@dataclass(frozen=True, eq=False)
class _Rows:
    """What is known of one prompt in one layer."""

    k_BPND: Tensor
    """Kept, so that its identity is not given to another."""
    bucket_of: Callable[[Tensor], Tensor]
    code_BNP: Tensor
    bias_B1P: Tensor
    exists_B1P: Tensor
    stays_B1P: Tensor | None
    """Folded padding."""
    num_existing: Tensor


class AnnPromptAttention:
    """The `PromptAttention` of one take.

    Args:
        search: Makes the buckets.
        num_buckets: For each head; a power of two where the search is by sign bits.
    """

    def __init__(self, search: Search, num_buckets: int) -> None:
        self._search, self._num_buckets = search, num_buckets
        self._density_sum, self._num_calls = torch.zeros(()), 0
        self._rows: dict[int, list[_Rows]] = {}

    def __call__(self, layer_index: int, q_BQND: Tensor, keys: PromptKeys) -> Tensor:
        rows = self._find_rows(layer_index, keys)
        q, k, v = (x.transpose(1, 2) for x in (q_BQND, keys.k_BPND, keys.v_BPND))
        is_plain = q.is_cpu and k.shape[2] <= _FEW_ROWS and q.dtype in (torch.float32, torch.float64)
        logit_BNQP = (q @ k.mT).mul_(1 / math.sqrt(q.shape[-1])) if is_plain else None
        kept_BNP = self._keep(q, k, rows, logit_BNQP)
        self._density_sum = self._density_sum + (kept_BNP & rows.exists_B1P).sum() / rows.num_existing
        self._num_calls += 1
        bias_BN1P = rows.bias_B1P.masked_fill(~kept_BNP, -torch.inf)[:, :, None]
        if logit_BNQP is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BN1P)
        else:
            out = logit_BNQP.add_(bias_BN1P).softmax(-1) @ v
        if keys.k_image_BPND is not None and keys.v_image_BPND is not None:
            k_image, v_image = keys.k_image_BPND.transpose(1, 2), keys.v_image_BPND.transpose(1, 2)
            out = out + F.scaled_dot_product_attention(q, k_image, v_image)
        return out.transpose(1, 2)

    def keep(self, layer_index: int, q_BQND: Tensor, keys: PromptKeys) -> Tensor:
        """Which tokens are seen, kept_BNP: those in the bucket of a query, folded padding, and always at least one."""
        rows = self._find_rows(layer_index, keys)
        return self._keep(q_BQND.transpose(1, 2), keys.k_BPND.transpose(1, 2), rows, None)

    def take_density(self) -> float:
        """Tokens kept over all, mean of the calls since this was last asked; 1 without any. Waits for the device."""
        density = float(self._density_sum) / self._num_calls if self._num_calls else 1.0
        self._density_sum, self._num_calls = torch.zeros(()), 0
        return density

    def _keep(self, q_BNQD: Tensor, k_BNPD: Tensor, rows: _Rows, logit_BNQP: Tensor | None) -> Tensor:
        is_used = torch.zeros((*k_BNPD.shape[:2], self._num_buckets), dtype=torch.bool, device=k_BNPD.device)
        kept_BNP = is_used.scatter_(-1, rows.bucket_of(q_BNQD), True).gather(-1, rows.code_BNP)
        # The token that the mean query likes best stays, whatever the buckets say.
        if logit_BNQP is None:
            liking_BNP = (k_BNPD.float() @ q_BNQD.float().mean(2)[..., None])[..., 0]
        else:
            liking_BNP = logit_BNQP.mean(2)
        if rows.stays_B1P is not None:
            liking_BNP = liking_BNP.masked_fill(~rows.exists_B1P, -torch.inf)
            kept_BNP |= rows.stays_B1P
        return kept_BNP.scatter_(-1, liking_BNP.argmax(-1, keepdim=True), True)

    def _find_rows(self, layer_index: int, keys: PromptKeys) -> _Rows:
        """The same in all steps, so made once for each of the last prompts."""
        known = self._rows.setdefault(layer_index, [])
        for rows in known:
            if rows.k_BPND is keys.k_BPND:
                return rows
        known.append(self._make_rows(keys))
        del known[:-_PROMPTS_KEPT]
        return known[-1]

    def _make_rows(self, keys: PromptKeys) -> _Rows:
        k_BNPD, mass = keys.k_BPND.transpose(1, 2), keys.log_mass_BP
        bucket_of = bucketer(self._search, self._num_buckets, k_BNPD)
        bias_B1P = k_BNPD.new_zeros(k_BNPD[:, :1, :, 0].shape) if mass is None else mass.to(k_BNPD.dtype)[:, None]
        exists_B1P = ~bias_B1P.isneginf()
        stays_B1P = None if mass is None else (mass > 0)[:, None]
        num_existing = exists_B1P.sum() * k_BNPD.shape[1]
        return _Rows(keys.k_BPND, bucket_of, bucket_of(k_BNPD), bias_B1P, exists_B1P, stays_B1P, num_existing)

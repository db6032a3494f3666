"""AnnCA: a prompt token is left out of a step as long as no query of the chunk falls into its bucket.

Source: FAST-AR (arXiv 2602.01801), section 5.3. Heads choose for themselves; a hidden token stays in its place with a
bias of -inf, so that all tensors stay rectangular and nothing waits for the device. So this saves attention mass, not
time: cross-attention is a few percent of a step, and folded padding (one row with log m) has already taken most of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import PromptKeys
from workers.search.protocol import Search


class AnnPromptAttention:
    """The `PromptAttention` of one take.

    Args:
        search: Makes the buckets.
        num_buckets: For each head; a power of two where the search is by sign bits.
    """

    def __init__(self, search: Search, num_buckets: int) -> None:
        self._search, self._num_buckets = search, num_buckets
        self._density_sum, self._num_calls = torch.zeros(()), 0
        self._key_codes: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer_index: int, q_BQND: Tensor, keys: PromptKeys) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BQND, keys.k_BPND, keys.v_BPND))
        bias_BP = torch.zeros_like(k[:, 0, :, 0]) if keys.log_mass_BP is None else keys.log_mass_BP.to(q.dtype)
        kept_BNP = self.keep(q, k, keys.log_mass_BP, self._key_code(layer_index, keys.k_BPND))
        exists_BP = ~bias_BP.isneginf()
        density = (kept_BNP & exists_BP[:, None]).float().mean() / exists_BP.float().mean()
        self._density_sum, self._num_calls = self._density_sum + density, self._num_calls + 1
        bias_BN1P = bias_BP[:, None].masked_fill(~kept_BNP, -torch.inf)[:, :, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BN1P)
        if keys.k_image_BPND is not None and keys.v_image_BPND is not None:
            k_image, v_image = keys.k_image_BPND.transpose(1, 2), keys.v_image_BPND.transpose(1, 2)
            out = out + F.scaled_dot_product_attention(q, k_image, v_image)
        return out.transpose(1, 2)

    def keep(
        self, q_BNQD: Tensor, k_BNPD: Tensor, log_mass_BP: Tensor | None, key_code: Tensor | None = None
    ) -> Tensor:
        """Which tokens are seen, kept_BNP: those in the bucket of a query, folded padding, and always at least one."""
        query_code = self._search.buckets(q_BNQD, self._num_buckets, k_BNPD)
        if key_code is None:
            key_code = self._search.buckets(k_BNPD, self._num_buckets, k_BNPD)
        is_used = torch.zeros((*k_BNPD.shape[:2], self._num_buckets), dtype=torch.bool, device=k_BNPD.device)
        is_used.scatter_(-1, query_code, True)
        kept_BNP = is_used.gather(-1, key_code)
        # The token that the mean query likes best stays, whatever the buckets say.
        liking_BNP = (k_BNPD.float() @ q_BNQD.float().mean(2)[..., None])[..., 0]
        if log_mass_BP is not None:
            liking_BNP = liking_BNP.masked_fill(log_mass_BP.isneginf()[:, None], -torch.inf)
            kept_BNP = kept_BNP | (log_mass_BP > 0)[:, None]
        return kept_BNP.scatter(-1, liking_BNP.argmax(-1, keepdim=True), True)

    def take_density(self) -> float:
        """Tokens kept over all, mean of the calls since this was last asked; 1 without any. Waits for the device."""
        density = float(self._density_sum) / self._num_calls if self._num_calls else 1.0
        self._density_sum, self._num_calls = torch.zeros(()), 0
        return density

    def _key_code(self, layer_index: int, k_BPND: Tensor) -> Tensor:
        """Buckets of a prompt's keys: the same in all steps, so found once per prompt (the last one asked about)."""
        known = self._key_codes.get(layer_index)
        if known is None or known[0] is not k_BPND:
            k_BNPD = k_BPND.transpose(1, 2)
            known = self._key_codes[layer_index] = k_BPND, self._search.buckets(k_BNPD, self._num_buckets, k_BNPD)
        return known[1]

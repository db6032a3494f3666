"""Sign bits of a random projection: the share of equal bits tells the angle between two vectors.

The projection is drawn from a fixed seed for each head dimension, orthogonal in turns of D bits, which tells angles
better than independent directions do. Source: Charikar 2002 (sign bits), Ji et al. 2012 (orthogonal turns).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from workers.search.protocol import Nearest, best_keys, rescore
from workers.search.quant import multiply_codes

_SEED = 2602
_NUM_CANDIDATES = 16  # bits tell an angle roughly: the best few are compared exactly


class LshSearch:
    """Sign bits.

    Args:
        num_bits: For `top1` and `similarity`; buckets take log2 of their number.
    """

    def __init__(self, num_bits: int = 128) -> None:
        if num_bits < 1:
            raise ValueError(f"num_bits: {num_bits} is not at least 1")
        self._num_bits = num_bits

    @property
    def name(self) -> str:
        return "lsh"

    def top1(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Nearest:
        query, key = self._signs(query_BNQD), self._signs(key_BNKD)

        def score(queries: slice, keys: slice) -> Tensor:
            return multiply_codes(query[:, :, queries], key[:, :, keys])

        batch, heads, num_queries = query.shape[:3]
        index = best_keys(score, batch * heads, num_queries, key.shape[2], _NUM_CANDIDATES)
        return rescore(query_BNQD, key_BNKD, index)

    def buckets(self, x_BNXD: Tensor, num_buckets: int, like_BNKD: Tensor) -> Tensor:
        return self.bucketer(num_buckets, like_BNKD)(x_BNXD)

    def bucketer(self, num_buckets: int, like_BNKD: Tensor) -> Callable[[Tensor], Tensor]:
        num_bits = num_buckets.bit_length() - 1
        if num_buckets != 2**num_bits:
            raise ValueError(f"num_buckets: {num_buckets} is not a power of two, which sign bits need")
        # What all have in common says nothing and would fill a few buckets with everything.
        centre = like_BNKD.float().mean(2, keepdim=True)
        directions = projection(like_BNKD.shape[-1], num_bits).to(like_BNKD.device)
        place = torch.arange(num_bits, device=like_BNKD.device)
        return lambda x_BNXD: (((x_BNXD.float() - centre) @ directions > 0).long() << place).sum(-1)

    def similarity(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Tensor:
        agreement = multiply_codes(self._signs(query_BNQD), self._signs(key_BNKD))
        cosine = agreement.mul_(math.pi / 2 / self._num_bits).sin_()
        norms = (x.float().norm(dim=-1) for x in (query_BNQD, key_BNKD))
        return cosine.mul_(next(norms)[..., None]).mul_(next(norms)[:, :, None])

    def _signs(self, x_BNXD: Tensor) -> Tensor:
        """1 or -1 for each bit, int8."""
        sides = x_BNXD.float() @ projection(x_BNXD.shape[-1], self._num_bits).to(x_BNXD.device)
        return (sides > 0).to(torch.int8).mul_(2).sub_(1)


@lru_cache(maxsize=16)
def projection(head_dim: int, num_bits: int) -> Tensor:
    """Directions [D, bits], float32 on the CPU; the first ones are the same for any number of bits."""
    generator = torch.Generator().manual_seed(_SEED)
    turns = []
    for _ in range(-(-num_bits // head_dim) or 1):
        drawn = torch.randn((head_dim, head_dim), generator=generator, dtype=torch.float64)
        turns.append(torch.linalg.qr(drawn).Q.float())
    return torch.cat(turns, 1)[:, :num_bits].contiguous()

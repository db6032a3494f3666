"""The reference: every query against every key, in float32 (float64 for float64), a bounded number at once."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.search.protocol import Nearest, best_keys, landmark_buckets, rescore, unit


class ExactSearch:
    """Brute force."""

    @property
    def name(self) -> str:
        return "exact"

    def top1(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Nearest:
        query = unit(query_BNQD)
        # Lengths divide the few scores of a tile of queries, not the many channels of the keys.
        key = key_BNKD if key_BNKD.dtype == query.dtype else key_BNKD.to(query.dtype)
        length_BN1K = torch.linalg.vector_norm(key, dim=-1)[:, :, None].clamp(min=torch.finfo(key.dtype).tiny)

        def score(queries: slice, keys: slice) -> Tensor:
            return (query[:, :, queries] @ key[:, :, keys].mT).div_(length_BN1K[..., keys])

        rows = query.shape[0] * query.shape[1]
        return rescore(query_BNQD, key_BNKD, best_keys(score, rows, query.shape[2], key.shape[2]))

    def buckets(self, x_BNXD: Tensor, num_buckets: int, like_BNKD: Tensor) -> Tensor:
        return landmark_buckets(self, x_BNXD, num_buckets, like_BNKD)

    def similarity(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Tensor:
        dtype = torch.float64 if query_BNQD.dtype == torch.float64 else torch.float32
        return query_BNQD.to(dtype) @ key_BNKD.to(dtype).mT

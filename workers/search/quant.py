"""8-bit search (the paper's "Quant"): int8 codes with one scale per vector, compared as integers.

On a CPU each head is one `torch._int_mm` (VNNI), where bfloat16 is no faster than float32 once its maximum is sought.
On a GPU the codes go through the bfloat16 tensor cores in one batched product with float32 sums: codes up to 127 are
exact in bfloat16, so this is the same integer (not yet run on a GPU).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workers.search.protocol import Nearest, best_keys, landmark_buckets, rescore, unit

_NUM_CANDIDATES = 4  # near neighbours may differ by less than a code can tell


class Codes(NamedTuple):
    """Vectors in 8 bits: code * scale is about the vector."""

    code_BNXD: Tensor
    """int8."""
    scale_BNX: Tensor
    """float32."""


class QuantSearch:
    """Int8 codes."""

    @property
    def name(self) -> str:
        return "quant"

    def top1(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Nearest:
        # The scale of a query changes no order, so it is left out.
        query, key = quantise(query_BNQD), quantise(unit(key_BNKD))

        def score(queries: slice, keys: slice) -> Tensor:
            codes = query.code_BNXD[:, :, queries], key.code_BNXD[:, :, keys]
            return multiply_codes(*codes, key.scale_BNX[:, :, keys])

        batch, heads, num_queries = query.code_BNXD.shape[:3]
        index = best_keys(score, batch * heads, num_queries, key_BNKD.shape[2], _NUM_CANDIDATES)
        return rescore(query_BNQD, key_BNKD, index)

    def buckets(self, x_BNXD: Tensor, num_buckets: int, like_BNKD: Tensor) -> Tensor:
        return landmark_buckets(self, x_BNXD, num_buckets, like_BNKD)

    def similarity(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Tensor:
        query, key = quantise(query_BNQD), quantise(key_BNKD)
        product = multiply_codes(query.code_BNXD, key.code_BNXD, key.scale_BNX)
        return product.mul_(query.scale_BNX[..., None])


def quantise(x_BNXD: Tensor) -> Codes:
    """Codes in [-127, 127]; the greatest component of each vector gets 127."""
    x = x_BNXD.float()
    scale = (x.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return Codes((x / scale[..., None]).round_().to(torch.int8), scale)


def multiply_codes(a_BNQD: Tensor, b_BNKD: Tensor, scale_BNK: Tensor | None = None) -> Tensor:
    """Integer inner products of int8 codes, times a scale of each b; BNQK in float32."""
    shape = (*a_BNQD.shape[:3], b_BNKD.shape[2])
    a, b = a_BNQD.flatten(0, 1), b_BNKD.flatten(0, 1)
    scale = None if scale_BNK is None else scale_BNK.flatten(0, 1)[:, None]
    if a.device.type == "cpu":
        out = torch.empty((len(a), *shape[2:]))
        for row in range(len(a)):  # no batched product of int8 exists
            product = torch._int_mm(a[row], b[row].mT)
            if scale is None:
                out[row] = product
            else:
                torch.mul(product, scale[row], out=out[row])
        return out.view(shape)
    if a.is_cuda:
        out = torch.bmm(a.bfloat16(), b.bfloat16().mT, out_dtype=torch.float32)
    else:
        out = torch.bmm(a.float(), b.float().mT)
    return (out if scale is None else out * scale).view(shape)

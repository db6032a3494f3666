"""8-bit search (the paper's "Quant"): int8 codes with one scale per vector.

On a GPU the codes go through the bfloat16 tensor cores in one batched product with float32 sums: codes up to 127 are
exact in bfloat16, so this is the integer product (not yet run on a GPU). On a CPU the codes are multiplied as floats:
`torch._int_mm` (VNNI) is faster by itself, but was slower in all once its integers were made floats again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from workers.search.protocol import Nearest, best_keys, landmarks, rescore, unit

_NUM_CANDIDATES = 4  # near neighbours may differ by less than a code can tell


class Codes(NamedTuple):
    """Vectors in 8 bits: code * scale is about the vector."""

    code_BNXD: Tensor
    """int8."""
    scale_BNX: Tensor
    """float32."""

    def part(self, which: slice) -> Codes:
        """Some of the vectors."""
        return Codes(self.code_BNXD[:, :, which], self.scale_BNX[:, :, which])

    def decode(self) -> Tensor:
        """The vectors as the codes tell them, float32."""
        return self.code_BNXD.float().mul_(self.scale_BNX[..., None])


class QuantSearch:
    """Int8 codes."""

    @property
    def name(self) -> str:
        return "quant"

    def top1(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Nearest:
        query, key = quantise(unit(query_BNQD)), quantise(unit(key_BNKD))

        def score(queries: slice, keys: slice) -> Tensor:
            return multiply(query.part(queries), key.part(keys))

        batch, heads, num_queries = query.code_BNXD.shape[:3]
        index = best_keys(score, batch * heads, num_queries, key_BNKD.shape[2], _NUM_CANDIDATES)
        return rescore(query_BNQD, key_BNKD, index)

    def buckets(self, x_BNXD: Tensor, num_buckets: int, like_BNKD: Tensor) -> Tensor:
        return self.bucketer(num_buckets, like_BNKD)(x_BNXD)

    def bucketer(self, num_buckets: int, like_BNKD: Tensor) -> Callable[[Tensor], Tensor]:
        similarity = _similarity_to(landmarks(num_buckets, like_BNKD))
        return lambda x_BNXD: similarity(x_BNXD).argmax(-1)

    def similarity(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Tensor:
        return _similarity_to(key_BNKD)(query_BNQD)


def _similarity_to(key_BNKD: Tensor) -> Callable[[Tensor], Tensor]:
    """Inner products of codes with these keys, which are coded once: query_BNQD -> BNQK."""
    if key_BNKD.is_cuda:
        codes = quantise(key_BNKD)
        return lambda query_BNQD: multiply(quantise(query_BNQD), codes)
    key_BNDK = round_to_codes(key_BNKD).mT
    return lambda query_BNQD: round_to_codes(query_BNQD) @ key_BNDK


def quantise(x_BNXD: Tensor) -> Codes:
    """Codes in [-127, 127]; the greatest component of each vector gets 127."""
    x = x_BNXD.float()
    scale = _scale(x)
    return Codes((x / scale[..., None]).round_().to(torch.int8), scale)


def round_to_codes(x_BNXD: Tensor) -> Tensor:
    """What the codes stand for, float32: `quantise` and `decode` without the integers between."""
    x = x_BNXD.float()
    scale = _scale(x)[..., None]
    return (x / scale).round_().mul_(scale)


def _scale(x_BNXD: Tensor) -> Tensor:
    largest = torch.maximum(x_BNXD.amax(-1), -x_BNXD.amin(-1))  # both at once take several times as long on a CPU
    return (largest / 127).clamp_(min=torch.finfo(torch.float32).tiny)


def multiply(a: Codes, b: Codes) -> Tensor:
    """Inner products of what the codes stand for, BNQK in float32."""
    if not a.code_BNXD.is_cuda:
        return a.decode() @ b.decode().mT
    product_BNQK = multiply_codes(a.code_BNXD, b.code_BNXD)
    return product_BNQK.mul_(a.scale_BNX[..., None]).mul_(b.scale_BNX[:, :, None])


def multiply_codes(a_BNQD: Tensor, b_BNKD: Tensor) -> Tensor:
    """Integer inner products of int8 codes, BNQK in float32: exact below 2^24."""
    if not a_BNQD.is_cuda:
        return a_BNQD.float() @ b_BNKD.float().mT
    a, b = a_BNQD.flatten(0, 1).bfloat16(), b_BNKD.flatten(0, 1).bfloat16()
    product: Tensor = torch.bmm(a, b.mT, out_dtype=torch.float32)
    return product.view(*a_BNQD.shape[:3], b_BNKD.shape[2])

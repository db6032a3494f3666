"""FAISS: brute force over floats or 8-bit codes, and its own sign-bit index (IndexLSH).

The package is optional. faiss-cpu searches tensors in host memory. For tensors on a GPU the flat index runs there if
faiss-gpu is installed (written to its documented interface, not yet run on a GPU); IndexLSH exists on the CPU only. An
index has no batch, so heads are searched in turn.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workers.errors import KernelUnavailable
from workers.search.protocol import Nearest, landmark_buckets, rescore, unit

try:
    import faiss
except ImportError as error:  # optional
    faiss = None  # type: ignore[assignment, unused-ignore]
    _why_not = str(error)

_NUM_CANDIDATES = 8


def _require(name: str) -> None:
    if faiss is None:
        raise KernelUnavailable(
            f"search: {name!r} needs the package faiss (pip install 'longtake[cpu]' or 'longtake[gpu]'): {_why_not}"
        )


class FaissFlatSearch:
    """All keys compared, as floats or in 8 bits with a range for each component."""

    def __init__(self, *, is_quantised: bool = False) -> None:
        self._is_quantised = is_quantised
        _require(self.name)

    @property
    def name(self) -> str:
        return "faiss-sq8" if self._is_quantised else "faiss-flat"

    def top1(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Nearest:
        index = _search_heads(self, unit(query_BNQD), unit(key_BNKD), _NUM_CANDIDATES if self._is_quantised else 1)
        return rescore(query_BNQD, key_BNKD, index)

    def buckets(self, x_BNXD: Tensor, num_buckets: int, like_BNKD: Tensor) -> Tensor:
        return landmark_buckets(self, x_BNXD, num_buckets, like_BNKD)

    def similarity(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Tensor:
        key = key_BNKD.float()
        if self._is_quantised:
            key = torch.stack([self._decode(one) for one in key.flatten(0, 1)]).view_as(key)
        return query_BNQD.float() @ key.mT

    def _decode(self, key_KD: Tensor) -> Tensor:
        """What 8 bits keep of the keys."""
        key = key_KD.contiguous().cpu().numpy()
        index = self.make_index(key_KD.shape[1])
        index.train(key)
        return torch.from_numpy(index.sa_decode(index.sa_encode(key))).to(key_KD.device)

    def make_index(self, head_dim: int) -> Any:
        if self._is_quantised:
            return faiss.IndexScalarQuantizer(head_dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        return faiss.IndexFlatIP(head_dim)


class FaissLshSearch:
    """IndexLSH: sign bits after FAISS's own fixed random rotation, compared by Hamming distance."""

    def __init__(self, num_bits: int = 128) -> None:
        self._num_bits = num_bits
        _require(self.name)

    @property
    def name(self) -> str:
        return "faiss-lsh"

    def top1(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Nearest:
        index = _search_heads(self, unit(query_BNQD), unit(key_BNKD), _NUM_CANDIDATES)
        return rescore(query_BNQD, key_BNKD, index)

    def buckets(self, x_BNXD: Tensor, num_buckets: int, like_BNKD: Tensor) -> Tensor:
        num_bits = num_buckets.bit_length() - 1
        if num_buckets != 2**num_bits:
            raise ValueError(f"num_buckets: {num_buckets} is not a power of two, which sign bits need")
        signs = self._signs(x_BNXD.float() - like_BNKD.float().mean(2, keepdim=True))[..., :num_bits]
        return ((signs > 0).long() << torch.arange(num_bits, device=signs.device)).sum(-1)

    def similarity(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Tensor:
        agreement = self._signs(query_BNQD.float()) @ self._signs(key_BNKD.float()).mT
        cosine: Tensor = (agreement * (math.pi / 2 / self._num_bits)).sin()
        query_norm, key_norm = query_BNQD.float().norm(dim=-1), key_BNKD.float().norm(dim=-1)
        product: Tensor = cosine * query_norm[..., None] * key_norm[:, :, None]
        return product

    def _signs(self, x_BNXD: Tensor) -> Tensor:
        """1 or -1 for each bit of FAISS's code, float32."""
        flat = x_BNXD.flatten(0, 2).contiguous().cpu().numpy()
        code = torch.from_numpy(self.make_index(x_BNXD.shape[-1]).sa_encode(flat))
        bits = (code[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
        signs = bits.flatten(-2)[:, : self._num_bits].float() * 2 - 1
        return signs.view(*x_BNXD.shape[:3], self._num_bits).to(x_BNXD.device)

    def make_index(self, head_dim: int) -> Any:
        return faiss.IndexLSH(head_dim, self._num_bits, True, False)  # rotated, thresholds at 0


def _search_heads(search: FaissFlatSearch | FaissLshSearch, query: Tensor, key: Tensor, num: int) -> Tensor:
    """Candidates of each query, index_BNQC."""
    num = min(num, key.shape[2])
    found = []
    for query_QD, key_KD in zip(query.flatten(0, 1).float(), key.flatten(0, 1).float(), strict=True):
        index = _to_device(search.make_index(query.shape[-1]), query.device, search.name)
        keys = key_KD.contiguous().cpu().numpy()
        if not index.is_trained:
            index.train(keys)
        index.add(keys)
        found.append(torch.from_numpy(index.search(query_QD.contiguous().cpu().numpy(), num)[1]))
    return torch.stack(found).view(*query.shape[:3], num).to(query.device)


def require_device(name: str, device: torch.device) -> None:
    """Refuse a device that this back end cannot search on.

    Raises:
        KernelUnavailable: The message says what to take instead.
    """
    if device.type == "cpu":
        return
    if name == "faiss-lsh":
        raise KernelUnavailable(f"search: {name!r} runs on the CPU only, keys are on {device}; take 'lsh'")
    if not hasattr(faiss, "StandardGpuResources"):
        raise KernelUnavailable(f"search: {name!r} needs faiss-gpu for keys on {device}; take 'exact' or 'quant'")


def _to_device(index: Any, device: torch.device, name: str) -> Any:
    require_device(name, device)
    if device.type == "cpu":
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)

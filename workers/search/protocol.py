"""Who is near whom: what a search back end offers, and the pieces that all of them share.

Vectors are batched by B and N (batch and head); every back end is a function of its input alone: seeds are fixed and
no global generator is read. Heads never see one another, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.rows import take_slots, wide

MAX_SCORES = 2**24
"""Scores held at once while all keys are looked through: 64 MiB in float32."""


_STRETCH = 64


class Nearest(NamedTuple):
    """The nearest key of each query."""

    index_BNQ: Tensor
    """int64."""
    cosine_BNQ: Tensor
    """Its true cosine, also where the search was approximate; float32 or wider, for bfloat16 knows nothing near 1."""


class Search(Protocol):
    """One way to find neighbours. Checked by tests/property/test_search.py."""

    @property
    def name(self) -> str:
        """As in the configuration."""
        ...

    def top1(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Nearest:
        """The key with the highest cosine, or one that is likely to be it; at least one key."""
        ...

    def buckets(self, x_BNXD: Tensor, num_buckets: int, like_BNKD: Tensor) -> Tensor:
        """code_BNX, int64 in [0, num_buckets): vectors of one direction tend to share their bucket.

        Queries and keys are in one space when both are asked about with the same `like_BNKD`, the vectors that the
        buckets are made for.
        """
        ...

    def similarity(self, query_BNQD: Tensor, key_BNKD: Tensor) -> Tensor:
        """Inner products, BNQK in float32 or wider, as exactly as the codes of this back end tell them."""
        ...


@runtime_checkable
class PreparesBuckets(Protocol):
    """A search that can work out beforehand what its buckets are made from."""

    def bucketer(self, num_buckets: int, like_BNKD: Tensor) -> Callable[[Tensor], Tensor]:
        """`buckets` of any vectors, for these."""
        ...


def bucketer(search: Search, num_buckets: int, like_BNKD: Tensor) -> Callable[[Tensor], Tensor]:
    """`search.buckets` for many calls with the same `like_BNKD`: x_BNXD -> code_BNX."""
    if isinstance(search, PreparesBuckets):
        return search.bucketer(num_buckets, like_BNKD)
    return partial(search.buckets, num_buckets=num_buckets, like_BNKD=like_BNKD)


Score = Callable[[slice, slice], Tensor]
"""(queries, keys) -> score_BNQK of these runs, higher is nearer."""


def best_keys(score: Score, num_rows: int, num_queries: int, num_keys: int, num_best: int = 1) -> Tensor:
    """Keys with high scores for each query, index_BNQC with C <= `num_best`, the best among them.

    The best key is always there; the others are the best of as many stretches of keys, not the best of all. At most
    `MAX_SCORES` scores exist at once.

    Args:
        score: Computes scores.
        num_rows: Batch times heads.
        num_queries, num_keys: Above 0.
        num_best: Candidates for each query.
    """
    query_step = max(1, min(num_queries, MAX_SCORES // max(1, num_rows * num_keys), 1024))
    key_step = max(1, min(num_keys, MAX_SCORES // max(1, num_rows * query_step)))
    found = []
    for q in range(0, num_queries, query_step):
        queries = slice(q, min(num_queries, q + query_step))
        best: tuple[Tensor, Tensor] | None = None
        for k in range(0, num_keys, key_step):
            keys = slice(k, min(num_keys, k + key_step))
            value, index = _winners(score(queries, keys), num_best)
            if best is not None:
                value, index = torch.cat((best[0], value), -1), torch.cat((best[1], index + k), -1)
            if value.shape[-1] > num_best:
                value, at = value.topk(num_best, dim=-1)
                index = index.gather(-1, at)
            best = value, index
        assert best is not None
        found.append(best[1])
    return torch.cat(found, 2)


def _winners(score: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The highest score of each of `num` stretches of the last axis, and of what is left over."""
    num = min(num, score.shape[-1])
    if num == 1 and score.shape[-1] >= 4 * _STRETCH:
        return _winner(score)
    whole = score.shape[-1] // num * num
    value, index = score[..., :whole].unflatten(-1, (num, -1)).max(-1)
    index = index + torch.arange(num, device=score.device) * (whole // num)
    if whole < score.shape[-1]:
        last_value, last = score[..., whole:].max(-1, keepdim=True)
        value, index = torch.cat((value, last_value), -1), torch.cat((index, last + whole), -1)
    return value, index


def _winner(score: Tensor) -> tuple[Tensor, Tensor]:
    """The highest score and its index: first the stretch, then the place: plain maxima are far faster."""
    whole = score.shape[-1] // _STRETCH * _STRETCH
    stretches = score[..., :whole].unflatten(-1, (-1, _STRETCH))
    value, at = stretches.amax(-1).max(-1, keepdim=True)
    inside = stretches.gather(-2, at[..., None].expand(*at.shape, _STRETCH)).squeeze(-2).argmax(-1, keepdim=True)
    index = at * _STRETCH + inside
    if whole < score.shape[-1]:
        last_value, last = score[..., whole:].max(-1, keepdim=True)
        index = torch.where(last_value > value, last + whole, index)
        value = torch.maximum(value, last_value)
    return value, index


def rescore(query_BNQD: Tensor, key_BNKD: Tensor, index_BNQC: Tensor) -> Nearest:
    """The candidate with the highest true cosine."""
    query, cosines = unit(query_BNQD), []
    key_BNKD = key_BNKD.contiguous()
    for column in index_BNQC.unbind(-1):
        cosines.append((query * unit(take_slots(key_BNKD, column))).sum(-1))
    cosine_BNQ, at = torch.stack(cosines, -1).max(-1)
    return Nearest(index_BNQC.gather(-1, at[..., None])[..., 0], cosine_BNQ)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 (0 stays 0), float32 or wider."""
    return F.normalize(wide(x), dim=-1)


def landmark_buckets(search: Search, x_BNXD: Tensor, num_buckets: int, like_BNKD: Tensor) -> Tensor:
    """Buckets around evenly spaced members of `like_BNKD`: a vector's code is its nearest landmark."""
    # A code needs no true cosine, so no candidate is compared a second time.
    return search.similarity(x_BNXD, landmarks(num_buckets, like_BNKD)).argmax(-1)


def landmarks(num_buckets: int, like_BNKD: Tensor) -> Tensor:
    """Evenly spaced members as vectors of length 1, no more than there are."""
    num_like = like_BNKD.shape[2]
    num = min(num_buckets, num_like)
    return unit(like_BNKD[:, :, torch.arange(num, device=like_BNKD.device) * num_like // num])

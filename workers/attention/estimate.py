"""Recall while a take is rendered: an estimate from a few queries and, where keys were compressed, a sample of them.

For a selection it is exact for the queries looked at: the dense mass on what they see. Where cache entries stand for
keys that are gone, the cache's audit sample says how far the entries are off: the entries themselves give the mass of
the run, the sample corrects it (a ratio estimate), so that nothing is added where nothing was lost. `measure.py` holds
the exact recall; a test bounds the difference.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workers.attention.measure import sample_queries, scaled_logits, seen_keys
from workers.contracts import Attending, Audited, AuditKeys, KeyValues, KVCache, Moment

_ROUNDING = 1e-5  # a rest smaller than this share of a float32 sum is rounding
_LEAST_PAIRS = 0.05  # with fewer audit keys that share their entry, nothing can be said from one to all members
_LARGEST_RATIO = 1e12  # beyond, recall is zero anyway, and products stay finite


class Logits(NamedTuple):
    """Some queries against a run of keys."""

    logit_BNQK: Tensor
    """Without log m."""
    seen_BNQK: Tensor
    log_mass_BNK: Tensor | None = None

    def weighed(self) -> Tensor:
        """Log m included."""
        return self.logit_BNQK if self.log_mass_BNK is None else self.logit_BNQK + self.log_mass_BNK[:, :, None]


def estimate_recall(
    own: Logits, cached: Logits | None = None, audit_BNQA: Tensor | None = None, audit: AuditKeys | None = None
) -> Tensor:
    """Recall of each query, recall_BNQ in [0, 1]; nothing waits for the device.

    Args:
        own: With the chunk's own keys.
        cached: With the entries of the cache; None where it is empty.
        audit_BNQA: Logits with the audit keys; None means that every entry is a key as it was given.
        audit: Whose logits they are.
    """
    if cached is None:
        return (torch.softmax(own.logit_BNQK, -1) * own.seen_BNQK).sum(-1)
    if audit is None or audit_BNQA is None:
        logit_BNQK = torch.cat((cached.weighed(), own.weighed()), -1)
        seen_BNQK = torch.cat((cached.seen_BNQK, own.seen_BNQK), -1)
        return (torch.softmax(logit_BNQK, -1) * seen_BNQK).sum(-1)
    return _audited_recall(own, cached, audit_BNQA, audit)


def _audited_recall(own: Logits, cached: Logits, audit_BNQA: Tensor, audit: AuditKeys) -> Tensor:
    """`estimate_recall` where a run of entries stands for keys that are gone."""
    top_BNQ1 = torch.cat((own.logit_BNQK, cached.weighed(), audit_BNQA), -1).amax(-1, keepdim=True)
    own_BNQK, entry_BNQK = (own.logit_BNQK - top_BNQ1).exp(), (cached.weighed() - top_BNQ1).exp()
    entry_seen_BNQK, run = entry_BNQK * cached.seen_BNQK, slice(audit.start, audit.stop)
    run_BNQ, run_seen_BNQ = entry_BNQK[..., run].sum(-1), entry_seen_BNQK[..., run].sum(-1)
    single_BNQ = own_BNQK.sum(-1) + entry_BNQK.sum(-1) - run_BNQ
    given_BNQ = _positive((own_BNQK * own.seen_BNQK).sum(-1) + entry_seen_BNQK.sum(-1))

    # Of each audit key: the weight it should have, and its share of the weight that its entry has.
    is_held_BN1A = (audit.owner_BNA >= 0)[:, :, None]
    owner_BNQA = audit.owner_BNA.clamp(min=0)[:, :, None].expand_as(audit_BNQA)
    true_BNQA = (audit_BNQA - top_BNQ1).exp()
    member_BNQA = entry_BNQK.gather(-1, owner_BNQA) * (is_held_BN1A / audit.members_BNA[:, :, None])
    member_seen_BNQA = member_BNQA * cached.seen_BNQK.gather(-1, owner_BNQA)

    # The true mass of the run: what its entries say times the mean ratio of truth to entry, and what was evicted. For
    # an audit key the ratio is that of all others: one that rules the sample would else confirm itself.
    held_BNQA, num_audit = true_BNQA * is_held_BN1A, audit_BNQA.shape[-1]
    held_BNQ1, members_BNQ1 = held_BNQA.sum(-1, keepdim=True), member_BNQA.sum(-1, keepdim=True)
    evicted_BNQ = (true_BNQA - held_BNQA).sum(-1) * (audit.num_original_tokens / max(1, num_audit))
    ratio_BNQ = _ratio(held_BNQ1, members_BNQ1, 0.0)[..., 0]
    unseen = 1 - min(1.0, num_audit / audit.num_original_tokens)  # a sample of all keys is the truth, itself included
    others_BNQA = _ratio(held_BNQ1 - unseen * held_BNQA, members_BNQ1 - unseen * member_BNQA, _ROUNDING * members_BNQ1)
    true_run_BNQ = run_BNQ * ratio_BNQ + evicted_BNQ
    total_BNQ = _positive(single_BNQ + true_run_BNQ)
    total_BNQA = _positive((single_BNQ + evicted_BNQ)[..., None] + run_BNQ[..., None] * others_BNQA)

    single_recall_BNQ = (given_BNQ - run_seen_BNQ) / torch.maximum(total_BNQ, given_BNQ)
    given_BNQA = member_seen_BNQA / given_BNQ[..., None]
    kept_share_BNQ = _kept_share(held_BNQA, member_BNQA, given_BNQA, total_BNQA, audit)
    run_recall_BNQ = torch.minimum(run_seen_BNQ / given_BNQ * kept_share_BNQ, true_run_BNQ / total_BNQ)
    return (single_recall_BNQ + run_recall_BNQ).clamp(0, 1)


def _kept_share(
    true_BNQA: Tensor, member_BNQA: Tensor, given_BNQA: Tensor, total_BNQA: Tensor, audit: AuditKeys
) -> Tensor:
    """How much of what the entries of the run give is due to the keys that they hold.

    Too much for one member may be too little for another: it is the entry's sum that counts. With n of an entry's m
    members in the sample the answer is off by about 1/n - 1/m times a constant, which follows from the answers for n
    members and for one.
    """
    is_same_BNAA = (audit.owner_BNA[..., None] == audit.owner_BNA[..., None, :]).to(true_BNQA.dtype)
    entry_BNQA = member_BNQA * _ratio(true_BNQA @ is_same_BNAA, member_BNQA @ is_same_BNAA, 0.0)
    by_key_BNQ = torch.minimum(true_BNQA / total_BNQA, given_BNQA).sum(-1)
    by_entry_BNQ = torch.minimum(entry_BNQA / total_BNQA, given_BNQA).sum(-1)
    whole_BNQ = given_BNQA.sum(-1)
    sampled_BNQ = _ratio((given_BNQA / is_same_BNAA.sum(-1)[:, :, None]).sum(-1), whole_BNQ, 0.0)
    all_BNQ = _ratio((given_BNQA / audit.members_BNA[:, :, None]).sum(-1), whole_BNQ, 0.0)
    reach_BNQ = ((sampled_BNQ - all_BNQ) / (1 - sampled_BNQ).clamp(min=_LEAST_PAIRS)).clamp(0, 1 / _LEAST_PAIRS)
    kept_BNQ = by_entry_BNQ + reach_BNQ * (by_entry_BNQ - by_key_BNQ).clamp(min=0)
    return _ratio(kept_BNQ, whole_BNQ, 0.0).clamp(max=1)


class RecallProbe:
    """Estimates recall of the last denoising step of each chunk, in all layers, for a few queries.

    All layers each time, so that one chunk's number can be compared with the next one's; one step, because the last
    one is the sparsest of a policy that starts densely.

    Args:
        cache: Of the rollout; asked for its audit sample if it keeps one. A cache that drops keys without a sample is
            judged by what it still holds.
        num_queries: Queries looked at in each layer.
    """

    def __init__(self, cache: KVCache, num_queries: int) -> None:
        self._cache, self._num_queries = cache, num_queries
        self._means: list[Tensor] = []

    def wants(self, layer_index: int, moment: Moment) -> bool:
        return not moment.is_clean_pass and moment.branch == 0 and moment.step_index == moment.num_steps - 1

    def observe(self, attending: Attending) -> None:
        num_queries, device = attending.q_BQND.shape[1], attending.q_BQND.device
        turn = attending.moment.chunk_index + attending.layer_index
        queries = sample_queries(num_queries, self._num_queries, turn).to(device, non_blocking=True)
        q_BQND = attending.q_BQND[:, queries].float()

        def look(source: Literal["cached", "own"], keys: KeyValues) -> Logits:
            logit = scaled_logits(q_BQND, keys.k_BKND)
            return Logits(logit, seen_keys(attending.plan, source, queries, num_queries, logit), keys.log_mass_BNK)

        own, cached = look("own", attending.own), attending.cached
        if cached is None:
            recall_BNQ = estimate_recall(own)
        else:
            audit = self._cache.audit(attending.layer_index) if isinstance(self._cache, Audited) else None
            audit_BNQA = None
            if audit is not None:
                k = audit.k_BAND.to(attending.q_BQND.dtype)
                rotated = attending.rotate(KeyValues(k, k, audit.position_A3))
                audit_BNQA = scaled_logits(q_BQND, rotated.k_BKND)
            recall_BNQ = estimate_recall(own, look("cached", cached), audit_BNQA, audit)
        self._means.append(recall_BNQ.mean())

    def take(self) -> float:
        """Mean recall since this was last asked; waits for the device once. NaN if nothing was seen."""
        mean = float(torch.stack(self._means).mean()) if self._means else math.nan
        self._means.clear()
        return mean


def _ratio(part: Tensor, whole: Tensor, least: Tensor | float) -> Tensor:
    """part / whole; 1 where the whole is not above `least`, so where the sample says nothing."""
    is_known = whole > least
    ratio = part.clamp(min=0) / torch.where(is_known, whole, 1.0)
    return torch.where(is_known, ratio.clamp(max=_LARGEST_RATIO), 1.0)


def _positive(weight: Tensor) -> Tensor:
    """Not below what can be divided by: all else may be lost beside one large weight."""
    return weight.clamp(min=torch.finfo(weight.dtype).tiny)

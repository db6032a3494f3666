"""How much of dense attention survives: the exact recall of a plan or of a compressed cache, for benches and tests.

Recall of a query is the dense softmax mass on what is kept (`kept_mass`): p over the uncompressed history and the
chunk's own keys, summed over the keys that are seen, as themselves or in the entry that holds them. Evicted keys and
keys that are not seen give nothing; but a merged key counts as kept, however far its entry is from it. So there is a
strict recall besides (`exact_recall`): the sum over all entries of min(p, p'), where p' is what the rollout really
gives the entry. The two are equal for mere selection, and strict recall is never the higher one.

The meter keeps every key of the rollout, so it belongs into measurements; `estimate.py` is its cheap twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workers.contracts import Attending, AttentionPlan, KeyValues, KVCache, Moment, Tiles, TracksOwners

_GOLDEN = 0.6180339887498949  # its multiples modulo 1 are spread evenly, so chunks look at different queries


def sample_queries(num_queries: int, num_wanted: int, turn: int) -> Tensor:
    """Indices of `num_wanted` of the queries, evenly spaced and shifted from turn to turn; int64 on the CPU."""
    num = min(num_queries, num_wanted)
    return ((torch.arange(num) + (turn * _GOLDEN) % 1.0) * (num_queries / num)).long()


def scaled_logits(q_BQND: Tensor, k_BKND: Tensor, log_mass_BNK: Tensor | None = None) -> Tensor:
    """q.k / sqrt(d) + log m, as BNQK in the dtype of the queries."""
    logit_BNQK = torch.einsum("bqnd,bknd->bnqk", q_BQND / math.sqrt(q_BQND.shape[-1]), k_BKND.to(q_BQND.dtype))
    return logit_BNQK if log_mass_BNK is None else logit_BNQK + log_mass_BNK.to(q_BQND.dtype)[:, :, None]


def seen_keys(
    plan: AttentionPlan, source: Literal["cached", "own"], queries: Tensor, num_queries: int, like_BNQK: Tensor
) -> Tensor:
    """Which keys of a source the plan shows to some of the queries.

    Args:
        queries: Indices, int64, on the device of the plan.
        num_queries: Of the whole plan.
        like_BNQK: Logits of those queries with all keys of the source; gives shape and device.
    Returns:
        bool_BNQK.
    """
    seen = torch.zeros_like(like_BNQK, dtype=torch.bool)
    for part in plan.parts:
        if part.source == source and part.stop > part.start:
            part_BNQK = seen[..., part.start : part.stop]
            if part.tiles is None:
                part_BNQK.fill_(True)
            else:
                part_BNQK.copy_(_seen_in_tiles(part.tiles, queries, num_queries, part.stop - part.start))
    return seen


def put_kept(logit_BNQK: Tensor, plan: AttentionPlan, then_BQND: Tensor, cached: KeyValues) -> None:
    """Logits of cached runs whose attention a plan takes from an earlier call become those of the queries of then."""
    for part in plan.parts:
        if part.result == "taken" and part.source == "cached":
            run = cached.narrow(part.start, part.stop)
            logit_BNQK[..., part.start : part.stop] = scaled_logits(then_BQND, run.k_BKND, run.log_mass_BNK)


def exact_recall(
    original_BNQT: Tensor,
    own: tuple[Tensor, Tensor],
    cached: tuple[Tensor, Tensor] | None = None,
    owner_BNT: Tensor | None = None,
) -> Tensor:
    """Strict recall of each query, recall_BNQ in [0, 1].

    Args:
        original_BNQT: Logits with every key of the history, uncompressed (T may be 0).
        own: Logits with the chunk's own keys, and which of them are seen; BNQK both.
        cached: The same for the entries of the cache, log m included, those of runs that are taken from an earlier
            call by its queries; None where it is empty.
        owner_BNT: Which cache entry holds each original key, -1 for none; needed where there is a cache.
    """
    own_logit, own_seen = own
    p = torch.softmax(torch.cat((original_BNQT, own_logit), -1), -1)
    num_original = original_BNQT.shape[-1]
    if cached is None:
        given = torch.softmax(own_logit.masked_fill(~own_seen, -math.inf), -1)
        return torch.minimum(p[..., num_original:], given).sum(-1)
    assert owner_BNT is not None
    logit, seen = cached
    both = torch.cat((logit.masked_fill(~seen, -math.inf), own_logit.masked_fill(~own_seen, -math.inf)), -1)
    given, given_own = torch.softmax(both, -1).split((logit.shape[-1], own_logit.shape[-1]), -1)
    # Index 0 gathers what nobody holds.
    held_BNQK = p.new_zeros((*given.shape[:-1], given.shape[-1] + 1))
    held_BNQK.scatter_add_(-1, (owner_BNT + 1)[:, :, None].expand_as(original_BNQT), p[..., :num_original])
    kept = torch.minimum(held_BNQK[..., 1:], given).sum(-1)
    return kept + torch.minimum(p[..., num_original:], given_own).sum(-1)


def kept_mass(
    original_BNQT: Tensor,
    own: tuple[Tensor, Tensor],
    cached_seen_BNQK: Tensor | None = None,
    owner_BNT: Tensor | None = None,
) -> Tensor:
    """Recall: dense mass on the keys that are seen, as themselves or in the entry that holds them; mass_BNQ in [0, 1].

    Args: As `exact_recall`; of the cache only which entries are seen.
    """
    own_logit, own_seen = own
    p = torch.softmax(torch.cat((original_BNQT, own_logit), -1), -1)
    num_original = original_BNQT.shape[-1]
    kept = (p[..., num_original:] * own_seen).sum(-1)
    if cached_seen_BNQK is None:
        return kept
    assert owner_BNT is not None
    place = owner_BNT.clamp(min=0)[:, :, None].expand_as(original_BNQT)
    is_seen = cached_seen_BNQK.gather(-1, place) & (owner_BNT >= 0)[:, :, None]
    return kept + (p[..., :num_original] * is_seen).sum(-1)


def owners_by_position(kept: KeyValues, original_T3: Tensor) -> Tensor:
    """Which entry holds each original key, for caches that drop keys but never merge them: owner_BNT, -1 for dropped.

    Raises:
        ValueError: An entry stands for several keys, or for none that ever came: such a cache must track its owners.
    """
    batch, num_kept, num_heads, _ = kept.k_BKND.shape
    is_shared = kept.position_K3.dim() == 2
    position_BNK3 = kept.position_K3[None, None] if is_shared else kept.position_K3.transpose(1, 2)
    num_original = len(original_T3)
    _, group = torch.unique(torch.cat((original_T3, position_BNK3.reshape(-1, 3))), dim=0, return_inverse=True)
    original_of_group = torch.full((len(group),), num_original, device=group.device)
    original_of_group[group[:num_original]] = torch.arange(num_original, device=group.device)
    place_BNK = original_of_group[group[num_original:]].view(position_BNK3.shape[:3]).expand(batch, num_heads, -1)
    if kept.log_mass_BNK is not None:
        if bool((kept.log_mass_BNK > 0).any()):
            raise ValueError("entries of this cache stand for several keys: build it so that it tracks its owners")
        is_empty = kept.log_mass_BNK.isneginf()
    else:
        is_empty = torch.zeros((), dtype=torch.bool, device=group.device)
    if bool(((place_BNK == num_original) & ~is_empty).any()):
        raise ValueError("the cache holds a key at a position that no chunk had")
    place_BNK = place_BNK.masked_fill(is_empty, num_original)
    owner = torch.full((batch, num_heads, num_original + 1), -1, dtype=torch.long, device=group.device)
    owner.scatter_(-1, place_BNK, torch.arange(num_kept, device=group.device).expand_as(place_BNK))
    return owner[..., :num_original]


@dataclass(frozen=True)
class Reading:
    """Recall of one layer in one call, of both kinds: means over the queries looked at, by batch and head."""

    layer_index: int
    moment: Moment
    recall_BN: Tensor
    strict_BN: Tensor


class RecallMeter:
    """Exact recall of a rollout from its first chunk on, as a probe; waits for the device, so keep it out of timings.

    Args:
        cache: Of the rollout. A cache that merges must track its owners.
        num_queries: Queries looked at in each call.
        every_chunks: Only chunks whose index divides by it are measured; all are recorded.
        steps: Denoising steps that are measured; None means all.
        dtype: Of the arithmetic.
        storage: Dtype in which the history is recorded; None keeps that of the keys.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        num_queries: int = 16,
        every_chunks: int = 1,
        steps: Collection[int] | None = None,
        dtype: torch.dtype = torch.float64,
        storage: torch.dtype | None = None,
    ) -> None:
        self.readings: list[Reading] = []
        self._cache, self._num_queries, self._every, self._steps = cache, num_queries, every_chunks, steps
        self._dtype, self._storage = dtype, storage
        self._k: dict[int, list[Tensor]] = {}
        self._position = torch.zeros(0, 3)
        self._newest = -1
        self._owner_key = (0, 0, 0)
        self._kept = self._owner = torch.zeros(0)  # kept alive, so that its address is not given to others

    def wants(self, layer_index: int, moment: Moment) -> bool:
        if moment.is_clean_pass:
            return True
        is_step = self._steps is None or moment.step_index in self._steps
        return is_step and moment.branch == 0 and moment.chunk_index % self._every == 0

    def observe(self, attending: Attending) -> None:
        if attending.moment.is_clean_pass:
            self._record(attending)
            return
        q, k = attending.q_BQND, self._history(attending.layer_index)
        turn = attending.moment.chunk_index * attending.moment.num_steps + attending.moment.step_index
        queries = sample_queries(q.shape[1], self._num_queries, turn).to(q.device)
        q_BQND = q[:, queries].to(self._dtype)

        def look(source: Literal["cached", "own"], keys: KeyValues) -> tuple[Tensor, Tensor]:
            logit = scaled_logits(q_BQND, keys.k_BKND, keys.log_mass_BNK)
            return logit, seen_keys(attending.plan, source, queries, q.shape[1], logit)

        own = look("own", attending.own)
        if k is None:
            strict_BNQ, recall_BNQ = exact_recall(own[0][..., :0], own), kept_mass(own[0][..., :0], own)
        else:
            position = self._position[: k.shape[1]]
            k_rotated = attending.rotate(KeyValues(k.to(q.dtype), k, position)).k_BKND
            original_BNQT = scaled_logits(q_BQND, k_rotated)
            assert attending.cached is not None, "the meter came after the first chunk"
            owner = self._owners(attending.layer_index, attending.cached, position)
            cached = look("cached", attending.cached)
            if attending.kept_q_BQND is not None:
                then_BQND = attending.kept_q_BQND[:, queries].to(self._dtype)
                put_kept(cached[0], attending.plan, then_BQND, attending.cached)
            strict_BNQ = exact_recall(original_BNQT, own, cached, owner)
            recall_BNQ = kept_mass(original_BNQT, own, cached[1], owner)
        means = (x.mean(-1).cpu() for x in (recall_BNQ, strict_BNQ))
        self.readings.append(Reading(attending.layer_index, attending.moment, *means))

    def mean(self, from_chunk: int = 1) -> float:
        """Mean recall over all readings from this chunk on (the first one has no history); NaN without any."""
        return self._mean_of(lambda reading: reading.recall_BN, from_chunk)

    def mean_strict(self, from_chunk: int = 1) -> float:
        """The same of strict recall."""
        return self._mean_of(lambda reading: reading.strict_BN, from_chunk)

    def mean_by_batch(self) -> tuple[Tensor, Tensor]:
        """Recall and strict recall [B], over the last reading of each layer and step: of a chunk as it was delivered.

        Raises:
            ValueError: Nothing was read.
        """
        last = {(reading.layer_index, reading.moment.step_index): reading for reading in self.readings}
        if not last:
            raise ValueError("the meter has no readings")
        found = [(reading.recall_BN.mean(-1), reading.strict_BN.mean(-1)) for reading in last.values()]
        recall, strict = (torch.stack(values).mean(0) for values in zip(*found, strict=True))
        return recall, strict

    def _mean_of(self, value: Callable[[Reading], Tensor], from_chunk: int) -> float:
        means = [value(reading).mean() for reading in self.readings if reading.moment.chunk_index >= from_chunk]
        return float(torch.stack(means).mean()) if means else math.nan

    def forget_readings(self) -> None:
        """Keep the history, drop what was measured so far."""
        self.readings.clear()

    def _record(self, attending: Attending) -> None:
        layer_index, new = attending.layer_index, attending.own_k_BKND
        new = new.to(self._storage or new.dtype, copy=True)
        self._k.setdefault(layer_index, []).append(new)
        if attending.moment.chunk_index != self._newest:
            self._newest = attending.moment.chunk_index
            position = attending.own.position_K3
            self._position = torch.cat((self._position.to(position), position))

    def _history(self, layer_index: int) -> Tensor | None:
        """All recorded keys of a layer, put together only when they are looked at."""
        if layer_index not in self._k:
            return None
        if len(self._k[layer_index]) > 1:
            self._k[layer_index] = [torch.cat(self._k[layer_index], 1)]
        return self._k[layer_index][0]

    def _owners(self, layer_index: int, cached: KeyValues, position_T3: Tensor) -> Tensor:
        if isinstance(self._cache, TracksOwners) and (owner := self._cache.owners(layer_index)) is not None:
            return owner
        kept = cached.position_K3
        key = kept.data_ptr(), kept.numel(), len(position_T3)
        if key != self._owner_key or cached.log_mass_BNK is not None:  # layers that share their positions share this
            self._owner_key, self._kept, self._owner = key, kept, owners_by_position(cached, position_T3)
        return self._owner


def _seen_in_tiles(tiles: Tiles, queries: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Rows of `Tiles.mask`, without the other rows."""
    visible = tiles.visible_BNIJ
    if tiles.query_order_BNQ is None:
        rows = visible[:, :, queries // tiles.query_tile]
    else:
        place_BNQ = _inverse(tiles.query_order_BNQ, num_queries)[..., queries] // tiles.query_tile
        rows = visible.gather(2, place_BNQ[..., None].expand(*visible.shape[:2], len(queries), visible.shape[3]))
    if tiles.key_order_BNK is None:
        return rows.repeat_interleave(tiles.key_tile, 3)[..., :num_keys]
    place_BNK = _inverse(tiles.key_order_BNK, num_keys) // tiles.key_tile
    return rows.gather(3, place_BNK[:, :, None].expand(*rows.shape[:3], num_keys))


def _inverse(order_BNK: Tensor, num: int) -> Tensor:
    """At which place each index stands."""
    places = torch.arange(num, device=order_BNK.device).expand_as(order_BNK)
    return torch.empty_like(order_BNK).scatter_(-1, order_BNK, places)

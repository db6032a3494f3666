"""AnnSA: a query sees the tiles of the history where its attention is, found by approximate search.

Source: FAST-AR (arXiv 2602.01801), section 5.4: queries and keys get codes by a search back end, and a query attends
to the keys near it, by tiles. Two forms: in `bucket` order (the paper's) keys and queries are sorted by their bucket,
so that a tile holds keys of one kind; in `time` order a tile is a piece of a picture. In both, the tiles that a query
tile sees are those with the highest estimated mass (`tile_mass.py`). On the bundled model time order has the higher
recall at every density: after RoPE, attention goes by place and time more than by kind.

Sink, newest keys and the chunk's own are dense. A selection is made once per chunk and shared by its steps: from step
to step the mass of a key hardly changes (on the bundled model the best choice of one keeps 0.002 less in another).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from workers.attention.history import DenseRegion, plan_history, result_of_history
from workers.attention.tile_mass import (
    Rotate,
    Shared,
    TileMass,
    TileSample,
    estimate_mass,
    heaviest_first,
    keep_above,
    keep_heaviest,
    keep_mass,
    keep_most,
    keep_most_jointly,
    keep_share,
    sample_tiles,
)
from workers.contracts import AttentionPlan, KeyValues, Moment, Tiles
from workers.packed_keys import PackedKeys
from workers.search.protocol import Search

_STEPS = 8
"""Of a token: what merging caches round rows and columns to."""
_MOST_STEPS = 2**14
"""Rows and columns below this leave 2^23 times that float64 tells apart."""

_FIRST_SHARE = 4 / 3
"""Measured on the bundled model: 96 latent frames in the first step and 72 after it keep more than 77 in each."""


@dataclass(frozen=True)
class AnnSettings:
    """How the history is thinned out."""

    sink_tokens: int
    """First keys of the cache, always seen."""
    recent_tokens: int
    """Newest keys of the cache, always seen."""
    density: float = 0.3
    """Share of the history's tiles that a query tile sees, in (0, 1]; 1 is dense."""
    seen_keys: int | None = None
    """So many keys instead, on average over heads and queries, and where their estimated mass is: the cost of a chunk
    does not grow with the history."""
    across_layers: bool = False
    """From the second call of a chunk on, `seen_keys` is a mean over all layers, which compete for them. In the first
    one, whose noise looks everywhere, each layer has a third more."""
    at_once: bool = False
    """With `across_layers`: each layer ends at the mass at which they would end together (`keep_above`), in the first
    call and for the whole chunk. What is seen is gathered once, not twice; it is about `seen_keys`."""
    clean_share: float = 1.0
    """Of what a step sees by `seen_keys` or `target_recall`, what a clean pass sees, in (0, 1]: nothing is denoised
    there."""
    target_recall: float | None = None
    """In (0, 1]: take as many tiles as their estimated mass needs, whatever the density."""
    query_tile: int = 64
    key_tile: int = 64
    sample_share: float = 1 / 8
    """Share of the keys of each tile that are looked at, in (0, 1]."""
    query_share: float = 1 / 2
    """Share of the queries of each tile that are asked, in (0, 1]."""
    order: Literal["time", "bucket"] = "time"
    num_buckets: int = 64
    """In `bucket` order; a power of two."""
    every_step: bool = False
    """Choose anew in each step, not once per chunk."""
    history_at: tuple[int, ...] | None = None
    """Denoising steps that look at the history; the others take what the newest of them saw of it. None: all look. On
    the bundled model one look is as good as four; a clean pass that takes too loses a decibel of what is seen again."""

    def __post_init__(self) -> None:
        assert 0 < self.density <= 1
        assert 0 < self.sample_share <= 1
        assert 0 < self.query_share <= 1
        assert not self.across_layers or (self.seen_keys is not None and not self.every_step)
        assert self.across_layers or not self.at_once
        assert 0 < self.clean_share <= 1
        assert self.clean_share == 1 or self.seen_keys is not None or self.target_recall is not None

    @property
    def chooses_twice(self) -> bool:
        """Once for each layer alone, then for all of them."""
        return self.across_layers and not self.at_once

    @property
    def num_samples(self) -> int:
        """Keys of a tile that are looked at."""
        return max(1, round(self.sample_share * self.key_tile))


@dataclass(eq=False)
class _Chosen:
    """What a layer sees in the chunk in hand."""

    cached: KeyValues
    tiles: Tiles
    mass: TileMass
    is_joint: bool = False
    """Chosen in competition with the other layers."""


@dataclass(frozen=True, eq=False)
class _Indexed:
    """What is known of one layer's keys until they change."""

    cached: KeyValues | None
    """Kept, so that its identity is not given to another; None in a later chunk."""
    sample: TileSample
    key_order_BNK: Tensor | None
    lineage: Hashable | None = None
    num_steady_tiles: int = 0
    """Of keys in the order of time: full in all heads, so that later keys come behind them."""


class AnnSelfAttention:
    """The policy.

    Args:
        settings: Sizes and shares.
        search: Makes the buckets and estimates inner products.
        rotate: RoPE of keys, and of queries given as keys, for callers that plan before it. None asks the caller for
            queries and keys after RoPE (`PlansAfterRope`), as a rollout has them; buckets are better after it too.
    """

    def __init__(self, settings: AnnSettings, search: Search, rotate: Rotate | None) -> None:
        self._settings, self._search, self._rotate = settings, search, rotate
        if rotate is None:
            self.plans_after_rope: Literal[True] = True
        self._region = DenseRegion(settings.sink_tokens, settings.recent_tokens)
        self._factor = 1.0
        self._indexed: dict[int, _Indexed] = {}
        self._chosen: dict[tuple[int, int], _Chosen] = {}
        self._looked: set[tuple[int, int]] = set()
        """Layer and branch that have looked at the history in this chunk."""
        self._seen: dict[int, list[Tensor]] = {}
        """Branch -> mean number of tiles that each layer sees which has chosen, [B] each."""
        self._shared: Shared = {}

    def begin_chunk(self, position_Q3: Tensor) -> None:
        # What comes into a history comes behind it: most of what is known of it still holds.
        known = self._indexed.items()
        self._indexed = {layer: replace(x, cached=None) for layer, x in known if x.lineage is not None}
        self._chosen.clear()
        self._looked.clear()
        self._seen.clear()
        self._shared.clear()

    def tighten(self, factor: float) -> None:
        """See `Tightens`; for the chunks to come."""
        self._factor = factor

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        span = None if cached is None else self._region.history(cached.num_tokens)
        if cached is None or span is None or span[0] >= span[1]:
            return plan_history(cached, own, None, None)
        key = layer_index, moment.branch
        result = result_of_history(self._settings.history_at, moment, has_looked=key in self._looked)
        if result == "kept":
            self._looked.add(key)
        if self._is_dense(span[1] - span[0]):
            apart = None if result == "fresh" else span
            return plan_history(cached, own, apart, None, result, is_whole=True)
        if result == "taken":
            return plan_history(cached, own, span, self._chosen[key].tiles, result)
        kept = self._chosen.get(key)
        if kept is None or kept.cached is not cached or self._settings.every_step:
            kept = self._chosen[key] = self._choose(key, q_BQND, cached, own, span)
        elif self._settings.chooses_twice and not kept.is_joint:  # each layer has had its turn
            self._choose_jointly(moment.branch)
        if moment.is_clean_pass and self._settings.clean_share < 1:
            fewer = _fewer(kept.tiles, self._keep(kept.mass, self._settings.clean_share))
            return plan_history(cached, own, span, fewer, result)
        return plan_history(cached, own, span, kept.tiles, result)

    def _is_dense(self, num_keys: int) -> bool:
        s = self._settings
        if s.target_recall is not None:
            return s.target_recall >= 1
        return (s.density if s.seen_keys is None else s.seen_keys / num_keys) * self._factor >= 1

    def _choose(
        self, key: tuple[int, int], q_BQND: Tensor, cached: KeyValues, own: KeyValues, span: tuple[int, int]
    ) -> _Chosen:
        s, (layer_index, branch) = self._settings, key
        indexed = self._index(layer_index, cached, span)
        query_order = None
        if s.order == "bucket":
            history = cached.narrow(*span).k_BKND.transpose(1, 2)
            code = self._search.buckets(q_BQND.transpose(1, 2), s.num_buckets, history)
            query_order = torch.argsort(code, dim=-1, stable=True)
        query_tile = min(s.query_tile, q_BQND.shape[1])
        queries = sample_tiles(
            KeyValues(q_BQND, q_BQND, own.position_K3),
            query_tile,
            max(1, round(s.query_share * query_tile)),
            self._rotate,
            key_order_BNK=query_order,
            shared=self._shared,
        )
        mass = estimate_mass(self._search, queries, indexed.sample, self._sample_rest(cached, own, span))
        seen_before = self._seen.setdefault(branch, []) if s.at_once else None
        visible = self._keep(mass, seen_before=seen_before)
        if seen_before is not None:
            seen_before.append(visible.sum(-1, dtype=torch.float32).mean((1, 2)))
        # The heaviest first: a clean pass that sees fewer of the same choice sees the first of them.
        is_shared = s.clean_share < 1 and not s.every_step
        tile_order = heaviest_first(mass, visible) if is_shared else None
        tiles = Tiles(visible, query_tile, s.key_tile, query_order, indexed.key_order_BNK, tile_order)
        return _Chosen(cached, tiles, mass)

    def _keep(self, mass: TileMass, share: float = 1.0, seen_before: Sequence[Tensor] | None = None) -> Tensor:
        """What a layer sees by itself, visible_BNIJ; a share of it where it is so many keys."""
        s = self._settings
        if s.target_recall is not None:
            visible = keep_mass(mass, 1 - (1 - s.target_recall) / self._factor)
            return visible if share == 1 else keep_heaviest(mass, visible, share)
        if s.seen_keys is None:
            return keep_share(mass, min(1.0, s.density * self._factor))
        if s.at_once:
            return keep_above(mass, self._num_seen(s.seen_keys * share), seen_before)
        return keep_most(mass, self._num_seen(s.seen_keys * share * (_FIRST_SHARE if s.across_layers else 1.0)))

    def _choose_jointly(self, branch: int) -> None:
        """Tiles for all layers at once, by the masses that each found when it came first."""
        assert self._settings.seen_keys is not None
        layers = [chosen for (_, of_branch), chosen in self._chosen.items() if of_branch == branch]
        visible = keep_most_jointly([chosen.mass for chosen in layers], self._num_seen(self._settings.seen_keys))
        for chosen, visible_BNIJ in zip(layers, visible, strict=True):
            chosen.tiles, chosen.is_joint = replace(chosen.tiles, visible_BNIJ=visible_BNIJ), True

    def _num_seen(self, num_keys: float) -> int:
        return max(1, round(num_keys * self._factor / self._settings.key_tile))

    def _index(self, layer_index: int, cached: KeyValues, span: tuple[int, int]) -> _Indexed:
        known = self._indexed.get(layer_index)
        if known is not None and known.cached is cached:
            return known
        s, history = self._settings, cached.narrow(*span)
        lineage = history.lineage if isinstance(history, PackedKeys) and s.order == "time" else None
        order: Tensor | None
        if known is not None and lineage is not None and known.lineage == lineage:
            order, sample = self._grow(known, history)
        else:
            order = self._order_by_bucket(history) if s.order == "bucket" else _order_by_time(history)
            sample = sample_tiles(
                history, s.key_tile, s.num_samples, self._rotate, key_order_BNK=order, shared=self._shared
            )
        steady = 0 if lineage is None else _count_existing(history) // s.key_tile
        known = self._indexed[layer_index] = _Indexed(cached, sample, order, lineage, steady)
        return known

    def _grow(self, known: _Indexed, history: KeyValues) -> tuple[Tensor, TileSample]:
        """Order and sample of a history that was known before it got more keys: its steady tiles stay as they are."""
        s, steady = self._settings, known.num_steady_tiles
        assert known.key_order_BNK is not None
        if steady * s.key_tile >= history.num_tokens:  # nothing came: the same place is looked at from elsewhere
            return known.key_order_BNK, known.sample
        first, rest = known.key_order_BNK.tensor_split((steady * s.key_tile,), -1)
        num_known = known.key_order_BNK.shape[-1]
        new = torch.arange(num_known, history.num_tokens, device=rest.device).expand(*rest.shape[:2], -1)
        rest = torch.cat((rest, new), -1)
        order = torch.cat((first, rest.gather(-1, _order_of_times(*_times(history, rest)))), -1)
        more = sample_tiles(history, s.key_tile, s.num_samples, self._rotate, key_order_BNK=order, first_tile=steady)
        num, before = steady * s.num_samples, known.sample
        weight = torch.cat((before.log_weight_BNS[..., :num], more.log_weight_BNS), -1)
        keys = torch.cat((before.k_BNSD[:, :, :num], more.k_BNSD), 2)
        return order, TileSample(keys, weight, steady + more.num_tiles)

    def _order_by_bucket(self, history: KeyValues) -> Tensor:
        k_BNKD = history.k_BKND.transpose(1, 2)
        code = self._search.buckets(k_BNKD, self._settings.num_buckets, k_BNKD)
        if history.log_mass_BNK is not None:  # empty entries last, so that they fill tiles of their own
            code = code.masked_fill(history.log_mass_BNK.isneginf(), self._settings.num_buckets)
        return torch.argsort(code, dim=-1, stable=True)

    def _sample_rest(self, cached: KeyValues, own: KeyValues, span: tuple[int, int]) -> TileSample:
        """Sink, newest keys and own keys, each as one tile: how much of the softmax they take needs no more."""
        parts = [cached.narrow(0, span[0]), cached.narrow(span[1], cached.num_tokens), own]
        share = self._settings.sample_share
        samples = [
            sample_tiles(
                part, part.num_tokens, max(1, round(share * part.num_tokens)), self._rotate, shared=self._shared
            )
            for part in parts
            if part.num_tokens
        ]
        batch, heads = own.k_BKND.shape[0], own.k_BKND.shape[2]
        weights = [sample.log_weight_BNS.expand(batch, heads, -1) for sample in samples]
        return TileSample(torch.cat([sample.k_BNSD for sample in samples], 2), torch.cat(weights, -1), 1)


def _fewer(tiles: Tiles, visible_BNIJ: Tensor) -> Tiles:
    """Fewer tiles for the same rows; where they are the first of what a row sees, nothing need be gathered for them."""
    fewer = replace(tiles, visible_BNIJ=visible_BNIJ, tile_order_BNIJ=None)
    if tiles.tile_order_BNIJ is None:
        return fewer
    count_BNI1 = visible_BNIJ.sum(-1, keepdim=True)
    is_first = torch.arange(visible_BNIJ.shape[-1], device=count_BNI1.device) < count_BNI1
    are_first = torch.equal(visible_BNIJ.gather(-1, tiles.tile_order_BNIJ), is_first)
    is_part = bool((count_BNI1 <= tiles.visible_BNIJ.sum(-1, keepdim=True)).all())
    return replace(fewer, first_of=tiles) if are_first and is_part else fewer


def _order_by_time(history: KeyValues) -> Tensor | None:
    """Single keys come in order of time, row and column; entries that heads merged for themselves are put into it."""
    if history.position_K3.dim() == 2:
        return None
    return _order_of_times(*_times(history))


def _times(history: KeyValues, index_BNR: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Time, row and column of all entries or of some, [B, N, R]; those that stand for no key are at the end of time."""
    position_BNK3, mass = history.position_K3.transpose(1, 2), history.log_mass_BNK
    if index_BNR is not None:
        position_BNK3 = position_BNK3.gather(2, index_BNR[..., None].expand(*index_BNR.shape, 3))
        mass = None if mass is None else mass.gather(-1, index_BNR)
    time, row, column = position_BNK3.unbind(-1)
    return time if mass is None else time.masked_fill(mass.isneginf(), torch.inf), row, column


def _count_existing(history: KeyValues) -> int:
    """Entries of the head that has fewest."""
    mass = history.log_mass_BNK
    return history.num_tokens if mass is None else int((~mass.isneginf()).sum(-1).min())


def _order_of_times(time: Tensor, row: Tensor, column: Tensor) -> Tensor:
    if time.is_cpu and time.numel() and all(_is_in_steps(x) for x in (row, column)):
        return torch.argsort(_one_number(time, row, column), dim=-1, stable=True)
    order = torch.argsort(column, dim=-1, stable=True)
    for key in (row, time):
        order = order.gather(-1, torch.argsort(key.gather(-1, order), dim=-1, stable=True))
    return order


def _is_in_steps(x: Tensor) -> bool:
    steps = x * _STEPS
    return bool((steps == steps.round()).all()) and bool((steps.abs() < _MOST_STEPS).all())


def _one_number(time: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """A number that orders as the three do one after the other: one sort instead of three."""
    key = time.double()
    for finer in (row, column):
        steps = (finer.double() - finer.min().double()) * _STEPS
        key = key * (steps.max() + 1) + steps
    return key

"""SparseVideoGen: each head is either spatial or temporal, and a few sampled queries say which.

Source: Xi et al., "Sparse VideoGen" (arXiv 2502.01776), section 3 (the two kinds of heads), 4.1 (online profiling) and
4.2 (layout). A spatial head sees whole frames near in time; a temporal head sees the same place, and those beside it,
in all frames. Both see the same number of keys. In every call the output of sampled queries under either mask is
compared with the dense one, and the head takes the mask with the smaller squared error. For temporal heads queries and
keys are put in the order of places, so that what they see lies in whole tiles.

Adapted to chunk-causal models: the frames near in time are the newest ones of the history, because all keys are older
than the queries; the first frame, which the paper lets everyone see, is the sink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from workers.attention.history import DenseRegion, Places, count_columns, cut_tiles, find_places, plan_history
from workers.contracts import AttentionPlan, KeyValues, Moment, Tiles
from workers.rows import wide


@dataclass(frozen=True)
class SvgSettings:
    """How much either kind of head sees."""

    dense: DenseRegion
    tile: int
    """Queries and keys of a tile."""
    density: float = 0.25
    """Share of the history's tiles that a query sees, in (0, 1]."""
    num_samples: int = 64
    """Queries that profile a head in each call."""


class Mask(NamedTuple):
    """What one kind of head sees: `Tiles` for [1, 1, ...], or for [B, N, ...] where each head keeps other tokens."""

    visible_BNIJ: Tensor
    query_order_BNQ: Tensor
    key_order_BNK: Tensor
    key_tile_BNK: Tensor
    """The tile of each key, in the order in which they came."""


class Masks(NamedTuple):
    """Both kinds, for one history."""

    spatial: Mask
    temporal: Mask


class SvgAttention:
    """The two masks are made once per chunk for all layers that share their positions; heads choose in every call."""

    plans_after_rope: Literal[True] = True

    def __init__(self, settings: SvgSettings) -> None:
        self._settings = settings
        self._queries: Places | None = None
        self._columns = 1
        # The positions are kept beside their masks, so that their address cannot be given to others meanwhile.
        self._masks: dict[tuple[int, torch.Size], tuple[Tensor, Masks]] = {}

    def begin_chunk(self, position_Q3: Tensor) -> None:
        self._columns = count_columns(position_Q3)
        self._queries = find_places(position_Q3, self._columns)
        self._masks.clear()

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        dense = self._settings.dense
        if cached is None:
            return plan_history(cached, own, None, None)
        span = dense.history(cached.num_tokens)
        if span[0] == span[1]:
            return plan_history(cached, own, span, None)
        masks = self._read_masks(cached.narrow(*span))
        sample = draw_sample(q_BQND.shape[1], self._settings.num_samples, moment, layer_index).to(q_BQND.device)
        rows = tuple(read_rows(mask, sample, self._settings.tile) for mask in masks)
        is_temporal_BN = profile_heads(q_BQND[:, sample], cached, own, span, rows)
        return plan_history(cached, own, span, _choose(is_temporal_BN, masks, self._settings.tile))

    def _read_masks(self, history: KeyValues) -> Masks:
        key = history.position_K3.data_ptr(), history.position_K3.shape
        if key not in self._masks:
            assert self._queries is not None, "begin_chunk comes first"
            keys = find_places(history.position_K3, self._columns, history.log_mass_BNK)
            self._masks[key] = history.position_K3, make_masks(self._queries, keys, self._settings)
        return self._masks[key][1]


def make_masks(queries: Places, keys: Places, settings: SvgSettings) -> Masks:
    """Both kinds of mask, with equally many visible tiles in each row."""
    tile = settings.tile
    # Entries that stand for nothing are the oldest here, so that nobody sees them instead of the newest.
    by_time = Places(keys.time.masked_fill(keys.time.isposinf(), -torch.inf), keys.place).order("time")
    by_place = keys.order("place")
    query_order = queries.order("place")
    num_tiles = -(-keys.time.shape[-1] // tile)
    num_seen = math.ceil(settings.density * num_tiles)
    rows = -(-queries.time.shape[-1] // tile)
    is_new = torch.arange(num_tiles, device=keys.time.device) >= num_tiles - num_seen
    spatial = is_new.expand(*by_time.shape[:2], rows, num_tiles)
    at_I = _centres(queries.place.gather(-1, query_order), tile)
    at_J = _centres(keys.place.gather(-1, by_place), tile)
    distance = (at_I[..., :, None] - at_J[..., None, :]).abs()
    nearest = torch.argsort(distance, dim=-1, stable=True)[..., :num_seen]
    temporal = torch.zeros_like(distance, dtype=torch.bool).scatter(-1, nearest, True)
    as_they_come = torch.arange(queries.time.shape[-1], device=by_time.device)[None, None]
    tile_of = [order.argsort(-1) // tile for order in (by_time, by_place)]
    return Masks(Mask(spatial, as_they_come, by_time, tile_of[0]), Mask(temporal, query_order, by_place, tile_of[1]))


def draw_sample(num_queries: int, num_samples: int, moment: Moment, layer_index: int) -> Tensor:
    """Indices of the queries that profile a layer in one call, int64; a function of the call alone."""
    seed = ((moment.chunk_index * 1009 + moment.step_index) * 1009 + layer_index) * 2 + moment.branch
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_queries, generator=generator)[:num_samples]


def profile_heads(
    q_BMND: Tensor, cached: KeyValues, own: KeyValues, span: tuple[int, int], rows: tuple[Tensor, ...]
) -> Tensor:
    """Whether the temporal mask distorts the output of sampled queries less than the spatial one, bool [B, N].

    Args:
        q_BMND: Sampled queries after RoPE.
        span: The history among the cached keys.
        rows: What the sampled queries see of the history, spatial and temporal, each bool [B or 1, N or 1, M, K].
    """
    logit_BNMK = torch.cat((_logits(q_BMND, cached), _logits(q_BMND, own)), -1)

    def attend(logit: Tensor) -> Tensor:
        to_cached, to_own = logit.softmax(-1).split((cached.num_tokens, own.num_tokens), -1)
        return _weigh(to_cached, cached.v_BKND) + _weigh(to_own, own.v_BKND)

    exact = attend(logit_BNMK)
    errors = []
    for row in rows:
        history = logit_BNMK[..., span[0] : span[1]].masked_fill(~row, -torch.inf)
        masked = torch.cat((logit_BNMK[..., : span[0]], history, logit_BNMK[..., span[1] :]), -1)
        errors.append((attend(masked) - exact).square().mean((-1, -2)))
    return errors[1] < errors[0]


def _logits(q_BMND: Tensor, keys: KeyValues) -> Tensor:
    """At least float32, log m included; the product is of the keys as they are, because a copy of all is dearer."""
    q_BMND = (wide(q_BMND) / math.sqrt(q_BMND.shape[-1])).to(keys.k_BKND.dtype)
    logit = wide(torch.einsum("bmnd,bknd->bnmk", q_BMND, keys.k_BKND))
    return logit if keys.log_mass_BNK is None else logit + keys.log_mass_BNK[:, :, None].to(logit.dtype)


def _weigh(weight_BNMK: Tensor, v_BKND: Tensor) -> Tensor:
    return wide(torch.einsum("bnmk,bknd->bnmd", weight_BNMK.to(v_BKND.dtype), v_BKND))


def read_rows(mask: Mask, sample: Tensor, tile: int) -> Tensor:
    """What the sampled queries see, in the order in which the keys came: bool [B or 1, N or 1, M, K]."""
    query_tile = mask.query_order_BNQ[0, 0].argsort()[sample] // tile
    rows = mask.visible_BNIJ[:, :, query_tile]
    return rows.gather(-1, mask.key_tile_BNK[:, :, None].expand(*rows.shape[:3], -1))


def _choose(is_temporal_BN: Tensor, masks: Masks, tile: int) -> Tiles:
    """Tiles in which each head has the mask that it chose."""

    def pick(temporal: Tensor, spatial: Tensor) -> Tensor:
        where = is_temporal_BN.reshape(*is_temporal_BN.shape, *(1,) * (temporal.dim() - 2))
        return torch.where(where, temporal, spatial)

    both = zip(masks.temporal[:3], masks.spatial[:3], strict=True)
    visible, query_order, key_order = (pick(temporal, spatial) for temporal, spatial in both)
    return Tiles(visible, tile, tile, query_order, key_order)


def _centres(place: Tensor, tile: int) -> Tensor:
    """Mean place of each tile."""
    return cut_tiles(place, tile, torch.nan).nanmean(-1)

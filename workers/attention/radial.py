"""RadialAttention: a static mask whose density falls as the distance in time grows, for O(n log n) attention.

Source: Li et al., "Radial Attention" (arXiv 2506.19852), section 4.2 (the mask) and 4.3 (tiles). A query sees, in a
frame at temporal distance d, the tokens whose place differs by at most w(d) = decay * s / 2^floor(log2 d), with s
tokens in a frame. Where w(d) falls below a tile, the band stays one tile wide and only every (tile / w(d))-th frame is
seen. So each doubling of the distance costs the same.

Adapted to chunk-causal models: queries are one chunk's, keys all earlier frames; the paper's sink (its first frame) is
the sink of the cache. A tile is seen as soon as one pair in it is, so that nothing of the paper's mask is lost. The
paper's dense first steps and layers are a `GatedAttention` around this policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.attention.history import (
    DenseRegion,
    Places,
    count_columns,
    cut_tiles,
    find_places,
    plan_history,
)
from workers.contracts import AttentionPlan, KeyValues, Moment, Tiles


@dataclass(frozen=True)
class RadialSettings:
    """How wide the mask is."""

    dense: DenseRegion
    tile: int
    """Queries and keys of a tile; also the narrowest band, in places."""
    decay: float = 1.0
    """Factor on every width, above 0."""


class RadialAttention:
    """The mask depends on positions alone, so it is made once per chunk for all layers that share their positions."""

    def __init__(self, settings: RadialSettings) -> None:
        self._settings = settings
        self._queries: Places | None = None
        self._columns = self._frame_tokens = 1
        # The positions are kept beside their tiles, so that their address cannot be given to others meanwhile.
        self._tiles: dict[tuple[int, torch.Size], tuple[Tensor, Tiles]] = {}

    def begin_chunk(self, position_Q3: Tensor) -> None:
        self._columns = count_columns(position_Q3)
        self._frame_tokens = int((position_Q3[:, 0] == position_Q3[0, 0]).sum())
        self._queries = find_places(position_Q3, self._columns)
        self._tiles.clear()

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        dense = self._settings.dense
        if cached is None:
            return plan_history(cached, own, None, None)
        span = dense.history(cached.num_tokens)
        return plan_history(cached, own, span, None if span[0] == span[1] else self._read_tiles(cached.narrow(*span)))

    def _read_tiles(self, history: KeyValues) -> Tiles:
        key = history.position_K3.data_ptr(), history.position_K3.shape
        if key not in self._tiles:
            self._tiles[key] = history.position_K3, self._make_tiles(history)
        return self._tiles[key][1]

    def _make_tiles(self, history: KeyValues) -> Tiles:
        assert self._queries is not None, "begin_chunk comes first"
        keys = find_places(history.position_K3, self._columns, history.log_mass_BNK)
        batch, _, heads = history.k_BKND.shape[:3]
        order = None
        if history.position_K3.dim() > 2:  # shared positions are in the order of time already
            order = keys.order("time")
            keys = keys.sorted(order)
        visible = see_radially(self._queries, keys, self._frame_tokens, self._settings)
        tile = self._settings.tile
        return Tiles(visible.expand(batch, heads, -1, -1), tile, tile, None, order)


def see_radially(queries: Places, keys: Places, frame_tokens: int, settings: RadialSettings) -> Tensor:
    """Tiles of queries by tiles of keys that hold a pair of the mask, bool [.., I, J]."""
    tile = settings.tile
    time = cut_tiles(queries.time[0, 0], tile, torch.nan)
    place = cut_tiles(queries.place[0, 0], tile, torch.nan)
    seen = torch.zeros((), dtype=torch.bool, device=keys.time.device)
    for now in queries.time[0, 0].unique():  # the latent frames of a chunk: a handful
        here = time == now
        low = place.masked_fill(~here, torch.inf).amin(-1)[:, None]
        high = place.masked_fill(~here, -torch.inf).amax(-1)[:, None]
        width, is_kept = measure_bands((now - keys.time).abs(), frame_tokens, settings)
        at, width = keys.place.unsqueeze(-2), width.unsqueeze(-2)
        seen = seen | ((at >= low - width) & (at <= high + width) & is_kept.unsqueeze(-2))
    return cut_tiles(seen, tile, 0.0).any(-1)


def measure_bands(distance: Tensor, frame_tokens: int, settings: RadialSettings) -> tuple[Tensor, Tensor]:
    """Half width of the band in places at a temporal distance, and whether a frame at that distance is seen."""
    width = settings.decay * frame_tokens / 2.0 ** distance.clamp(min=1.0).log2().floor()
    stride = (settings.tile / width).ceil().clamp(min=1.0)
    is_kept = (distance.round() % stride == 0) & distance.isfinite()
    return width.clamp(min=float(settings.tile)), is_kept

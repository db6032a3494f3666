"""A render over a tile table by the ordinary loop: several videos side by side, looked at by probes. The slow twin.

The table, the choice of tiles and the order of work are those of `workers/rollouts/captured.py`; only attention goes
through an ordinary kernel, over the same keys in the order of time. The videos of a batch are further heads of one
table. The cache knows what became of every key, so that recall can be measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from workers.assemble import LoadedModel
from workers.assemble_tiles import choice_settings, runs_of, table_settings
from workers.attention.history import result_of_history
from workers.attention.tile_choice import TileChoice
from workers.cache.layer_table import LayerTable
from workers.cache.shrink import find_families
from workers.cache.table_codes import round_trip
from workers.cache.table_layout import TableSettings
from workers.cache.tile_table import TileTable
from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.contracts import AttentionPlan, KeyValues, Moment, PlanPart, Tiles


class TrackedTable(TileTable):
    """Remembers in which slot of the history each key is that ever came there.

    Args:
        settings, dtype, device: Of the table. What it would pack is only rounded so.
    """

    def __init__(self, settings: TableSettings, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(replace(settings, storage="model"), dtype, device)
        self._as_if = settings
        self.slot_of: dict[int, Tensor] = {}
        """id of a layer -> slot_NT."""

    def _absorb(self, layer: LayerTable, source: int) -> None:
        super()._absorb(layer, source)
        s = self.settings
        new = torch.arange(layer.pointer - s.chunk_tokens, layer.pointer, device=self.device).expand(s.num_heads, -1)
        old = self.slot_of.get(id(layer))
        self.slot_of[id(layer)] = new if old is None else torch.cat((old, new), 1)
        self._round(layer, layer.pointer - s.chunk_tokens)

    def _average_new(self, layer: LayerTable, new: slice) -> None:
        if self._as_if.storage == "model":
            super()._average_new(layer, new)
        else:
            self._average_as_kernels(layer, new)

    def _shrink(self, layer: LayerTable) -> None:
        partner = layer.partner_NC[:, : self.settings.history_tokens]
        families = find_families(self._used(layer), layer.v_NLD, partner, self._turn_back, self._room(layer))
        if id(layer) in self.slot_of:
            self.slot_of[id(layer)] = families.target.gather(1, self.slot_of[id(layer)])
        super()._shrink(layer)
        self._round(layer, 0)

    @property
    def num_bytes(self) -> int:
        used = self._as_if.used_bytes
        return sum(used(self.dtype, len(layer.position_of), layer.pointer) for layer in self.layers if layer.num_chunks)

    def _round(self, layer: LayerTable, first: int) -> None:
        storage = self._as_if.storage
        if storage == "model":
            return
        run = slice(self.settings.history_start + first, self.settings.history_start + layer.pointer)
        for x in (layer.k_NLW[:, run, : self.settings.head_dim], layer.v_NLD[:, run]):
            x.copy_(round_trip(x, storage))


class PlainTable:
    """A `KVCache` that tracks its owners; made when the first chunk says how many videos there are."""

    def __init__(self, settings: TableSettings) -> None:
        assert settings.chunk_tokens % settings.tile == 0, "tiles of the read keys must be tiles of the table"
        self._settings, self._read = settings, dict[int, KeyValues]()
        self._batch = 0
        self._table: TrackedTable | None = None

    @property
    def table(self) -> TrackedTable:
        assert self._table is not None, "nothing has been remembered yet"
        return self._table

    def for_batch(self, like_BKND: Tensor) -> TrackedTable:
        """The table, made for as many videos as there are."""
        if self._table is None:
            self._batch = like_BKND.shape[0]
            settings = replace(self._settings, num_heads=self._batch * self._settings.num_heads)
            self._table = TrackedTable(settings, like_BKND.dtype, like_BKND.device)
        return self._table

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        table = self.for_batch(chunk.k_BKND)
        k, v = (heads_together(x).unsqueeze(0) for x in (chunk.k_BKND, chunk.v_BKND))
        table.append(layer_index, KeyValues(k, v, chunk.position_K3))
        self._read.pop(layer_index, None)

    def read(self, layer_index: int) -> KeyValues | None:
        found = None if self._table is None else self._table.read(layer_index)
        if found is None:
            return None
        if layer_index not in self._read:
            batch, heads = self._batch, self._settings.num_heads
            k, v, position = (
                x[0].unflatten(1, (batch, heads)).transpose(0, 1).contiguous()
                for x in (found.k_BKND, found.v_BKND, found.position_K3)
            )
            assert found.log_mass_BNK is not None
            self._read[layer_index] = KeyValues(k, v, position, found.log_mass_BNK[0].unflatten(0, (batch, heads)))
        return self._read[layer_index]

    def owners(self, layer_index: int) -> Tensor | None:
        if self._table is None or self._table.layers[layer_index].num_chunks == 0:
            return None
        s, layer = self._settings, self._table.layers[layer_index]
        slot = self._table.slot_of.get(id(layer))
        sink = min(layer.num_chunks, s.sink_chunks) * s.chunk_tokens
        newest = len(layer.position_of) * s.chunk_tokens - sink
        heads = self._batch * s.num_heads
        parts = [torch.arange(sink, device=self._table.device).expand(heads, -1)]
        parts += [] if slot is None else [slot + sink]
        first = sink + layer.pointer
        parts.append(torch.arange(first, first + newest, device=self._table.device).expand(heads, -1))
        return torch.cat(parts, 1).unflatten(0, (self._batch, s.num_heads))

    @property
    def num_tokens(self) -> int:
        return 0 if self._table is None else self._table.num_tokens

    @property
    def num_bytes(self) -> int:
        return 0 if self._table is None else self._table.num_bytes

    def state(self) -> Mapping[str, Tensor]:
        raise NotImplementedError("measurements are not resumed")

    def restore(self, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError("measurements are not resumed")


class PlainTileChoice:
    """The `AttentionPolicy`: the tiles that `TileChoice` chooses in the table, shown to an ordinary kernel."""

    plans_after_rope: Literal[True] = True

    def __init__(self, config: TileAttentionConfig, cache: PlainTable, settings: TableSettings) -> None:
        self._cache, self._settings, self._choose_at = cache, settings, config.choose_at
        runs = runs_of(config, settings)
        self._choice = choice_settings(config, settings, runs)
        self._runs = runs
        self._history_at, self._is_always = config.history_at, (config.always_sink, config.always_recent)
        self._looked = set[int]()
        self._chooser: TileChoice | None = None
        self._lists: dict[int, tuple[Tensor, Tensor]] = {}

    def begin_chunk(self, position_Q3: Tensor) -> None:
        self._lists.clear()
        self._looked.clear()

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        everything_own = PlanPart("own", 0, own.num_tokens)
        if cached is None:
            return AttentionPlan((everything_own,))
        is_asked = not moment.is_clean_pass and moment.step_index in self._choose_at
        if is_asked or layer_index not in self._lists:
            self._lists[layer_index] = self._choose(layer_index, q_BQND, own)
        batch, heads = q_BQND.shape[0], q_BQND.shape[2]
        visible_BNIJ = self._lists[layer_index][moment.is_clean_pass].unflatten(0, (batch, heads))
        tile = self._settings.tile
        if self._history_at is None:
            return AttentionPlan(
                (PlanPart("cached", 0, cached.num_tokens, Tiles(visible_BNIJ, tile, tile)), everything_own)
            )
        result = result_of_history(self._history_at, moment, has_looked=layer_index in self._looked)
        if result == "kept":
            self._looked.add(layer_index)
        first, last = self._fresh(layer_index, cached.num_tokens)
        seen = Tiles(visible_BNIJ[..., first // tile : last // tile].contiguous(), tile, tile)
        parts = (
            PlanPart("cached", 0, first),
            PlanPart("cached", first, last, seen, result),
            PlanPart("cached", last, cached.num_tokens),
            everything_own,
        )
        return AttentionPlan(tuple(part for part in parts if part.stop > part.start))

    def _fresh(self, layer_index: int, num_tokens: int) -> tuple[int, int]:
        """Where the keys that are always seen end at the start of those read, and where they begin at their end."""
        s, starts = self._settings, self._cache.table.layers[layer_index].position_of
        is_sink, is_recent = self._is_always
        sink = sum(s.chunk_tokens for start in starts if start < s.history_start)
        recent = sum(s.chunk_tokens for start in starts if start >= s.recent_start)
        return sink * is_sink, num_tokens - recent * is_recent

    def _choose(self, layer_index: int, q_BQND: Tensor, own: KeyValues) -> tuple[Tensor, Tensor]:
        """Which tiles of the read keys a step sees, and which a clean pass, bool [B N, I, J]."""
        table, s = self._cache.for_batch(q_BQND), self._settings
        if self._chooser is None:
            self._chooser = TileChoice(self._choice, self._runs, s.chunk_tokens, s.head_dim, q_BQND.device)
        k_NTD, _ = table.own(layer_index)
        k_NTD.copy_(heads_together(own.k_BKND).transpose(0, 1))
        q_QND = heads_together(q_BQND)
        q_QNW = q_QND.new_zeros(*q_QND.shape[:2], s.width)
        q_QNW[..., : s.head_dim] = q_QND
        q_QNW[..., s.head_dim : s.head_dim + 2] = 1
        layer = table.layers[layer_index]
        early = self._chooser.has_early_list and not table.has_merged
        lists = [self._chooser.new_list(q_QND.shape[1], for_clean_pass=clean, early=early) for clean in (False, True)]
        self._chooser.choose(q_QNW, layer.k_NLW, *lists)
        order = self._read_order(layer)
        of_step, of_clean_pass = (
            torch.zeros(*index.shape[:2], self._runs.num_tiles, dtype=torch.bool, device=q_QND.device).scatter_(
                2, index.long(), True
            )[..., order]
            for index in lists
        )
        return of_step, of_clean_pass

    def _read_order(self, layer: LayerTable) -> list[int]:
        """Tiles of the table in the order in which `read` gives their keys."""
        s = self._settings
        starts = sorted(layer.position_of, key=lambda start: float(layer.position_of[start][0, 0]))
        chunk = s.chunk_tokens // s.tile
        sink = [start for start in starts if start < s.history_start]
        newest = [start for start in starts if start >= s.recent_start]
        history = range(s.history_start // s.tile, (s.history_start + layer.pointer) // s.tile)
        of_chunks = [[start // s.tile + i for start in part for i in range(chunk)] for part in (sink, newest)]
        return [*of_chunks[0], *history, *of_chunks[1]]


def heads_together(x_BKND: Tensor) -> Tensor:
    """Videos as further heads: [K, B N, D]."""
    return x_BKND.transpose(0, 1).flatten(1, 2)


def plain_table_parts(model: LoadedModel) -> tuple[PlainTable, PlainTileChoice]:
    """Cache and policy of a render over a tile table, for the ordinary loop."""
    cache_config, attention = model.config.cache, model.config.attention
    assert isinstance(cache_config, TileCacheConfig)
    assert isinstance(attention, TileAttentionConfig)
    settings = table_settings(cache_config, model.backbone, model.latent_size)
    cache = PlainTable(settings)
    return cache, PlainTileChoice(attention, cache, settings)

"""The whole history in a table of fixed size that tile-sparse kernels read as it lies: TempCache for GPUs.

The same method as `temporal_merge.py` and `groups.py` with another order of work: keys lie after RoPE at their absolute
times, in whole tiles, log m beside them, so nothing is assembled, rotated or sorted for a chunk. Every key that leaves
the newest chunks opens a slot and remembers its partner; a full history merges the nearest pairs (`shrink.py`). There
is no threshold: pairs merge as far as the size asks. All shapes are fixed and nothing waits for the device, so the
calls of a chunk can be replayed as CUDA graphs. Layers that become full together lie side by side and are worked on
together, as if their heads were those of one layer. One video at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from workers.cache.layer_table import TENSORS, LayerTable, new_tensors
from workers.cache.packed_history import PackedLayer, Packing
from workers.cache.partners import History, Look, find_partners
from workers.cache.shrink import Fuse, Room, Survivors, shrink
from workers.cache.table_layout import MEMBERS_LISTED, TableSettings, read_log_mass, write_log_mass
from workers.cache.unrotated import TurnBack, take_rows
from workers.contracts import KeyValues
from workers.key_codes import KeyCodes
from workers.model.rope import make_rotation, rotate
from workers.rows import as_words
from workers.search.nearest_rows import NearestRows, nearest_rows

_LOG = logging.getLogger(__name__)
TableWork = Literal["layers", "groups", "kernels"]
"""How chunks are taken over: layer by layer; in one go for all layers that become full together; or that by kernels of
our own, on a GPU and for sizes that are powers of two."""


class TableKernels(Packing, Protocol):
    """See `table_kernels.py`."""

    def match(self, history: History, partner_NC: Tensor, turn_back: TurnBack, new: slice, look: Look) -> None: ...

    def take_in(
        self, layer: PackedLayer, chunk: Sequence[Tensor], new: slice, turn_back: TurnBack, look: Look, s: TableSettings
    ) -> None: ...

    def merge(
        self, history: History, records: Sequence[Tensor], turn_back: TurnBack, room: Room, heads_at_once: int,
        tile: int,
    ) -> None: ...  # fmt: skip

    def merge_into_codes(self, to: PackedLayer, turn_back: TurnBack, room: Room, s: TableSettings) -> None: ...


class TileTable:
    """The cache.

    Args:
        settings: Sizes.
        dtype: Of keys and values.
        device: Where they lie.
        nearest: Finds the nearest of some keys; kernels do it themselves.
        work: How `remember_chunk` works; "groups", and a line in the log, where kernels cannot do the sizes.

    Raises:
        ImportError: Kernels are asked for, and Triton is not installed.
    """

    is_packed: ClassVar[bool] = False
    tensors: ClassVar[tuple[str, ...]] = TENSORS
    """Of a layer."""
    history_tensors: ClassVar[tuple[str, ...]] = ("position_NC3", "m_NC", "weight_NC", "partner_NC")
    """Of these, what has a row for each slot of the history alone; free behind the pointer."""

    def __init__(
        self,
        settings: TableSettings,
        dtype: torch.dtype,
        device: torch.device,
        nearest: NearestRows = nearest_rows,
        work: TableWork = "layers",
    ) -> None:
        assert self.is_packed == (settings.storage != "model")
        if work == "kernels" and settings.kernels_lack:
            _LOG.warning("Chunks are taken over by plain torch: %s.", settings.kernels_lack)
            work = "groups"
        self.settings, self.dtype, self.device = settings, dtype, device
        self._turn_back = TurnBack(settings.head_dim, settings.theta, device)
        self._look = Look(settings.frame_tokens, settings.candidate_tiles, settings.tile, nearest)
        self._fuse, self._work = Fuse(), work
        firsts = range(min(settings.spare_chunks, settings.num_layers))  # become full one after another
        self._groups = [range(first, settings.num_layers, settings.spare_chunks) for first in firsts]
        self._together = [self._new_layers(len(group)) for group in self._groups]
        self.layers = [self._layer(index) for index in range(settings.num_layers)]
        for index, layer in enumerate(self.layers):
            self._reset(layer, index)
        self._kernels = load_kernels(settings) if work == "kernels" else None
        self._views: dict[int, KeyValues] = {}
        self.before_change: Callable[[int, bool], None] = lambda layer_index, is_history: None
        """Told the layer that is changes next, and whether more of it does than its newest chunks and what is free."""
        self.on_part: Callable[[str], None] | None = None
        """Told the name of each part of the work as it ends; for measurements."""

    def compile(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Fuse what turning keys back and averaging values takes."""
        self._turn_back.compile(backend)
        self._fuse.compile(backend)

    def own(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Where the chunk in hand writes its keys (after RoPE) and values: [N, T, D] each, views."""
        layer = self.layers[layer_index]
        run = self.run_of(layer, self.settings.own_start)
        return layer.k_NLW[:, run, : self.settings.head_dim], layer.v_NLD[:, run]

    def run_of(self, layer: LayerTable, start: int) -> slice:
        """Where in its tensors the chunk lies whose first slot is this one."""
        return slice(start, start + self.settings.chunk_tokens)

    def note_seen(self, layer_index: int, index_NIJ: Tensor) -> None:
        """The tiles that queries will see until told anew; for tables that lay out only those."""

    def lay_out(self, layer_index: int, *, seen_only: bool = False) -> LayerTable:
        """A layer as kernels read it, until the next one is laid out.

        Args:
            layer_index: Of the layer.
            seen_only: Tiles that were not noted may hold anything finite.
        """
        return self.layers[layer_index]

    def lay_out_sample(self, layer_index: int, slot_R: Tensor) -> LayerTable:
        """A layer of which some keys alone are read: those of these slots, tile by tile, equally many of each."""
        return self.layers[layer_index]

    def key_codes(self, layer_index: int) -> KeyCodes | None:
        """Keys of a layer where they lie, if those of its history lie as codes."""
        return None

    def remember(self, layer_index: int, position_T3: Tensor) -> None:
        """The chunk in hand is clean: it becomes the newest of the past."""
        self._announce([layer_index])
        self._take_over(self.layers[layer_index], position_T3)
        self._views.pop(layer_index, None)

    def remember_chunk(self, position_T3: Tensor) -> None:
        """`remember` for all layers, which must stand at the same chunk."""
        if self._work == "layers":
            for index in range(len(self.layers)):
                self.remember(index, position_T3)
            return
        self._views.clear()
        for group, together in zip(self._groups, self._together, strict=True):
            self._announce(group)
            first = self.layers[group[0]]
            together = replace(
                together, pointer=first.pointer, num_chunks=first.num_chunks, position_of=dict(first.position_of)
            )
            assert all(self.layers[index].num_chunks == first.num_chunks for index in group)
            self._take_over(together, position_T3)
            for index in group:
                layer = self.layers[index]
                layer.pointer, layer.num_chunks = together.pointer, together.num_chunks
                layer.position_of = dict(together.position_of)

    def _announce(self, layer_indices: Iterable[int]) -> None:
        """These layers are about to take over a chunk."""
        for index in layer_indices:
            layer, s = self.layers[index], self.settings
            self.before_change(index, layer.num_chunks < s.sink_chunks or layer.pointer == s.history_tokens)

    def _take_over(self, layer: LayerTable, position_T3: Tensor) -> None:
        s, index = self.settings, layer.num_chunks
        layer.num_chunks += 1
        if index < s.sink_chunks:
            start = index * s.chunk_slots
        else:
            start = s.recent_start + (index - s.sink_chunks) % s.recent_chunks * s.chunk_slots
            if start in layer.position_of:
                self._absorb(layer, start)
        self._copy(layer, s.own_start, start)
        self._mark("moving chunks")
        layer.position_of[start] = position_T3

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        assert chunk.log_mass_BNK is None
        assert chunk.position_K3.dim() == 2
        k_NTD, v_NTD = self.own(layer_index)
        rotation = make_rotation(chunk.position_K3, self.settings.head_dim, self.settings.theta)
        k_NTD.copy_(rotate(chunk.k_BKND, rotation)[0].transpose(0, 1))
        v_NTD.copy_(chunk.v_BKND[0].transpose(0, 1))
        self.remember(layer_index, chunk.position_K3.clone())

    def read(self, layer_index: int) -> KeyValues | None:
        """Keys before RoPE in the order of time. Made for each chunk anew: for tests and measurements."""
        if self.layers[layer_index].num_chunks == 0:
            return None
        if layer_index not in self._views:
            self._views[layer_index] = self._gather(self.layers[layer_index])
        return self._views[layer_index]

    @property
    def has_merged(self) -> bool:
        """Whether some layer's history has been full."""
        return self.layers[0].num_chunks > self.settings.chunks_before_merging

    @property
    def num_tokens(self) -> int:
        layer, s = self.layers[0], self.settings
        return len(layer.position_of) * s.chunk_tokens + layer.pointer

    @property
    def num_bytes(self) -> int:
        """Of slots that hold a key or may have held one."""
        used = self.settings.used_bytes
        return sum(used(self.dtype, len(layer.position_of), layer.pointer) for layer in self.layers if layer.num_chunks)

    def state(self) -> Mapping[str, Tensor]:
        state: dict[str, Tensor] = {}
        for index, layer in enumerate(self.layers):
            for name in self.tensors:
                state[f"{index}.{name}"] = getattr(layer, name)
            state[f"{index}.counts"] = torch.tensor([layer.pointer, layer.num_chunks])
            state |= {f"{index}.at.{start}": position for start, position in layer.position_of.items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._views.clear()
        for index, layer in enumerate(self.layers):
            self.before_change(index, True)
            for name in self.tensors:
                getattr(layer, name).copy_(state[f"{index}.{name}"])
            layer.place(state, index)

    def clear(self) -> None:
        """Empty, for the next video."""
        self._views.clear()
        for index, layer in enumerate(self.layers):
            self.before_change(index, True)
            self._reset(layer, index)

    def _new_layers(self, num: int) -> LayerTable:
        """Layers side by side."""
        s = self.settings
        return LayerTable(**new_tensors(num * s.num_heads, s.num_slots, s, self.dtype, self.device), pointer=0)

    def _layer(self, index: int) -> LayerTable:
        """A view of one layer in its group."""
        num_groups, heads = len(self._groups), self.settings.num_heads
        together, first = self._together[index % num_groups], index // num_groups * heads
        views = {name: getattr(together, name)[first : first + heads] for name in self.tensors}
        return type(together)(**views, pointer=0)

    def _reset(self, layer: LayerTable, index: int) -> None:
        s = self.settings
        for name in self.tensors:
            getattr(layer, name).zero_()
        layer.partner_NC.fill_(-1)
        write_log_mass(layer.k_NLW, s.head_dim, -torch.inf)
        # The chunk in hand exists from its first step on.
        write_log_mass(layer.k_NLW[:, self.run_of(layer, s.own_start)], s.head_dim, 0.0)
        # Layers become full one after another, so that every chunk shrinks as many as the next.
        layer.pointer = index % len(self._groups) * s.chunk_tokens
        layer.num_chunks = 0
        layer.position_of.clear()

    def _copy(self, layer: LayerTable, source: int, target: int) -> None:
        to, of = self.run_of(layer, target), self.run_of(layer, source)
        for x in (as_words(layer.k_NLW), as_words(layer.v_NLD)):
            x[:, to] = x[:, of]

    def _absorb(self, layer: LayerTable, source: int) -> None:
        """A chunk of the newest becomes history."""
        s = self.settings
        if layer.pointer == s.history_tokens:
            self._mark("moving chunks")
            self._shrink(layer)
            self._mark("merging")
        new = slice(layer.pointer, layer.pointer + s.chunk_tokens)
        self._copy(layer, source, s.history_start + new.start)
        layer.position_NC3[:, new] = layer.position_of[source]
        layer.m_NC[:, new] = 1
        layer.weight_NC[:, new] = 1.0
        self._mark("moving chunks")
        layer.pointer = new.stop
        if self._kernels is not None:
            self._kernels.match(self._history(layer), layer.partner_NC, self._turn_back, new, self._look)
        else:
            if s.candidate_tiles:
                self._average_new(layer, new)
            slot, cosine = find_partners(self._history(layer), self._turn_back, new, self._look)
            layer.partner_NC[:, new] = torch.where(cosine.isneginf(), -1, slot).to(torch.int32)
        self._mark("matching")

    def _mark(self, part: str) -> None:
        if self.on_part is not None:
            self.on_part(part)

    def _history(self, layer: LayerTable) -> History:
        return History(layer.k_NLW, self.settings.history_start, layer.position_NC3, layer.m_NC, layer.mean_NJD)

    def _average_new(self, layer: LayerTable, new: slice) -> None:
        """Means of the tiles of these slots."""
        s = self.settings
        self._average(layer, new.start // s.tile, -(-s.chunk_tokens // s.tile) + 1)

    def _average_as_kernels(self, layer: LayerTable, new: slice) -> None:
        """Of just the tiles that kernels make anew: those of these slots and of the latent frame before, whose keys
        have been rounded since where a table rounds."""
        tile, first = self.settings.tile, max(0, new.start - self.settings.frame_tokens)
        self._average(layer, first // tile, -(-new.stop // tile) - first // tile)

    def _average(self, layer: LayerTable, first: int, num: int) -> None:
        """Means of these tiles, or of as many that end with the history."""
        s = self.settings
        first = max(0, min(first, layer.mean_NJD.shape[1] - num))
        num = min(num, layer.mean_NJD.shape[1])
        run = slice(first * s.tile, (first + num) * s.tile)
        unit = self._turn_back.unit(self._history(layer).keys[:, run], layer.position_NC3[:, run])
        there = (layer.m_NC[:, run, None] > 0).to(unit.dtype)
        layer.mean_NJD[:, first : first + num] = (unit * there).unflatten(1, (num, -1)).mean(2)

    def _shrink(self, layer: LayerTable) -> None:
        s = self.settings
        used, records, room = self._used(layer), self._records(layer), self._room(layer)
        layer.pointer = s.kept_tokens
        if self._kernels is not None:
            # The buffer is that of one layer, however many go together.
            self._kernels.merge(used, records, self._turn_back, room, heads_at_once=s.num_heads, tile=s.tile)
            return
        v, _, weight, partner = records
        self._rewrite(layer, shrink(used, v, weight, partner, self._turn_back, room, self._fuse))
        if s.candidate_tiles:
            self._average(layer, 0, layer.mean_NJD.shape[1])

    def _room(self, layer: LayerTable) -> Room:
        """What a full history of this layer needs."""
        s = self.settings
        live = min(s.history_tokens, (layer.num_chunks - 1 - s.sink_chunks - s.recent_chunks) * s.chunk_tokens)
        merges = min(s.spare_tokens, max(0, live - s.kept_tokens))
        return Room(s.kept_tokens, merges, s.rule, s.rate, MEMBERS_LISTED[s.rule])

    def _used(self, layer: LayerTable) -> History:
        stop = self.settings.history_tokens
        start = self.settings.history_start
        return History(layer.k_NLW, start, layer.position_NC3[:, :stop], layer.m_NC[:, :stop], layer.mean_NJD)

    def _records(self, layer: LayerTable) -> tuple[Tensor, ...]:
        """Values in the slots of the keys; m, weight and partner of those of the history that are used."""
        stop = self.settings.history_tokens
        return layer.v_NLD, layer.m_NC[:, :stop], layer.weight_NC[:, :stop], layer.partner_NC[:, :stop]

    def _rewrite(self, layer: LayerTable, found: Survivors) -> None:
        s = self.settings
        kept = slice(s.history_start, s.history_start + s.kept_tokens)
        k = take_rows(layer.k_NLW, found.source, s.history_start)
        write_log_mass(k, s.head_dim, found.weight.masked_fill(~found.is_key, 0.0).log())
        layer.k_NLW[:, kept] = k
        layer.v_NLD[:, kept] = found.v_NCD
        layer.position_NC3[:, : s.kept_tokens] = take_rows(layer.position_NC3, found.source)
        for name in ("m", "weight", "partner"):
            getattr(layer, f"{name}_NC")[:, : s.kept_tokens] = getattr(found, name)
        free = slice(kept.stop, s.history_start + s.history_tokens)
        write_log_mass(layer.k_NLW[:, free], s.head_dim, -torch.inf)
        layer.m_NC[:, s.kept_tokens :] = 0
        layer.weight_NC[:, s.kept_tokens :] = 0.0
        layer.partner_NC[:, s.kept_tokens :] = -1

    def _gather(self, layer: LayerTable) -> KeyValues:
        s = self.settings
        sink = [start for start in layer.position_of if start < s.history_start]
        newest = sorted(
            (start for start in layer.position_of if start >= s.recent_start),
            key=lambda start: float(layer.position_of[start][0, 0]),
        )
        history = slice(s.history_start, s.history_start + layer.pointer)
        runs = [slice(start, start + s.chunk_tokens) for start in sorted(sink)]
        runs += [history] if layer.pointer else []
        runs += [slice(start, start + s.chunk_tokens) for start in newest]
        positions = [
            layer.position_NC3[:, : layer.pointer]
            if run is history
            else layer.position_of[run.start].float().expand(s.num_heads, -1, 3)
            for run in runs
        ]
        k, v = (torch.cat([x[:, run] for run in runs], 1) for x in (layer.k_NLW, layer.v_NLD))
        position = torch.cat(positions, 1)
        before = self._turn_back(k, position).to(self.dtype)
        mass = read_log_mass(k, s.head_dim)
        return KeyValues(
            before.transpose(0, 1)[None], v.transpose(0, 1)[None], position.transpose(0, 1)[None], mass[None]
        )


def load_kernels(settings: TableSettings) -> TableKernels:
    """The module of the kernels, Triton with it."""
    assert not settings.kernels_lack, settings.kernels_lack
    from workers.cache import table_kernels

    return table_kernels

"""A tile table whose history lies in few bits: a layer is unpacked into one workspace before it is read or changed.

What reads and changes a layer is that of `tile_table.py`, on the workspace; afterwards what changed is packed again.
Kernels read codes where they lie and write them from where a chunk lies: they merge (`triton_collect.py`) and take over
a chunk (`triton_match.py`) without unpacking, layers that become full together as one. By plain torch layers do so one
after another, since there is one workspace.
Coding twice changes nothing (`table_codes.py`), so rounding does not add up over merges: a key that stays has the codes
that it came with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from workers.cache.layer_table import TENSORS, LayerTable, new_tensors
from workers.cache.packed_history import PACKED, PackedLayer, Packing, PlainPacking, Workspace, new_codes
from workers.cache.table_layout import TableSettings
from workers.cache.tile_table import TableKernels, TableWork, TileTable, load_kernels
from workers.coded_tiles import CodedTiles
from workers.contracts import KeyValues
from workers.key_codes import KeyCodes
from workers.search.nearest_rows import NearestRows, nearest_rows


def make_table(
    settings: TableSettings,
    dtype: torch.dtype,
    device: torch.device,
    nearest: NearestRows = nearest_rows,
    work: TableWork = "layers",
) -> TileTable:
    """The table that stores as the settings say; arguments as of `TileTable`."""
    kind = TileTable if settings.storage == "model" else PackedTable
    return kind(settings, dtype, device, nearest, work)


class PackedTable(TileTable):
    """The cache; arguments as of `TileTable`, `settings.storage` not "model"."""

    is_packed: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = (*TENSORS, *PACKED)
    history_tensors: ClassVar[tuple[str, ...]] = (*TileTable.history_tensors, *PACKED)

    def __init__(
        self,
        settings: TableSettings,
        dtype: torch.dtype,
        device: torch.device,
        nearest: NearestRows = nearest_rows,
        work: TableWork = "layers",
    ) -> None:
        super().__init__(settings, dtype, device, nearest, work)
        s = settings
        self.workspace = Workspace(s, dtype, device)
        self._coded: CodedTiles | None = None
        self._packing: Packing = PlainPacking() if self._kernels is None else load_kernels(s)
        if self._kernels is not None and s.rule == "pairs":
            for group, together in zip(self._groups, self._together, strict=True):
                assert isinstance(together, PackedLayer)
                together.apart_NC = torch.full_like(together.weight_NC, -1.0)
                for index, apart_NC in zip(group, together.apart_NC.split(s.num_heads), strict=True):
                    layer = self.layers[index]
                    assert isinstance(layer, PackedLayer)
                    layer.apart_NC = apart_NC
        tiles = s.num_slots // s.tile
        self._is_seen_LNJ = torch.ones(s.num_layers, s.num_heads, tiles, dtype=torch.uint8, device=device)

    def run_of(self, layer: LayerTable, start: int) -> slice:
        if isinstance(layer, PackedLayer) and start >= self.settings.recent_start:
            start -= self.settings.history_slots
        return super().run_of(layer, start)

    def note_seen(self, layer_index: int, index_NIJ: Tensor) -> None:
        self._packing.flag_listed(index_NIJ, self._is_seen_LNJ[layer_index])

    @property
    def seen_share(self) -> float:
        """Of the tiles of all layers and heads, those that were noted; waits for the device."""
        return float(self._is_seen_LNJ.float().mean())

    def lay_out(self, layer_index: int, *, seen_only: bool = False) -> LayerTable:
        return self._lay_out(self.layers[layer_index], self._is_seen_LNJ[layer_index] if seen_only else None)

    def lay_out_sample(self, layer_index: int, slot_R: Tensor) -> LayerTable:
        layer = self.layers[layer_index]
        assert isinstance(layer, PackedLayer)
        self._packing.unpack_sample(layer, self.workspace, self.settings, slot_R)
        return self._in_workspace(layer)

    def key_codes(self, layer_index: int) -> KeyCodes:
        layer = self.layers[layer_index]
        assert isinstance(layer, PackedLayer)
        codes = layer.k_code_NCB, layer.k_largest_NCG, layer.mass_NC2
        return KeyCodes(*codes, layer.k_NLW, self.settings.history_start)

    def lay_out_coded(self, layer_index: int) -> CodedTiles:
        """The tiles of a layer that were noted, in 8-bit floats, until anything else is laid out."""
        layer = self.layers[layer_index]
        assert isinstance(layer, PackedLayer)
        if self._coded is None:
            self._coded = self.workspace.coded(self.settings)
        self._packing.unpack_coded(layer, self._coded, self.settings, self._is_seen_LNJ[layer_index])
        return self._coded

    def remember_chunk(self, position_T3: Tensor) -> None:
        if self._kernels is not None:
            super().remember_chunk(position_T3)
            return
        for index in range(len(self.layers)):
            self.remember(index, position_T3)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore(state)
        for layer in self.layers:
            self._forget_distances(layer)

    def _forget_distances(self, layer: LayerTable) -> None:
        assert isinstance(layer, PackedLayer)
        if layer.apart_NC is not None:
            layer.apart_NC.fill_(-1.0)

    def _lay_out(self, layer: LayerTable, is_seen_NJ: Tensor | None = None) -> LayerTable:
        assert isinstance(layer, PackedLayer)
        self._packing.unpack(layer, self.workspace, self.settings, is_seen_NJ)
        return self._in_workspace(layer)

    def _in_workspace(self, layer: LayerTable) -> LayerTable:
        """What is unpacked there, with the records of the layer."""
        held = {name: getattr(layer, name) for name in (*TENSORS, "pointer", "num_chunks", "position_of")}
        return LayerTable(**held | {"k_NLW": self.workspace.k_NLW, "v_NLD": self.workspace.v_NLD})

    def _absorb(self, layer: LayerTable, source: int) -> None:
        assert isinstance(layer, PackedLayer)
        self._mark("moving chunks")
        if self._kernels is not None:
            self._absorb_as_codes(layer, source, self._kernels)
            return
        merges = layer.pointer == self.settings.history_tokens
        laid_out = self._lay_out(layer)
        self._mark("unpacking")
        super()._absorb(laid_out, source)
        changed = slice(0 if merges else layer.pointer, laid_out.pointer)
        layer.pointer = laid_out.pointer
        self._packing.pack(layer, self.workspace, self.settings, changed)
        # A merge frees slots behind the pointer, whose codes may stay: there is no key by their log m.
        self._keep_log_mass(layer, slice(0, self.settings.history_tokens) if merges else changed)
        self._mark("packing")

    def _absorb_as_codes(self, layer: PackedLayer, source: int, kernels: TableKernels) -> None:
        """Nothing is laid out: kernels read the chunk where it lies, and codes where they lie."""
        s = self.settings
        if layer.pointer == s.history_tokens:
            kernels.merge_into_codes(layer, self._turn_back, self._room(layer), s)
            layer.pointer = s.kept_tokens
            self._mark("merging")
        new, run = slice(layer.pointer, layer.pointer + s.chunk_tokens), self.run_of(layer, source)
        chunk = layer.k_NLW[:, run], layer.v_NLD[:, run], layer.position_of[source].float()
        kernels.take_in(layer, chunk, new, self._turn_back, self._look, s)
        layer.pointer = new.stop
        self._mark("matching")

    def _average_new(self, layer: LayerTable, new: slice) -> None:
        self._average_as_kernels(layer, new)

    def _keep_log_mass(self, layer: PackedLayer, changed: slice) -> None:
        s = self.settings
        run = slice(s.history_start + changed.start, s.history_start + changed.stop)
        layer.mass_NC2[:, changed] = self.workspace.k_NLW[:, run, s.head_dim : s.head_dim + 2]

    def _gather(self, layer: LayerTable) -> KeyValues:
        return super()._gather(self._lay_out(layer))

    def _new_layers(self, num: int) -> LayerTable:
        s, heads = self.settings, num * self.settings.num_heads
        ends = new_tensors(heads, s.num_slots - s.history_slots, s, self.dtype, self.device)
        return PackedLayer(**ends, pointer=0, **new_codes(heads, s, self.dtype, self.device))

    def _reset(self, layer: LayerTable, index: int) -> None:
        super()._reset(layer, index)
        assert isinstance(layer, PackedLayer)
        dim = self.settings.head_dim
        # Nothing is in the first slot of all yet, and it is never one of the chunk in hand.
        layer.mass_NC2.copy_(layer.k_NLW[:, :1, dim : dim + 2])
        self._forget_distances(layer)

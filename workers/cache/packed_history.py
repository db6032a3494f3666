"""A layer of a tile table whose history lies in few bits, and the place where a layer is laid out as kernels read it.

Sink, newest chunks and the chunk in hand lie as computed, one after another; of the history lie codes, the largest
channel of each group and the two channels of log m. What is plain torch here is the reference of `triton_pack.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.cache.layer_table import LayerTable
from workers.cache.table_codes import code_dtype, code_width, decode_into, encode, group_channels
from workers.cache.table_layout import TableSettings
from workers.coded_tiles import CODED_TILE, TILE_BYTES, CodedTiles, code_tiles_plain, room_for_tiles

PACKED = ("k_code_NCB", "k_largest_NCG", "v_code_NCB", "v_largest_NCG", "mass_NC2")
_RUN_SLOTS = 16384
"""Written anew at a time by plain torch, which passes through float32."""


@dataclass(eq=False, kw_only=True)
class PackedLayer(LayerTable):
    """Its keys and values are those outside of the history: sink | newest | chunk in hand."""

    k_code_NCB: Tensor
    k_largest_NCG: Tensor
    v_code_NCB: Tensor
    v_largest_NCG: Tensor
    mass_NC2: Tensor
    """The channels of log m, in the dtype of the keys."""
    apart_NC: Tensor | None = None
    """For kernels that merge pairs: squared distance of each key from its partner's, float32; -1 where it is not known.
    Found again where it is lost, so no snapshot has it."""


def heads_of(layer: PackedLayer, run: slice) -> PackedLayer:
    """Some heads of layers side by side: views."""
    held = {field.name: getattr(layer, field.name) for field in fields(layer)}
    views: dict[str, Any] = {name: x[run] for name, x in held.items() if isinstance(x, Tensor)}
    return replace(layer, **views)


class Workspace:
    """Keys and values of one layer in whole tiles, sink | history | newest | chunk in hand."""

    def __init__(self, s: TableSettings, dtype: torch.dtype, device: torch.device) -> None:
        self.k_NLW = torch.zeros(s.num_heads, s.num_slots, s.width, dtype=dtype, device=device)
        self.v_NLD = torch.zeros(s.num_heads, s.num_slots, s.head_dim, dtype=dtype, device=device)

    def coded(self, s: TableSettings) -> CodedTiles:
        """Room for the layer in 8-bit floats, which take the memory of values: only one of the two is there."""
        assert s.head_dim == s.tile == CODED_TILE
        shape = s.num_heads, s.num_slots // s.tile, TILE_BYTES
        values = self.v_NLD.view(torch.uint8).view(-1)
        assert self.v_NLD.dtype.itemsize == 2
        k_NTB, v_NTB = (part.view(shape) for part in values.chunk(2))
        return room_for_tiles(*shape[:2], values.device, (k_NTB, v_NTB))


class Packing(Protocol):
    """The ways between the tensors of a layer and the workspace."""

    def unpack(self, layer: PackedLayer, to: Workspace, s: TableSettings, is_seen_NJ: Tensor | None) -> None: ...

    def unpack_sample(self, layer: PackedLayer, to: Workspace, s: TableSettings, slot_R: Tensor) -> None: ...

    def unpack_coded(self, layer: PackedLayer, to: CodedTiles, s: TableSettings, is_seen_NJ: Tensor) -> None: ...

    def pack(self, layer: PackedLayer, of: Workspace, s: TableSettings, new: slice) -> None: ...

    def flag_listed(self, index_NIJ: Tensor, is_seen_NJ: Tensor) -> None: ...


def new_codes(heads: int, s: TableSettings, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """`PACKED`, zero."""
    assert s.storage != "model"
    codes = (heads, s.history_slots, code_width(s.head_dim, s.storage)), code_dtype(s.storage)
    groups = (heads, s.history_slots, s.head_dim // group_channels(s.head_dim, s.storage)), torch.bfloat16
    mass = (heads, s.history_slots, 2), dtype
    shapes = (codes, groups, codes, groups, mass)
    made = [torch.zeros(shape, dtype=kind, device=device) for shape, kind in shapes]
    return dict(zip(PACKED, made, strict=True))


class PlainPacking:
    """By plain torch."""

    def unpack(self, layer: PackedLayer, to: Workspace, s: TableSettings, is_seen_NJ: Tensor | None) -> None:
        """Lay out a layer.

        Args:
            layer: Of as many heads as the workspace.
            to: Written; its channels behind those of log m are zero and stay so.
            s: Sizes.
            is_seen_NJ: uint8; tiles of 0 may be left as they are. Here all are written.
        """
        assert s.storage != "model"
        ends = (
            (slice(0, s.history_start), slice(0, s.history_start)),
            (
                slice(s.recent_start, s.num_slots),
                slice(s.history_start, s.num_slots - s.history_slots),
            ),
        )
        for there, here in ends:
            to.k_NLW[:, there], to.v_NLD[:, there] = layer.k_NLW[:, here], layer.v_NLD[:, here]
        history = slice(s.history_start, s.recent_start)
        run = to.k_NLW[:, history]
        decode_into(layer.k_code_NCB, layer.k_largest_NCG, run[..., : s.head_dim], s.storage)
        run[..., s.head_dim : s.head_dim + 2] = layer.mass_NC2
        decode_into(layer.v_code_NCB, layer.v_largest_NCG, to.v_NLD[:, history], s.storage)

    def unpack_sample(self, layer: PackedLayer, to: Workspace, s: TableSettings, slot_R: Tensor) -> None:
        """Lay out some keys of a layer, for what reads no others; other slots of the workspace are left as they are.

        Args:
            layer: Of as many heads as the workspace.
            to: Written, as by `unpack`.
            s: Sizes.
            slot_R: int64: slots of the table, tile by tile, equally many of each.
        """
        assert s.storage != "model"
        per_tile = len(slot_R) // (s.num_slots // s.tile)
        first, stop = (start // s.tile * per_tile for start in (s.history_start, s.recent_start))
        slot = slot_R[first:stop] - s.history_start
        k = to.k_NLW.new_zeros(len(to.k_NLW), len(slot), s.width)
        decode_into(layer.k_code_NCB[:, slot], layer.k_largest_NCG[:, slot], k[..., : s.head_dim], s.storage)
        k[..., s.head_dim : s.head_dim + 2] = layer.mass_NC2[:, slot]
        to.k_NLW[:, slot_R[first:stop]] = k
        to.k_NLW[:, slot_R[:first]] = layer.k_NLW[:, slot_R[:first]]
        to.k_NLW[:, slot_R[stop:]] = layer.k_NLW[:, slot_R[stop:] - s.history_slots]

    def unpack_coded(self, layer: PackedLayer, to: CodedTiles, s: TableSettings, is_seen_NJ: Tensor) -> None:
        """Lay out a layer in 8-bit floats, rounded once; sink and newest chunks are cast as they are.

        Args:
            layer: Of 128 channels a head in tiles of 128 keys.
            to: Of all its slots; written.
            s: Sizes.
            is_seen_NJ: uint8; tiles of 0 may be left as they are. Here all are written.
        """
        wide = Workspace(s, torch.float32, to.k_NTB.device)
        self.unpack(layer, wide, s, None)
        for x, values in zip(to, code_tiles_plain(wide.k_NLW, wide.v_NLD), strict=True):
            x.copy_(values)

    def pack(self, layer: PackedLayer, of: Workspace, s: TableSettings, new: slice) -> None:
        """Write these slots of the history from the workspace; log m is not among what is written."""
        assert s.storage != "model"
        for first in range(new.start, new.stop, _RUN_SLOTS):
            slots = slice(first, min(first + _RUN_SLOTS, new.stop))
            run = slice(s.history_start + slots.start, s.history_start + slots.stop)
            for x, code, largest in (
                (of.k_NLW[:, run, : s.head_dim], layer.k_code_NCB, layer.k_largest_NCG),
                (of.v_NLD[:, run], layer.v_code_NCB, layer.v_largest_NCG),
            ):
                code[:, slots], largest[:, slots] = encode(x, s.storage)

    def flag_listed(self, index_NIJ: Tensor, is_seen_NJ: Tensor) -> None:
        """Write which tiles of a head are on some list of it, uint8; lists are contiguous."""
        is_seen_NJ.zero_().scatter_(1, index_NIJ.flatten(1).long(), 1)

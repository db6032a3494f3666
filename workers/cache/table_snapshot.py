"""A snapshot of a tile table between two chunks, made while the next chunks are: a few layers in each of them.

Keys and values in int8 with one scale a vector (as `low_bit.py`: writing what was read changes nothing), all else as it
is, a packed history's codes too, in pinned host memory. A chunk that is taken over changes the newest chunks and fills
what was free; the sink and what the history held stay as they were until the layer merges, and each time only some of
the layers do. So the newest chunks of all layers and the layers that merge next are copied at once, the others during
the next chunks, each before it merges: nothing is kept twice, and all is of one moment. A layer that changes sooner is
copied first; whoever changes a layer waits, on the device, for its own copy and no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from workers.cache.layer_table import LayerTable
from workers.cache.side_work import SideWork, Wait, make_side_work
from workers.cache.tile_table import TileTable

_LIMIT = 127


class TableSnapshot:
    """Buffers for one snapshot at a time of one table; on a GPU the host's are pinned, which takes seconds once.

    Args:
        table: While this exists, its `before_change` belongs to it.
        side: Where copies are made; None for a stream of their own where there are any.
    """

    def __init__(self, table: TileTable, side: SideWork | None = None) -> None:
        self._table, self._side = table, side or make_side_work(table.device, "snapshot of a table")
        self._share = -(-len(table.layers) // table.settings.spare_chunks)
        self._host = [self._host_layer(layer) for layer in table.layers]
        self._host_positions: list[Tensor] = []
        self._counts: list[tuple[int, int]] = []
        self._positions: list[dict[int, Tensor]] = []
        self._left: list[int] = []
        self._wait_for_newest: dict[int, Wait] = {}
        self._wait_for_layer: dict[int, Wait] = {}
        self._is_begun = False
        self._encode: Callable[..., tuple[Tensor, Tensor, Tensor]] = encode_chunk
        table.before_change = self._before_change

    def compile(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Fuse the encoding; all chunks have one shape."""
        self._encode = torch.compile(encode_chunk, dynamic=False, backend=backend)

    @property
    def num_layers_left(self) -> int:
        """Layers whose copy has not been asked for yet; 0 when `finish` adds nothing to what the device has to do."""
        return len(self._left)

    @torch.no_grad()
    def begin(self) -> None:
        """Between two chunks: the snapshot is of the table as the work queued so far leaves it. Returns at once."""
        assert not self._is_begun, "the snapshot before has not been finished"
        layers = self._table.layers
        self._counts = [(layer.pointer, layer.num_chunks) for layer in layers]
        self._left = sorted(range(len(layers)), key=lambda index: -layers[index].pointer)
        self._is_begun = True
        self._wait_for_newest = dict.fromkeys(range(len(layers)), self._side.run(self._copy_newest))
        self._go_on()

    @torch.no_grad()
    def finish(self) -> Mapping[str, Tensor]:
        """Wait for the copy; its tensors on the host, valid until the next `begin`."""
        assert self._is_begun, "no snapshot has been begun"
        while self._left:
            self._go_on()
        self._side.finish()
        self._is_begun = False
        self._wait_for_newest.clear()
        self._wait_for_layer.clear()
        state: dict[str, Tensor] = {}
        for index, (pointer, _) in enumerate(self._counts):
            state |= {f"{index}.{name}": self._held(index, name, pointer) for name in self._host[index]}
            state[f"{index}.counts"] = torch.tensor(self._counts[index])
            state |= {f"{index}.at.{start}": position for start, position in self._positions[index].items()}
        return state

    def _before_change(self, index: int, is_history: bool) -> None:
        if not self._is_begun:
            return
        if index == 0:  # another chunk
            self._go_on()
        if is_history and index in self._left:
            self._begin_layer(index)
        waits = [self._wait_for_newest.pop(index, None)]
        if is_history:
            waits.append(self._wait_for_layer.pop(index, None))
        for wait in waits:
            if wait is not None:
                wait()

    def _go_on(self) -> None:
        """The next layers: those that merge first."""
        for index in self._left[: self._share]:
            self._begin_layer(index)

    def _begin_layer(self, index: int) -> None:
        self._left.remove(index)
        self._wait_for_layer[index] = self._side.run(lambda: self._copy_layer(index))

    @torch.no_grad()
    def _copy_newest(self) -> None:
        """What the next chunk changes in every layer."""
        s = self._table.settings
        copied: dict[int, Tensor] = {}
        self._positions = []
        for layer, host in zip(self._table.layers, self._host, strict=True):
            for place, start in enumerate(chunk_starts(self._table, 0)[: s.recent_chunks]):
                self._copy_chunk(layer, host, place, start)
            host["mean_NJD"].copy_(layer.mean_NJD, non_blocking=True)
            for position in layer.position_of.values():
                if id(position) not in copied:
                    copied[id(position)] = self._copy_position(position, len(copied))
            self._positions.append({start: copied[id(position)] for start, position in layer.position_of.items()})

    def _copy_layer(self, index: int) -> None:
        """What stays until the layer merges."""
        layer, host, s = self._table.layers[index], self._host[index], self._table.settings
        for place, start in enumerate(chunk_starts(self._table, self._counts[index][0])):
            if place >= s.recent_chunks:
                self._copy_chunk(layer, host, place, start)
        pointer, _ = self._counts[index]
        for name in self._table.history_tensors:
            self._held(index, name, pointer).copy_(getattr(layer, name)[:, :pointer].contiguous(), non_blocking=True)

    def _held(self, index: int, name: str, pointer: int) -> Tensor:
        """What a buffer of a layer holds if its history reaches up to there."""
        buffer = self._host[index][name]
        if name in self._table.history_tensors:
            heads, _, *rest = buffer.shape
            return buffer.flatten()[: heads * pointer * math.prod(rest)].view(heads, pointer, *rest)
        return buffer if name == "mean_NJD" else buffer[: len(chunk_starts(self._table, pointer))]

    def _copy_chunk(self, layer: LayerTable, host: Mapping[str, Tensor], place: int, start: int) -> None:
        s = self._table.settings
        run = self._table.run_of(layer, start)
        k_code, v_code, fact = self._encode(layer.k_NLW[:, run, : s.head_dim + 2], layer.v_NLD[:, run], s.head_dim)
        host["code"][place, 0].copy_(k_code, non_blocking=True)
        host["code"][place, 1].copy_(v_code, non_blocking=True)
        host["fact"][place].copy_(fact, non_blocking=True)

    def _copy_position(self, position: Tensor, number: int) -> Tensor:
        if number == len(self._host_positions):
            self._host_positions.append(self._host_like(position.shape, position.dtype))
        return self._host_positions[number].copy_(position, non_blocking=True)

    def _host_layer(self, layer: LayerTable) -> dict[str, Tensor]:
        s = self._table.settings
        chunks = len(chunk_starts(self._table, s.history_tokens)), s.num_heads, s.chunk_tokens
        host = {
            "code": self._host_like((chunks[0], 2, *chunks[1:], s.head_dim), torch.int8),
            "fact": self._host_like((*chunks, 4), self._table.dtype),
        }
        copied = {name: getattr(layer, name) for name in (*self._table.history_tensors, "mean_NJD")}
        return host | {name: self._host_like(x.shape, x.dtype) for name, x in copied.items()}

    def _host_like(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._table.device.type == "cuda")


@torch.no_grad()
def restore_table(table: TileTable, state: Mapping[str, Tensor]) -> None:
    """Become the table that a snapshot was taken of, up to the rounding of its vectors."""
    s = table.settings
    table.clear()
    for index, layer in enumerate(table.layers):
        layer.place(state, index)
        layer.mean_NJD.copy_(state[f"{index}.mean_NJD"])
        for name in table.history_tensors:
            getattr(layer, name)[:, : layer.pointer] = state[f"{index}.{name}"].to(table.device)
        code, fact = (state[f"{index}.{name}"] for name in ("code", "fact"))
        for place, start in enumerate(chunk_starts(table, layer.pointer)):
            run = table.run_of(layer, start)
            (k, v), facts = code[place].to(table.device), fact[place].to(table.device)
            layer.k_NLW[:, run, : s.head_dim] = decode(k, facts[..., 0], table.dtype)
            layer.v_NLD[:, run] = decode(v, facts[..., 1], table.dtype)
            layer.k_NLW[:, run, s.head_dim : s.head_dim + 2] = facts[..., 2:]


def chunk_starts(table: TileTable, pointer: int) -> list[int]:
    """First slots of what a snapshot codes, in chunks: the newest, the sink, the history up to the pointer."""
    s = table.settings
    newest = [s.recent_start + place * s.chunk_slots for place in range(s.recent_chunks)]
    sink = [place * s.chunk_slots for place in range(s.sink_chunks)]
    history = range(0, 0 if table.is_packed else pointer, s.chunk_tokens)
    return newest + sink + [s.history_start + slot for slot in history]


def encode_chunk(k_NTX: Tensor, v_NTD: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of keys and values; and their scales with the channels of log m, [N, T, 4] in the dtype of the keys."""
    k_code, k_scale = encode(k_NTX[..., :head_dim])
    v_code, v_scale = encode(v_NTD)
    scales = torch.stack((k_scale, v_scale), -1).to(k_NTX.dtype)  # exact: bfloat16 or wider
    return k_code, v_code, torch.cat((scales, k_NTX[..., head_dim : head_dim + 2]), -1)


def encode(x_NRD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of vectors; the largest channel gets the largest code, so decoding and encoding is stable."""
    x = x_NRD.float()
    scale = (x.abs().amax(-1) / _LIMIT).to(torch.bfloat16)
    code = (x / scale.float().clamp(min=1e-30)[..., None]).round().clamp(-_LIMIT, _LIMIT)
    return code.to(torch.int8), scale


def decode(code_NRD: Tensor, scale_NR: Tensor, dtype: torch.dtype) -> Tensor:
    return (code_NRD.float() * scale_NR.float()[..., None]).to(dtype)

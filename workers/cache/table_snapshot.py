"""A snapshot of a tile table, taken on a stream of its own while the next chunk is made, into pinned host memory.

Keys and values in int8 with one scale a vector (as `low_bit.py`: writing what was read changes nothing), all else as it
is. Between two chunks the table stands still but for the chunk in hand, which is not part of a snapshot; a layer that
must take over the next chunk waits until its own copy is made, and no other does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from workers.cache.tile_table import LayerTable, TileTable

_LIMIT = 127
_RECORDS = ("position_NC3", "m_NC", "weight_NC", "partner_NC", "mean_NJD")


class TableSnapshot:
    """Buffers for one snapshot at a time of one table; on a GPU the host's are pinned, which takes seconds once.

    Args:
        table: While this exists, its `before_change` belongs to it.
    """

    def __init__(self, table: TileTable) -> None:
        self._table, self._is_cuda = table, table.device.type == "cuda"
        s = table.settings
        shape = (s.num_heads, s.own_start)
        first = table.layers[0]
        self._staged = {
            name: torch.empty((*shape, s.head_dim), dtype=torch.int8, device=table.device) for name in ("k", "v")
        } | {name: torch.empty(shape, dtype=torch.bfloat16, device=table.device) for name in ("k_scale", "v_scale")}
        self._host = [
            {name: self._host_like(x) for name, x in self._staged.items()}
            | {"mass": self._host_like(_mass(first, s.own_start, s.head_dim))}
            | {name: self._host_like(getattr(first, name)) for name in _RECORDS}
            for _ in table.layers
        ]
        self._stream = torch.cuda.Stream() if self._is_cuda else None
        self._copied: list[torch.cuda.Event | None] = [None] * len(table.layers)
        self._counts: list[tuple[int, int]] = []
        self._positions: list[dict[int, Tensor]] = []
        self._encode: Callable[[Tensor, Tensor, Tensor], None] = encode_into
        table.before_change = self._wait_for

    @property
    def num_bytes(self) -> int:
        """Of all layers on the host."""
        return sum(x.nbytes for layer in self._host for x in layer.values())

    def compile(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Fuse the encoding."""
        self._encode = torch.compile(encode_into, dynamic=False, backend=backend)

    @torch.no_grad()
    def begin(self) -> None:
        """Between two chunks: copy the table as it stands once the work queued so far is done. Returns at once."""
        layers = self._table.layers
        self._counts = [(layer.pointer, layer.num_chunks) for layer in layers]
        self._positions = [dict(layer.position_of) for layer in layers]
        if self._stream is None:
            for index in range(len(layers)):
                self._copy(index)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for index in range(len(layers)):
                self._copy(index)
                event = self._copied[index] = torch.cuda.Event()
                event.record()

    def finish(self) -> Mapping[str, Tensor]:
        """Wait for the copy; its tensors on the host, valid until the next `begin`."""
        if self._stream is not None:
            self._stream.synchronize()
        state: dict[str, Tensor] = {}
        for index, host in enumerate(self._host):
            state |= {f"{index}.{name}": tensor for name, tensor in host.items()}
            state[f"{index}.counts"] = torch.tensor(self._counts[index])
            state |= {f"{index}.at.{start}": at.cpu() for start, at in self._positions[index].items()}
        return state

    def _copy(self, index: int) -> None:
        layer, s = self._table.layers[index], self._table.settings
        self._encode(layer.k_NLW[:, : s.own_start, : s.head_dim], self._staged["k"], self._staged["k_scale"])
        self._encode(layer.v_NLD[:, : s.own_start], self._staged["v"], self._staged["v_scale"])
        sources = self._staged | {"mass": _mass(layer, s.own_start, s.head_dim)}
        sources |= {name: getattr(layer, name) for name in _RECORDS}
        for name, source in sources.items():
            self._host[index][name].copy_(source, non_blocking=True)

    def _wait_for(self, index: int) -> None:
        event = self._copied[index]
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    def _host_like(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=self._is_cuda)


@torch.no_grad()
def restore_table(table: TileTable, state: Mapping[str, Tensor]) -> None:
    """Become the table that a snapshot was taken of, up to the rounding of its vectors."""
    s = table.settings
    table.clear()
    for index, layer in enumerate(table.layers):
        part = {name: state[f"{index}.{name}"].to(table.device) for name in ("k", "k_scale", "v", "v_scale", "mass")}
        layer.k_NLW[:, : s.own_start, : s.head_dim] = decode(part["k"], part["k_scale"], table.dtype)
        layer.k_NLW[:, : s.own_start, s.head_dim : s.head_dim + 2] = part["mass"]
        layer.v_NLD[:, : s.own_start] = decode(part["v"], part["v_scale"], table.dtype)
        for name in _RECORDS:
            getattr(layer, name).copy_(state[f"{index}.{name}"])
        layer.place(state, index)


def encode_into(x_NRD: Tensor, code_NRD: Tensor, scale_NR: Tensor) -> None:
    """Codes and scales of vectors; the largest channel gets the largest code, so decoding and encoding is stable."""
    x = x_NRD.float()
    scale = (x.abs().amax(-1) / _LIMIT).to(torch.bfloat16)
    code_NRD.copy_((x / scale.float().clamp(min=1e-30)[..., None]).round().clamp(-_LIMIT, _LIMIT))
    scale_NR.copy_(scale)


def decode(code_NRD: Tensor, scale_NR: Tensor, dtype: torch.dtype) -> Tensor:
    return (code_NRD.float() * scale_NR.float()[..., None]).to(dtype)


def _mass(layer: LayerTable, stop: int, head_dim: int) -> Tensor:
    """The channels of log m."""
    return layer.k_NLW[:, :stop, head_dim : head_dim + 2].contiguous()

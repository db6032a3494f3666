"""The first latent frames and the newest ones: what streaming models natively keep. Memory is constant."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.cache.plain import PlainCache
from workers.contracts import KeyValues


class WindowCache(PlainCache):
    """Sink and recent keys in one buffer per layer; all between is forgotten.

    Args:
        num_layers: Layers of the model.
        sink_tokens: First keys of the rollout, always kept.
        recent_tokens: Newest keys kept besides; at least 1.
        dtype: Storage; None keeps that of the keys.
    """

    def __init__(
        self, num_layers: int, *, sink_tokens: int, recent_tokens: int, dtype: torch.dtype | None = None
    ) -> None:
        if sink_tokens < 0 or recent_tokens < 1:
            raise ValueError(f"sink_tokens {sink_tokens} must be >= 0 and recent_tokens {recent_tokens} >= 1")
        super().__init__(num_layers)
        self._sink, self._size, self._dtype = sink_tokens, sink_tokens + recent_tokens, dtype

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        assert chunk.log_mass_BNK is None, "a window keeps every key by itself"
        old = self._view[layer_index]
        held = 0 if old is None else old.num_tokens
        k, v = self._buffer(layer_index, chunk)
        self._write(k, chunk.k_BKND, held)
        self._write(v, chunk.v_BKND, held)
        if layer_index == 0:
            position = chunk.position_K3 if old is None else torch.cat((old.position_K3, chunk.position_K3))
            recent = position[self._sink :]
            self._position = torch.cat((position[: self._sink], recent[-(self._size - self._sink) :]))
        held = min(held + chunk.num_tokens, self._size)
        assert self._position is not None, "layer 0 comes first"
        self._view[layer_index] = KeyValues(k[:, :held], v[:, :held], self._position)

    def _write(self, buffer_BK: Tensor, new_BK: Tensor, held: int) -> None:
        """Fill the sink first; then the newest of the old recent keys move up and the new ones follow them."""
        to_sink = min(new_BK.shape[1], max(0, self._sink - held))
        buffer_BK[:, held : held + to_sink].copy_(new_BK[:, :to_sink])
        held, new_BK = held + to_sink, new_BK[:, to_sink:]
        room = self._size - self._sink
        new_BK = new_BK[:, max(0, new_BK.shape[1] - room) :]
        num_new = new_BK.shape[1]
        if num_new == 0:
            return
        keep = min(held - self._sink, room - num_new)
        if keep < held - self._sink:
            # Cloned because source and destination overlap.
            buffer_BK[:, self._sink : self._sink + keep].copy_(buffer_BK[:, held - keep : held].clone())
        start = self._sink + keep
        buffer_BK[:, start : start + num_new].copy_(new_BK)

    def _buffer(self, layer_index: int, chunk: KeyValues) -> tuple[Tensor, Tensor]:
        buffers = self._buffers[layer_index]
        if buffers is None:
            k = chunk.k_BKND
            shape, dtype = (k.shape[0], self._size, *k.shape[2:]), self._dtype or k.dtype
            buffers = (
                torch.empty(shape, dtype=dtype, device=k.device),
                torch.empty(shape, dtype=dtype, device=k.device),
            )
            self._buffers[layer_index] = buffers
        return buffers

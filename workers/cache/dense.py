"""Every key of the whole history. Buffers grow by half when full, so an append copies only itself, on average."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.cache.plain import PlainCache
from workers.contracts import KeyValues

_FIRST_CHUNKS = 8  # room before the first growth


class DenseCache(PlainCache):
    """Full history in the dtype given, on the device of the first chunk.

    Args:
        num_layers: Layers of the model.
        dtype: Storage; None keeps that of the keys. A narrower one halves the memory and rounds.
    """

    def __init__(self, num_layers: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(num_layers)
        self._dtype = dtype

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        assert chunk.log_mass_BNK is None, "a dense cache keeps every key by itself"
        old = self._view[layer_index]
        start = 0 if old is None else old.num_tokens
        end = start + chunk.num_tokens
        held_k, held_v = self._buffers[layer_index] or (None, None)
        k = _with_room(held_k, chunk.k_BKND, end, self._dtype)
        v = _with_room(held_v, chunk.v_BKND, end, self._dtype)
        self._buffers[layer_index] = k, v
        k[:, start:end].copy_(chunk.k_BKND)
        v[:, start:end].copy_(chunk.v_BKND)
        if layer_index == 0:
            self._position = _with_room(self._position, chunk.position_K3[None], end, None)
            self._position[0, start:end].copy_(chunk.position_K3)
        assert self._position is not None, "layer 0 comes first"
        position = self._position[0]
        self._view[layer_index] = KeyValues(k[:, :end], v[:, :end], position[:end])


def _with_room(buffer_BK: Tensor | None, like_BK: Tensor, num_tokens: int, dtype: torch.dtype | None) -> Tensor:
    """The buffer, or a longer one with the same content."""
    if buffer_BK is not None and buffer_BK.shape[1] >= num_tokens:
        return buffer_BK
    size = num_tokens * _FIRST_CHUNKS if buffer_BK is None else max(num_tokens, buffer_BK.shape[1] * 3 // 2)
    shape = (like_BK.shape[0], size, *like_BK.shape[2:])
    longer = torch.empty(shape, dtype=dtype or like_BK.dtype, device=like_BK.device)
    if buffer_BK is not None:
        longer[:, : buffer_BK.shape[1]].copy_(buffer_BK)
    return longer

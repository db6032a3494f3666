"""What a kernel made of the keys for one step, kept for the other steps of the chunk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from workers.contracts import KeyValues, Tiles
from workers.packed_keys import PackedKeys

T = TypeVar("T")


class KeyMemory(Generic[T]):
    """Values that belong to some keys (and tiles), kept while both exist, up to a number of bytes.

    An entry goes as soon as its `Tiles` or the memory of its keys or values is freed, which a rollout does at the end
    of each chunk; what would exceed `max_bytes` is not kept. Keys are recognised by their memory, so that views made
    anew for each step count as the same; they may not be changed in place while their tiles exist (noticed where
    torch counts the versions of a tensor, which it does not in inference mode).
    """

    def __init__(self, max_bytes: int = 2**30, on_drop: Callable[[T], None] | None = None) -> None:
        self._max_bytes, self._on_drop = max_bytes, on_drop
        self._kept: dict[Hashable, tuple[T, int, tuple[weakref.ref[Any], ...]]] = {}

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes, _ in list(self._kept.values()))

    def has_room_for(self, num_bytes: int) -> bool:
        return self.num_bytes + num_bytes <= self._max_bytes

    def find(self, keys: KeyValues, tiles: Tiles | None, dtype: torch.dtype) -> T | None:
        kept = self._kept.get(_identity(keys, tiles, dtype))
        return None if kept is None else kept[0]

    def keep(self, keys: KeyValues, tiles: Tiles | None, dtype: torch.dtype, value: T, *, num_bytes: int) -> None:
        if not self.has_room_for(num_bytes):
            return
        identity = _identity(keys, tiles, dtype)
        drop = partial(self._drop, identity)
        sources: list[Any] = (
            [keys.pack]
            if isinstance(keys, PackedKeys)
            else [keys.k_BKND.untyped_storage(), keys.v_BKND.untyped_storage()]
        )
        if tiles is not None:
            sources.append(tiles)
        self._kept[identity] = value, num_bytes, tuple(weakref.ref(source, drop) for source in sources)

    def _drop(self, identity: Hashable, _: weakref.ref[Any]) -> None:
        dropped = self._kept.pop(identity, None)
        if dropped is not None and self._on_drop is not None:
            self._on_drop(dropped[0])


def _identity(keys: KeyValues, tiles: Tiles | None, dtype: torch.dtype) -> Hashable:
    if isinstance(keys, PackedKeys):
        return None if tiles is None else id(tiles), dtype, id(keys.pack), keys.start, keys.num_tokens
    tensors = (keys.k_BKND, keys.v_BKND, keys.log_mass_BNK)
    return None if tiles is None else id(tiles), dtype, *(None if x is None else _place(x) for x in tensors)


def _place(x: Tensor) -> Hashable:
    version = 0 if x.is_inference() else x._version
    return x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), version

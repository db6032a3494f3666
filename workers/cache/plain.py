"""What caches share that keep keys one by one, the same tokens in every layer: reading, counting, and their state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from workers.contracts import KeyValues


class PlainCache(ABC):
    """A subclass says in `append` what is kept, in `_buffers` (k and v of each layer), and shows it in `_view`.

    Args:
        num_layers: Layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._position: Tensor | None = None  # one for all layers: they hold the same tokens
        self._view: list[KeyValues | None] = [None] * num_layers

    @abstractmethod
    def append(self, layer_index: int, chunk: KeyValues) -> None: ...

    def read(self, layer_index: int) -> KeyValues | None:
        return self._view[layer_index]

    @property
    def num_tokens(self) -> int:
        view = self._view[0]
        return 0 if view is None else view.num_tokens

    @property
    def num_bytes(self) -> int:
        return sum(view.num_bytes for view in self._view if view is not None)

    def state(self) -> Mapping[str, Tensor]:
        return {
            f"{index}.{name}": tensor
            for index, view in enumerate(self._view)
            if view is not None
            for name, tensor in (("k", view.k_BKND), ("v", view.v_BKND), ("position", view.position_K3))
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        num_layers = len(self._view)
        self._buffers, self._position, self._view = [None] * num_layers, None, [None] * num_layers
        for index in range(num_layers):
            if f"{index}.k" in state:
                self.append(index, KeyValues(state[f"{index}.k"], state[f"{index}.v"], state[f"{index}.position"]))

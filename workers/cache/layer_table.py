"""What a tile table holds of one layer, or of some side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workers.cache.table_layout import TableSettings

TENSORS = ("k_NLW", "v_NLD", "position_NC3", "m_NC", "weight_NC", "partner_NC", "mean_NJD")


@dataclass(eq=False)
class LayerTable:
    """Keys of one layer, or of some that go together: N is then the heads of all. Tensors keep their addresses."""

    k_NLW: Tensor
    v_NLD: Tensor
    position_NC3: Tensor
    m_NC: Tensor
    weight_NC: Tensor
    partner_NC: Tensor
    mean_NJD: Tensor
    pointer: int
    """Next free slot of the history."""
    num_chunks: int = 0
    position_of: dict[int, Tensor] = field(default_factory=dict)
    """Region (its first slot) -> positions [T, 3] of the chunk in it."""

    def place(self, state: Mapping[str, Tensor], index: int) -> None:
        """Counts and positions as in the snapshot of the layer of this index."""
        self.pointer, self.num_chunks = state[f"{index}.counts"].tolist()
        prefix = f"{index}.at."
        self.position_of = {
            int(name.removeprefix(prefix)): position.to(self.k_NLW.device, copy=True)
            for name, position in state.items()
            if name.startswith(prefix)
        }


def new_tensors(
    heads: int, num_slots: int, s: TableSettings, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """`TENSORS`, zero, with so many slots of keys and values."""
    history = s.history_slots

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(heads, *shape, dtype=dtype, device=device)

    made = (
        zeros(num_slots, s.width, dtype=dtype),
        zeros(num_slots, s.head_dim, dtype=dtype),
        zeros(history, 3, dtype=torch.float32),
        zeros(history, dtype=torch.int32),
        zeros(history, dtype=torch.float32),
        zeros(history, dtype=torch.int32),
        zeros(history // s.tile, s.head_dim, dtype=dtype),
    )
    return dict(zip(TENSORS, made, strict=True))

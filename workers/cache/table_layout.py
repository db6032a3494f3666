"""Where the keys of a tile table lie: one row of whole tiles per head, sink | history | recent | own chunk.

Every region begins at a tile. A chunk that does not fill its last tile leaves slots there that hold no key. log m is
in two channels behind those of the key, so that one product with a query of ones gives logit plus log m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workers.cache.low_bit import Storage
from workers.cache.table_codes import coded_bytes

EXTRA_CHANNELS = 16
"""Behind those of the key: two carry log m in two parts, the rest is zero; 8 would be enough, and slower."""
MergeRule = Literal["chains", "pairs"]
"""Which pairs of a full history merge, and which key stands for a group; see `shrink.py`."""
MEMBERS_LISTED: dict[MergeRule, int] = {"pairs": 4, "chains": 0}
"""`Room.num_listed`: most groups of pairs are smaller; chains make longer ones, and were not timed with lists."""
NO_KEY = -1e5
"""In place of sqrt(D) log m where there is no key: its weight is exactly 0 beside any key."""


@dataclass(frozen=True)
class TableSettings:
    """Sizes of a tile table; all tokens are counted per head."""

    num_layers: int
    num_heads: int
    head_dim: int
    chunk_tokens: int
    frame_tokens: int
    """Of a latent frame."""
    sink_chunks: int = 1
    """First chunks, kept as they are."""
    recent_chunks: int = 1
    """Newest chunks, kept as they are; at least 1."""
    kept_chunks: int = 9
    """What the history shrinks to when it is full."""
    spare_chunks: int = 5
    """How much it takes in between; larger is faster and uses the table less."""
    rule: MergeRule = "chains"
    decay: float = 16.0
    """How fast unlike members lose their mass; 0 is the paper's log m."""
    candidate_tiles: int | None = 4
    """Tiles of the history in which a key looks for its nearest, beside the latent frame before; None: all keys."""
    tile: int = 128
    theta: float = 10000.0
    storage: Storage = "model"
    """How the history lies: as computed, or in few bits (`packed_table.py`)."""

    def __post_init__(self) -> None:
        assert self.recent_chunks >= 1
        assert self.spare_chunks >= 1
        # Keys of the first latent frame have no older one to join, so they must always find room.
        assert self.kept_chunks >= 1
        assert self.chunk_tokens % self.frame_tokens == 0

    @property
    def chunk_slots(self) -> int:
        """Slots of a chunk in whole tiles."""
        return -(-self.chunk_tokens // self.tile) * self.tile

    @property
    def history_tokens(self) -> int:
        """Slots of the history that are ever used."""
        return (self.kept_chunks + self.spare_chunks) * self.chunk_tokens

    @property
    def kept_tokens(self) -> int:
        return self.kept_chunks * self.chunk_tokens

    @property
    def spare_tokens(self) -> int:
        return self.spare_chunks * self.chunk_tokens

    @property
    def history_start(self) -> int:
        return self.sink_chunks * self.chunk_slots

    @property
    def chunks_before_merging(self) -> int:
        """Taken over when the first layer is full; layers become full one chunk after another."""
        ahead = min(self.spare_chunks, self.num_layers) - 1
        return self.sink_chunks + self.recent_chunks + self.kept_chunks + self.spare_chunks - ahead

    @property
    def history_slots(self) -> int:
        """In whole tiles."""
        return -(-self.history_tokens // self.tile) * self.tile

    @property
    def recent_start(self) -> int:
        return self.history_start + self.history_slots

    @property
    def own_start(self) -> int:
        return self.recent_start + self.recent_chunks * self.chunk_slots

    @property
    def num_slots(self) -> int:
        return self.own_start + self.chunk_slots

    @property
    def rate(self) -> float:
        """Of the falling weight of unlike members, per squared distance."""
        return self.decay / (2 * math.sqrt(self.head_dim))

    @property
    def kernels_lack(self) -> str:
        """Why kernels of our own cannot work on such a table; empty where they can."""
        for name in ("head_dim", "tile"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                return f"kernels of the table take powers of two from 16 on, not {name} {size}"
        return "" if self.candidate_tiles is not None else "kernels of the table do not look among all keys"

    @property
    def width(self) -> int:
        """Channels of a stored key."""
        return self.head_dim + EXTRA_CHANNELS

    @property
    def num_keys_cached(self) -> int:
        """Keys per layer and head once the table is full, the chunk in hand not counted."""
        return (self.sink_chunks + self.recent_chunks) * self.chunk_tokens + self.history_tokens

    def bytes(self, dtype: torch.dtype) -> int:
        """Of keys and values of all layers; of a packed history its workspace too."""
        rows, vector = self.num_heads * self.num_layers, self._vector_bytes(dtype)
        if self.storage == "model":
            return rows * self.num_slots * vector
        ends = self.num_slots - self.history_slots
        packed = ends * vector + self.history_slots * self._history_bytes(dtype)
        return rows * packed + self.num_heads * self.num_slots * vector

    def used_bytes(self, dtype: torch.dtype, num_ends: int, pointer: int) -> int:
        """Of one layer: chunks beside its history, and slots of that with their records."""
        record = 3 * 4 + 4 + 4 + 4
        if self.storage != "model" and self.rule == "pairs":
            record += 4  # what kernels know of distances
        ends = num_ends * self.chunk_tokens * self._vector_bytes(dtype)
        return self.num_heads * (ends + pointer * (self._history_bytes(dtype) + record))

    def _vector_bytes(self, dtype: torch.dtype) -> int:
        """Of a key and its value as computed."""
        return (self.width + self.head_dim) * dtype.itemsize

    def _history_bytes(self, dtype: torch.dtype) -> int:
        """Of a slot of the history."""
        if self.storage == "model":
            return self._vector_bytes(dtype)
        return 2 * coded_bytes(self.head_dim, self.storage) + 2 * dtype.itemsize


def write_log_mass(k_NKW: Tensor, head_dim: int, log_mass: Tensor | float) -> None:
    """Set the channels behind the key; -inf means that there is none."""
    if isinstance(log_mass, float):  # a number goes along with the call, where a tensor would have to be sent first
        value = torch.tensor(max(NO_KEY, log_mass * math.sqrt(head_dim)))
        high = value.to(k_NKW.dtype)
        k_NKW[..., head_dim] = float(high)
        k_NKW[..., head_dim + 1] = float(value - high.float())
        return
    value = (log_mass.float() * math.sqrt(head_dim)).clamp(min=NO_KEY)
    high = value.to(k_NKW.dtype)
    k_NKW[..., head_dim] = high
    k_NKW[..., head_dim + 1] = (value - high.float()).to(k_NKW.dtype)


def read_log_mass(k_NKW: Tensor, head_dim: int) -> Tensor:
    """log m of stored keys, float32; -inf where there is none."""
    value = k_NKW[..., head_dim : head_dim + 2].float().sum(-1)
    return torch.where(value <= NO_KEY / 2, -torch.inf, value / math.sqrt(head_dim))

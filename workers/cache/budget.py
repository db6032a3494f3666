"""How many key groups a number of bytes holds: the hard limit that makes memory flat."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch

from workers.cache.entry_records import RECORD_BYTES
from workers.cache.groups import SLOT_BYTES
from workers.cache.low_bit import Storage, VectorStore
from workers.cache.near_tiles import TILE, TileMeans

_COUNT_BYTES = 8
"""Of a head: how many of its slots are in use."""
_POSITION_BYTES = 3 * 4
"""Of an uncompressed token, one for all heads."""


@dataclass(frozen=True)
class Geometry:
    """Sizes that decide what a key costs."""

    num_layers: int
    num_heads: int
    head_dim: int
    frame_tokens: int
    """Tokens of a latent frame."""
    chunk_tokens: int

    def raw_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Uncompressed keys and values of so many tokens, all layers."""
        return 2 * num_tokens * self.num_layers * self.num_heads * self.head_dim * dtype.itemsize

    def reserved_bytes(self, num_groups: int, num_raw: int, storage: Storage, dtype: torch.dtype) -> int:
        """What a temporal cache of one video takes of memory: so many groups per head, beside uncompressed tokens.

        Args:
            num_groups: 0 for what is there without any.
            num_raw: Sink and newest.
            storage: Of the groups.
            dtype: Of the uncompressed keys.
        """
        vector = VectorStore.bytes_per_vector(self.head_dim, storage, dtype)
        slots = (num_groups + 1) * (2 * vector + SLOT_BYTES)
        records = (num_groups + num_raw) * RECORD_BYTES
        means = num_groups // TILE * TileMeans.bytes_per_tile(self.head_dim)
        per_head = slots + records + means + _COUNT_BYTES
        return self.num_layers * (self.num_heads * per_head + num_raw * _POSITION_BYTES) + self.raw_bytes(
            num_raw, dtype
        )


def count_groups(budget_bytes: int, raw_tokens: int, geometry: Geometry, storage: Storage, dtype: torch.dtype) -> int:
    """Groups per head that fit beside so many uncompressed tokens, all that is reserved for them included.

    Raises:
        ValueError: Fewer groups fit than a chunk brings, and a latent frame more (the oldest keys have nobody to join);
            the message says how many bytes are needed.
    """
    least = geometry.frame_tokens + geometry.chunk_tokens

    def reserved(num_groups: int) -> int:
        return geometry.reserved_bytes(num_groups, raw_tokens, storage, dtype)

    if reserved(least) > budget_bytes:
        raise ValueError(
            f"a budget of {budget_bytes:,} bytes is too small: the uncompressed latent frames and the groups of a "
            f"chunk and a frame more take {reserved(least):,}"
        )
    # Means of tiles come for many groups at once: the largest number that fits is searched for.
    return bisect_right(range(budget_bytes), budget_bytes, lo=least, key=reserved) - 1

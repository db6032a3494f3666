"""How many key groups a number of bytes holds: the hard limit that makes memory flat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.cache.groups import SLOT_BYTES
from workers.cache.low_bit import Storage, VectorStore


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

    def group_bytes(self, storage: Storage, dtype: torch.dtype) -> int:
        """One key group in each head of each layer."""
        vector = VectorStore.bytes_per_vector(self.head_dim, storage, dtype)
        return self.num_layers * self.num_heads * (2 * vector + SLOT_BYTES)


def count_groups(budget_bytes: int, raw_tokens: int, geometry: Geometry, storage: Storage, dtype: torch.dtype) -> int:
    """Groups per head that fit beside so many uncompressed tokens.

    Raises:
        ValueError: Fewer groups fit than a chunk brings, and a latent frame more (the oldest keys have nobody to join);
            the message says how many bytes are needed.
    """
    least = geometry.frame_tokens + geometry.chunk_tokens
    raw, group = geometry.raw_bytes(raw_tokens, dtype), geometry.group_bytes(storage, dtype)
    num = (budget_bytes - raw) // group
    if num < least:
        needed = raw + least * group
        raise ValueError(
            f"a budget of {budget_bytes:,} bytes is too small: the uncompressed latent frames and the groups of a "
            f"chunk and a frame more take {needed:,}"
        )
    return num

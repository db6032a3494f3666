"""Where caches, policies and kernels meet: which keys exist, which of them a query sees, how attention is computed.

None of the three imports another; a new idea is one new file behind one of these protocols.

Letters of tensor names: B batch, T latent frames, C channels, H W latent height and width, Q query tokens, K cached
keys, P prompt tokens, N heads, D head dimension, E model width. Tokens are in the order (latent frame, row, column).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys and values of one layer, with where and how much they are. A view: its owner may reuse the memory later."""

    k_BKND: Tensor
    v_BKND: Tensor
    position_K3: Tensor
    """(latent frame, row, column) of each key, float32; keys in a cache are kept BEFORE RoPE."""
    log_mass_BNK: Tensor | None = None
    """log m where one key stands for m; added to the logit."""

    @property
    def num_tokens(self) -> int:
        return self.k_BKND.shape[1]

    @property
    def num_bytes(self) -> int:
        mass = 0 if self.log_mass_BNK is None else self.log_mass_BNK.nbytes
        return self.k_BKND.nbytes + self.v_BKND.nbytes + mass


class PromptKeys(NamedTuple):
    """Cross-attention keys and values of one layer; they depend on the prompt alone."""

    k_BPND: Tensor
    v_BPND: Tensor
    log_mass_BP: Tensor | None = None
    """Added to the logits: log m where a row stands for m equal ones, -inf where it is to be ignored."""
    k_image_BPND: Tensor | None = None
    v_image_BPND: Tensor | None = None


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What the queries of one layer see: disjoint sets of keys, under one softmax over all of them.

    A part that is the very object a cache returned is rotated only once per chunk.
    """

    parts: tuple[KeyValues, ...]


class KVCache(Protocol):
    """Which keys exist: finished chunks of one rollout, layer by layer. Checked by tests/contract/test_caches.py."""

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        """Take over a clean chunk (copied). Layers come in turn, chunks in the order of time."""
        ...

    def read(self, layer_index: int) -> KeyValues | None:
        """All keys of a layer, oldest first; None before the first chunk. The same object until the next append."""
        ...

    @property
    def num_tokens(self) -> int:
        """Keys per layer."""
        ...

    @property
    def num_bytes(self) -> int:
        """Keys and values in use, all layers."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Everything that decides later reads, as named tensors."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become the cache that `state` came from."""
        ...


class AttentionPolicy(Protocol):
    """Which keys a query sees."""

    def plan(self, layer_index: int, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues) -> AttentionPlan:
        """Choose among the cached keys and the chunk's own; queries and keys are before RoPE."""
        ...


class Kernel(Protocol):
    """How attention is computed."""

    @property
    def version(self) -> str:
        """Name and version, as it stands in the manifest."""
        ...

    def attend(self, q_BQND: Tensor, parts: tuple[KeyValues, ...]) -> tuple[Tensor, Tensor]:
        """Softmax attention over the union of all parts.

        Args:
            q_BQND: Queries after RoPE; any real dtype.
            parts: Keys after RoPE; at least one part with at least one key.
        Returns:
            out_BQND in the dtype of the queries, and the natural log-sum-exp of the logits, lse_BQN in float32 (float64
            for float64 inputs).
        """
        ...

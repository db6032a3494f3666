"""Where caches, policies and kernels meet: which keys exist, which of them a query sees, how attention is computed.

None of the three imports another; a new idea is one new file behind one of these protocols.

Letters of tensor names: B batch, T latent frames, C channels, H W latent height and width, Q query tokens, K cached
keys, P prompt tokens, N heads, D head dimension, E model width. Tokens are in the order (latent frame, row, column).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys and values of one layer, with where and how much they are. A view: its owner may reuse the memory later."""

    k_BKND: Tensor
    v_BKND: Tensor
    position_K3: Tensor
    """(latent frame, row, column) of each key, float32: [K, 3], or [B, K, N, 3] where each head keeps other tokens.
    Keys in a cache are kept BEFORE RoPE."""
    log_mass_BNK: Tensor | None = None
    """log m where one key stands for m, -inf where there is none; added to the logit."""

    @property
    def num_tokens(self) -> int:
        return self.k_BKND.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k_BKND.shape[-1]

    @property
    def num_bytes(self) -> int:
        mass = 0 if self.log_mass_BNK is None else self.log_mass_BNK.nbytes
        return self.k_BKND.nbytes + self.v_BKND.nbytes + mass

    def narrow(self, start: int, stop: int) -> KeyValues:
        """Keys from `start` up to `stop`, as views."""
        if (start, stop) == (0, self.num_tokens):
            return self
        position = self.position_K3[start:stop] if self.position_K3.dim() == 2 else self.position_K3[:, start:stop]
        mass = None if self.log_mass_BNK is None else self.log_mass_BNK[..., start:stop]
        return KeyValues(self.k_BKND[:, start:stop], self.v_BKND[:, start:stop], position, mass)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Which keys a query sees, in rectangles of queries by keys: the form of every sparse policy.

    Queries and keys are first put in order (those of one bucket side by side), then cut into tiles; the last tile of
    either side may be short. A query whose tile sees nothing gets an empty attention (log-sum-exp -inf).
    """

    visible_BNIJ: Tensor
    """bool; I tiles of queries, J tiles of keys."""
    query_tile: int
    key_tile: int
    query_order_BNQ: Tensor | None = None
    """int64: which query stands at each place; None leaves them as they come."""
    key_order_BNK: Tensor | None = None
    tile_order_BNIJ: Tensor | None = None
    """int64: in which order a kernel that gathers tiles lays down those that are seen, which come first in it; None
    leaves them in theirs."""
    first_of: Tiles | None = None
    """Other tiles of which each row sees as many as these show, the first in their order: what was gathered for them
    serves these too."""

    def mean_keys(self, num_queries: int, num_keys: int) -> Tensor:
        """Keys that a query sees on average over batch and heads; a number in a tensor, so that nothing waits."""
        rows = _tile_sizes(num_queries, self.query_tile, self.visible_BNIJ)
        columns = _tile_sizes(num_keys, self.key_tile, self.visible_BNIJ)
        pairs_BN = torch.einsum("bnij,i,j->bn", self.visible_BNIJ.float(), rows, columns)
        return pairs_BN.mean() / num_queries

    def mask(self, num_queries: int, num_keys: int) -> Tensor:
        """What the tiles say, pair by pair and in the order in which queries and keys came: bool_BNQK."""
        mask = self.visible_BNIJ.repeat_interleave(self.query_tile, 2)[:, :, :num_queries]
        mask = mask.repeat_interleave(self.key_tile, 3)[..., :num_keys]
        if self.query_order_BNQ is not None:
            index = self.query_order_BNQ.argsort(-1)[..., None]
            mask = mask.gather(2, index.expand(*mask.shape[:2], num_queries, num_keys))
        if self.key_order_BNK is not None:
            index = self.key_order_BNK.argsort(-1)[:, :, None]
            mask = mask.gather(3, index.expand(*mask.shape[:2], num_queries, num_keys))
        return mask


def _tile_sizes(num: int, tile: int, like: Tensor) -> Tensor:
    """Length of each tile, float32: all full but perhaps the last."""
    start = torch.arange(0, num, tile, device=like.device, dtype=torch.float32)
    return (num - start).clamp(max=tile)


class TiledKeys(NamedTuple):
    """Keys of which each query sees some."""

    keys: KeyValues
    tiles: Tiles


class Attended(NamedTuple):
    """Attention over some keys that has been computed already; it counts beside others by its log-sum-exp."""

    out_BQND: Tensor
    lse_BQN: Tensor


KernelPart = KeyValues | TiledKeys | Attended
"""What a kernel composes under one softmax."""


class PromptKeys(NamedTuple):
    """Cross-attention keys and values of one layer; they depend on the prompt alone."""

    k_BPND: Tensor
    v_BPND: Tensor
    log_mass_BP: Tensor | None = None
    """Added to the logits: log m where a row stands for m equal ones, -inf where it is to be ignored."""
    k_image_BPND: Tensor | None = None
    v_image_BPND: Tensor | None = None


@dataclass(frozen=True)
class Moment:
    """Where in a rollout a call of the model stands."""

    chunk_index: int
    step_index: int = 0
    num_steps: int = 1
    noise_level: float = 1.0
    """Sigma in [0, 1] of the noisiest latent frame in hand; 0 in a clean pass."""
    is_clean_pass: bool = False
    branch: int = 0
    """0 with the prompt, 1 with the negative prompt."""


PartResult = Literal["fresh", "kept", "taken"]
"""Of the attention over a run of keys: computed; computed and kept for later calls of the chunk; or not computed, but
that which this layer and branch kept last in the chunk, with the queries of then."""


@dataclass(frozen=True)
class PlanPart:
    """A run of keys, of those cached (in the order of the cache) or of the chunk's own."""

    source: Literal["cached", "own"]
    start: int
    stop: int
    tiles: Tiles | None = None
    """None: every query sees every key of the run."""
    result: PartResult = "fresh"
    """A plan keeps or takes, not both."""


@dataclass(frozen=True)
class AttentionPlan:
    """What the queries of one layer see: disjoint runs of keys, under one softmax over all of them."""

    parts: tuple[PlanPart, ...]


class KVCache(Protocol):
    """Which keys exist: finished chunks of one rollout, layer by layer. Checked by tests/contract/test_caches.py."""

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        """Take over a clean chunk (copied). Layers come in turn, chunks in the order of time."""
        ...

    def read(self, layer_index: int) -> KeyValues | None:
        """All keys of a layer, the sink first and the newest last; None before the first chunk.

        The same object until the next append.
        """
        ...

    @property
    def num_tokens(self) -> int:
        """Keys per layer."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of all layers: what keys and values take, or all that is reserved, in a cache that reserves its budget."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Everything that decides later reads, as named tensors."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become the cache that `state` came from."""
        ...


class AttentionPolicy(Protocol):
    """Which keys a query sees."""

    def begin_chunk(self, position_Q3: Tensor) -> None:
        """Calls from now on are about the next chunk: whatever was shared among steps is void."""
        ...

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        """Choose among the cached keys and the chunk's own; queries and keys are before RoPE (but `PlansAfterRope`)."""
        ...


@runtime_checkable
class PlansAfterRope(Protocol):
    """Marks a policy that compares queries with keys as attention does: its `plan` gets all of them after RoPE."""

    plans_after_rope: Literal[True]


class PromptAttention(Protocol):
    """Which rows of the prompt a query sees, and the attention over them."""

    def __call__(self, layer_index: int, q_BQND: Tensor, keys: PromptKeys) -> Tensor:
        """Cross-attention, out_BQND."""
        ...


@runtime_checkable
class FollowsCalls(Protocol):
    """Marks a `PromptAttention` that must know which denoising step it serves."""

    def follow(self, moment: Moment) -> None:
        """The next call of the model belongs to this moment."""
        ...


@dataclass(frozen=True, eq=False)
class Attending:
    """A layer that is about to attend, as a probe sees it. Views: nothing in here is kept without a copy."""

    layer_index: int
    moment: Moment
    plan: AttentionPlan
    q_BQND: Tensor
    """After RoPE."""
    cached: KeyValues | None
    """After RoPE, in the order of the cache."""
    own: KeyValues
    """After RoPE."""
    own_k_BKND: Tensor
    """Before RoPE."""
    rotate: Callable[[KeyValues], KeyValues]
    """RoPE of further keys of the past, at the times that this chunk sees them at."""
    kept_q_BQND: Tensor | None = None
    """After RoPE: with which queries the runs were seen that the plan takes."""


@runtime_checkable
class AttentionProbe(Protocol):
    """Looks on while a rollout attends; changes nothing."""

    def wants(self, layer_index: int, moment: Moment) -> bool:
        """Whether to be shown this call of this layer; asked in each, so that what is not shown costs nothing."""
        ...

    def observe(self, attending: Attending) -> None:
        """A layer is about to attend; nothing in here may wait for the device."""
        ...


@runtime_checkable
class TracksOwners(Protocol):
    """A cache that knows what became of each key it was ever given; only measurements pay for that."""

    def owners(self, layer_index: int) -> Tensor | None:
        """owner_BNT: for each original token, in the order of their coming, the index (in the order of `read`) of the
        entry that holds it, -1 if none does; int64. None where it is not tracked."""
        ...


class AuditKeys(NamedTuple):
    """A uniform sample of the keys that a run of cache entries was made from: what a guard judges that run by."""

    k_BAND: Tensor
    """As they were given, before RoPE; A of them, the same tokens in all heads."""
    position_A3: Tensor
    """As they were given."""
    owner_BNA: Tensor
    """int64: index (in the order of `read`) of the entry that holds the key now, from `start` up to `stop`; -1 where it
    was evicted."""
    members_BNA: Tensor
    """How many keys that entry holds, at least 1; its mass may be less."""
    num_original_tokens: int
    """How many tokens the sample stands for: all that the run was ever made from, evicted ones included."""
    start: int
    stop: int
    """The run of cache entries. Entries outside of it are single keys as they were given; nothing is lost there."""


@runtime_checkable
class Audited(Protocol):
    """A cache that keeps a small sample of what it compressed."""

    def audit(self, layer_index: int) -> AuditKeys | None:
        """The sample of one layer as of the last append; None while nothing is compressed, or without auditing."""
        ...


@runtime_checkable
class Tightens(Protocol):
    """A policy or cache that can be told to keep or see more than it was configured to."""

    def tighten(self, factor: float) -> None:
        """Act from now on as if configured `factor` (>= 1) times tighter; 1 is the configuration itself.

        A density becomes min(1, density * factor), a merge threshold 1 - (1 - threshold) / factor. Each call replaces
        the one before it.
        """
        ...


class ChunkJudge(Protocol):
    """Looks at each chunk after its last denoising step and may have it made again."""

    def begin_chunk(self) -> None:
        """A new chunk is about to be denoised."""
        ...

    def wants_again(self) -> bool:
        """Whether to denoise it once more, from the same noise; asked after each time. May wait for the device."""
        ...


class StepReuse(Protocol):
    """Spares the layers of the model in some denoising steps: what they added before is added again.

    Told of every call before the model runs, and asked within it; a clean pass is never spared, for it fills the cache.
    """

    def begin_call(self, moment: Moment) -> None:
        """The next call of the model belongs to this moment. Step 0 begins a chunk: nothing older is used again."""
        ...

    def recall(self, x_BQE: Tensor, modulated_BQE: Tensor) -> Tensor | None:
        """What all layers together add to their input, to be used instead of running them; None runs them.

        Args:
            x_BQE: Input of the first layer.
            modulated_BQE: The same after the first layer's norm and its modulation by the timestep.
        """
        ...

    def learn(self, residual_BQE: Tensor) -> None:
        """The layers were run and added this."""
        ...


class Kernel(Protocol):
    """How attention is computed."""

    @property
    def version(self) -> str:
        """Name and version, as it stands in the manifest."""
        ...

    def attend(self, q_BQND: Tensor, parts: tuple[KernelPart, ...]) -> tuple[Tensor, Tensor]:
        """Softmax attention over the union of all parts.

        Args:
            q_BQND: Queries after RoPE; any real dtype.
            parts: Disjoint keys after RoPE, or the results over some; each query sees at least one key of at least one.
        Returns:
            out_BQND in the dtype of the queries, and the natural log-sum-exp of the logits, lse_BQN in float32 (float64
            for float64 inputs).
        """
        ...

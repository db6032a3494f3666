"""Self-attention of a rollout, layer by layer: cache -> policy -> rotation -> kernel.

Keys are cached before RoPE and rotated here, once per chunk for those that do not change within it. The clean pass
attends like any other and then gives its keys to the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.contracts import (
    Attended,
    Attending,
    AttentionPlan,
    AttentionPolicy,
    AttentionProbe,
    FollowsCalls,
    Kernel,
    KernelPart,
    KeyValues,
    KVCache,
    Moment,
    PlanPart,
    PlansAfterRope,
    TiledKeys,
    Tiles,
)
from workers.model.backbones import Backbone
from workers.model.rope import Rotation, make_rotation, rotate, rotate_in_place, rotate_into
from workers.packed_keys import PackedKeys

Reindex = Callable[[Tensor, float], Tensor]
"""(latent frame of each cached key, latent frame of the newest query) -> the time that its rotation gets."""


_JOINED_CHUNKS = 8
"""Runs of cached keys that are up to so many times as long as the own ones are laid side by side with them, which costs
their memory once more and spares a second call of the kernel and the merge of two results; longer ones are not."""


class _Joined(NamedTuple):
    """Keys of one layer in one piece: runs of cached keys after RoPE, then room for the own ones of each call."""

    source: KeyValues
    runs: tuple[tuple[int, int], ...]
    keys: KeyValues


class _Kept(NamedTuple):
    """What a layer saw of some keys, for the later calls of a chunk."""

    attended: Attended
    q_BQND: Tensor | None
    """With which queries, if a probe may ask."""


class RelativeTime:
    """A `Reindex` that counts time from the newest query, for cached keys and for the chunk's own: exact, as RoPE knows
    differences alone, and near zero however long the video is.
    """

    def __call__(self, time: Tensor, newest: float) -> Tensor:
        return time - newest


class RolloutAttention:
    """The `attend` of a `CausalDiT` during a rollout; call `begin_chunk`, then let the model call this object.

    Args:
        backbone: Head dimension and RoPE base.
        cache: Filled by clean passes; one that is a probe too looks on.
        policy: Chooses among the keys.
        kernel: Computes.
        reindex: Temporal positions of cached keys; None keeps them as they are.
        probes: Look on.
    """

    def __init__(
        self,
        backbone: Backbone,
        cache: KVCache,
        policy: AttentionPolicy,
        kernel: Kernel,
        *,
        reindex: Reindex | None = None,
        probes: tuple[AttentionProbe, ...] = (),
    ) -> None:
        self.cache, self.policy = cache, policy
        self._head_dim, self._theta = backbone.head_dim, backbone.rope_theta
        looking_on = (cache,) if isinstance(cache, AttentionProbe) else ()
        self._kernel, self._reindex, self._probes = kernel, reindex, (*probes, *looking_on)
        self._moves_queries = isinstance(reindex, RelativeTime)
        self._position_Q3: Tensor | None = None
        self._rotation: Rotation | None = None
        self._now = 0.0
        self._moment = Moment(0)
        self._remembered: slice | None = None
        self._rotated: dict[int, tuple[KeyValues, KeyValues]] = {}
        self._joined: dict[int, _Joined] = {}
        self._counted: dict[int, tuple[Tiles, Tensor]] = {}
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._tables: dict[Hashable, tuple[Tensor, Rotation]] = {}
        self._num_layers = backbone.num_layers
        self._followers: list[FollowsCalls] = []
        self._num_calls = 0
        self._keys_seen = torch.zeros(())

    def begin_chunk(self, position_Q3: Tensor) -> None:
        """The next calls are about tokens at these (latent frame, row, column), float32, on the model's device."""
        self._position_Q3 = position_Q3
        self._now = float(position_Q3[-1, 0])
        at = self._reindexed(position_Q3) if self._moves_queries else position_Q3
        self._rotation = make_rotation(at, self._head_dim, self._theta)
        self._moment = Moment(int(self._now))
        self.end_chunk()
        self.policy.begin_chunk(position_Q3)

    def begin_call(self, moment: Moment, remembered: slice | None = None) -> None:
        """The next call of each layer belongs to this moment; a clean pass brings keys that are to be remembered.

        Args:
            moment: Where the call stands.
            remembered: Tokens of the call whose keys a clean pass gives to the cache; None means all.
        """
        self._moment, self._remembered = moment, remembered
        self._num_calls += 1
        for follower in self._followers:
            follower.follow(moment)

    def announce_to(self, other: object) -> None:
        """Let the cross-attention of the same calls know of each, if it asks which step it serves."""
        if isinstance(other, FollowsCalls):
            self._followers.append(other)

    def take_mean_keys(self) -> float:
        """Keys that a query saw on average over the calls and layers since the last time this was asked."""
        mean = float(self._keys_seen) / max(1, self._num_calls)
        self._keys_seen, self._num_calls = torch.zeros(()), 0
        return mean

    def end_chunk(self) -> None:
        """Forget what was rotated for this chunk, before the next one needs the memory."""
        self._rotated.clear()
        self._joined.clear()
        self._counted.clear()
        self._kept.clear()
        self._tables.clear()

    def __call__(self, layer_index: int, q_BQND: Tensor, k_BQND: Tensor, v_BQND: Tensor) -> Tensor:
        assert self._rotation is not None, "begin_chunk comes first"
        assert self._position_Q3 is not None
        own = KeyValues(k_BQND, v_BQND, self._position_Q3)
        cached = self.cache.read(layer_index)
        q_rotated = rotate(q_BQND, self._rotation)
        own_rotated = KeyValues(rotate(k_BQND, self._rotation), v_BQND, self._position_Q3)
        if isinstance(self.policy, PlansAfterRope):
            seen = None if cached is None else self._rotate_once(cached)
            plan = self.policy.plan(layer_index, self._moment, q_rotated, seen, own_rotated)
        else:
            plan = self.policy.plan(layer_index, self._moment, q_BQND, cached, own)
        self._count(plan, q_BQND.shape[1])
        probes = [probe for probe in self._probes if probe.wants(layer_index, self._moment)]
        if probes:
            seen = None if cached is None else self._rotate_once(cached)
            kept = self._kept.get((layer_index, self._moment.branch))
            attending = Attending(
                layer_index,
                self._moment,
                plan,
                q_rotated,
                seen,
                own_rotated,
                k_BQND,
                self.rotate_cached,
                None if kept is None else kept.q_BQND,
            )
            for probe in probes:
                probe.observe(attending)
        out_BQND = self._attend(layer_index, q_rotated, plan, cached, own_rotated)
        if self._moment.is_clean_pass:
            self._rotated.pop(0 if cached is None else id(cached), None)
            self._joined.pop(layer_index, None)
            part = self._remembered
            self.cache.append(layer_index, own if part is None else own.narrow(part.start, part.stop))
        return out_BQND

    def _attend(
        self, layer_index: int, q_BQND: Tensor, plan: AttentionPlan, cached: KeyValues | None, own: KeyValues
    ) -> Tensor:
        """What is new under this plan, and beside it what was kept."""
        results = {part.result for part in plan.parts if part.stop > part.start}
        fresh = [part for part in plan.parts if part.result == "fresh"]
        parts = self._parts(layer_index, fresh, cached, own)
        if results == {"fresh"}:
            return self._kernel.attend(q_BQND, parts)[0]
        assert not results >= {"kept", "taken"}, "a plan keeps or takes"
        key = layer_index, self._moment.branch
        if "kept" in results:
            to_keep = [part for part in plan.parts if part.result == "kept"]
            attended = self._kernel.attend(q_BQND, self._parts(layer_index, to_keep, cached, own))
            self._kept[key] = _Kept(Attended(*attended), q_BQND if self._probes else None)
        return self._kernel.attend(q_BQND, (*parts, self._kept[key].attended))[0]

    def rotate_cached(self, keys: KeyValues) -> KeyValues:
        """Keys of the cache after RoPE, at the positions that this chunk sees them at."""
        if isinstance(keys, PackedKeys):  # as far as they are unpacked
            return keys.turned(self._turn, alike=self._reindex is None)
        return KeyValues(
            rotate(keys.k_BKND, self._table(keys.position_K3)), keys.v_BKND, keys.position_K3, keys.log_mass_BNK
        )

    def _turn(self, keys: KeyValues, in_place: bool) -> KeyValues:
        if not in_place:
            return self.rotate_cached(keys)
        rotate_in_place(keys.k_BKND, self._reindexed(keys.position_K3), self._theta)
        return keys

    def _count(self, plan: AttentionPlan, num_queries: int) -> None:
        """Add the keys that a query sees here; a tensor as soon as there are tiles, so that nothing waits for them."""
        for part in plan.parts:
            if part.result == "taken":
                continue
            num_keys = part.stop - part.start
            seen = num_keys if part.tiles is None else self._mean_keys(part.tiles, num_queries, num_keys)
            self._keys_seen = self._keys_seen + seen / self._num_layers

    def _mean_keys(self, tiles: Tiles, num_queries: int, num_keys: int) -> Tensor:
        """Counted once where calls share their tiles."""
        if id(tiles) not in self._counted:
            self._counted[id(tiles)] = tiles, tiles.mean_keys(num_queries, num_keys)
        return self._counted[id(tiles)][1]

    def _parts(
        self, layer_index: int, planned: Sequence[PlanPart], cached: KeyValues | None, own: KeyValues
    ) -> tuple[KernelPart, ...]:
        """The planned keys after RoPE, of which the chunk's own have it already."""
        planned = [part for part in planned if part.stop > part.start]
        whole = [part for part in planned if part.tiles is None]
        runs = () if cached is None else _runs_to_join(whole, cached, own)

        def keys_of(part: PlanPart) -> KeyValues | TiledKeys:
            source = own
            if part.source == "cached":
                assert cached is not None, "a plan names cached keys only where there are some"
                source = self._rotate_once(cached)
            keys = source.narrow(part.start, part.stop)
            return keys if part.tiles is None else TiledKeys(keys, part.tiles)

        if cached is None or not runs:
            return tuple(keys_of(part) for part in planned)
        thinned = (keys_of(part) for part in planned if part.tiles is not None)
        return self._join(layer_index, runs, cached, own), *thinned

    def _join(
        self, layer_index: int, runs: tuple[tuple[int, int], ...], cached: KeyValues, own: KeyValues
    ) -> KeyValues:
        """Cached and own keys as one; the cached ones are laid down once per chunk."""
        num_cached = sum(stop - start for start, stop in runs)
        joined = self._joined.get(layer_index)
        if joined is None or joined.source is not cached or joined.runs != runs:
            batch, _, *rest = own.k_BKND.shape
            shape = (batch, num_cached + own.num_tokens, *rest)
            k, v = own.k_BKND.new_empty(shape), own.v_BKND.new_empty(shape)
            at = 0
            for start, stop in runs:
                part, place = cached.narrow(start, stop), slice(at, at + stop - start)
                rotate_into(k[:, place], part.k_BKND, self._table(part.position_K3))
                v[:, place].copy_(part.v_BKND)
                at = place.stop
            nowhere = own.position_K3.new_zeros(1, 3).expand(shape[1], 3)  # kernels do not ask
            joined = _Joined(cached, runs, KeyValues(k, v, nowhere))
            self._joined[layer_index] = joined
        joined.keys.k_BKND[:, num_cached:].copy_(own.k_BKND)
        joined.keys.v_BKND[:, num_cached:].copy_(own.v_BKND)
        return joined.keys

    def _rotate_once(self, cached: KeyValues) -> KeyValues:
        source, rotated = self._rotated.get(id(cached), (None, None))
        if rotated is None or source is not cached:
            rotated = self.rotate_cached(cached)
            self._rotated[id(cached)] = cached, rotated  # kept beside it, so that nothing else gets its identity
        return rotated

    def _table(self, position: Tensor) -> Rotation:
        """Rotation of cached keys; layers that share their positions share it."""
        key: Hashable = position.data_ptr(), position.numel()
        if position.dim() != 2:
            one_K3 = _of_all_heads(position)
            if one_K3 is None:  # every layer has its own: not worth keeping
                return make_rotation(self._reindexed(position), self._head_dim, self._theta)
            position, key = one_K3, one_K3.numpy().tobytes()  # written down in each layer, the same in all
        if key not in self._tables:
            table = make_rotation(self._reindexed(position), self._head_dim, self._theta)
            # The positions are kept beside their table, so that their address cannot be given to others meanwhile.
            self._tables[key] = position, table
        return self._tables[key][1]

    def _reindexed(self, position: Tensor) -> Tensor:
        if self._reindex is None:
            return position
        at = position.clone()
        at[..., 0] = self._reindex(position[..., 0], self._now)
        return at


def _of_all_heads(position_BKN3: Tensor) -> Tensor | None:
    """[K, 3] where all heads keep the same tokens, as in uncompressed runs of a cache that merges; on a CPU alone."""
    one_K3 = position_BKN3[0, :, 0]
    is_same = position_BKN3.is_cpu and torch.equal(position_BKN3, one_K3[:, None].expand_as(position_BKN3))
    return one_K3 if is_same else None


def _runs_to_join(whole: list[PlanPart], cached: KeyValues, own: KeyValues) -> tuple[tuple[int, int], ...]:
    """Runs of cached keys, if they can stand in one piece with all own ones behind them; else none.

    Args:
        whole: Parts of a plan that every query sees, none of them empty.
    """
    *before, last = whole or [PlanPart("own", 0, 0)]
    owns_last = last.source == "own" and (last.start, last.stop) == (0, own.num_tokens)
    if not before or not owns_last or any(part.source == "own" for part in before):
        return ()
    runs = tuple((part.start, part.stop) for part in before)
    if sum(stop - start for start, stop in runs) > _JOINED_CHUNKS * own.num_tokens:
        return ()
    return runs if all(cached.narrow(*run).log_mass_BNK is None for run in runs) else ()

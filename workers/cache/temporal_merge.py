"""TempCache: the whole history in a fixed number of bytes, by merging the keys of one thing over time.

The sink and the newest latent frames stay as they are. What grows older is absorbed into
the key groups of its layer (`groups.py`): a key joins the group whose key has the highest cosine with it before RoPE,
if that reaches the threshold. Source: FAST-AR (arXiv 2602.01801), sections 5.2, A and C. The paper finds the earlier
key by the query's top-1; we compare keys before RoPE, because their cosine does not fall with the distance in time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.cache.audit import AuditSample, OwnerRecord
from workers.cache.groups import KeyGroups, TableForm, Tokens
from workers.cache.low_bit import Storage
from workers.cache.near_tiles import Nearest
from workers.cache.uncompressed import Uncompressed
from workers.contracts import AuditKeys, KeyValues
from workers.packed_keys import PackedKeys


@dataclass(frozen=True)
class MergeSettings:
    """What a temporal cache keeps, in tokens."""

    sink_tokens: int
    recent_tokens: int
    """Newest keys kept as they are."""
    num_groups: int
    """Groups per head and layer: the hard limit; at least a chunk's tokens and one latent frame's."""
    min_cosine: float
    """A key joins a group from this cosine on; above 1 no key ever does."""
    storage: Storage = "int8"
    audit_tokens: int = 0
    """Absorbed keys that a quality guard judges by, per layer; 0 keeps none."""
    track_owners: bool = False
    """Know the slot of every key that ever came; for measurements."""


@dataclass
class _Layer:
    ends: Uncompressed | None = None
    """Sink and newest keys."""
    groups: KeyGroups | None = None
    audit: AuditSample | None = None
    owners: OwnerRecord | None = None
    view: KeyValues | None = None


class _Pack:
    """The entries of one layer as they are stored: sink, groups, recent."""

    def __init__(self, ends: Uncompressed, groups: KeyGroups) -> None:
        self._ends, self._groups = ends, groups
        self.packed = range(ends.num_sink, ends.num_sink + groups.num_used)
        self.head_dim = groups.keys.dim
        self.lineage: Hashable = (groups, groups.num_changes)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        first, last = self.packed.start, self.packed.stop
        if stop <= first or start >= last:
            skipped = 0 if stop <= first else len(self.packed)
            part = self._ends.view().narrow(start - skipped, stop - skipped)
            return part.k_BKND, part.v_BKND
        k, v = self._read_all()
        return k[:, start:stop], v[:, start:stop]

    def take_keys(self, index_RL: Tensor, row_R: Tensor, out_RLD: Tensor | None = None) -> Tensor:
        return self._groups.keys.take(index_RL, row_R, out_RLD)

    def take_values(self, index_RL: Tensor, row_R: Tensor, out_RLD: Tensor | None = None) -> Tensor:
        return self._groups.values.take(index_RL, row_R, out_RLD)

    def _read_all(self) -> tuple[Tensor, Tensor]:
        raw = self._ends.view()
        batch, num_raw, heads, dim = raw.k_BKND.shape
        shape = (batch, heads, num_raw + len(self.packed), dim)
        k, v = raw.k_BKND.new_empty(shape), raw.k_BKND.new_empty(shape)  # heads outside, as kernels want them
        first, last = self.packed.start, self.packed.stop
        self._groups.read_into(k[:, :, first:last], v[:, :, first:last])
        for x, own in ((k, raw.k_BKND), (v, raw.v_BKND)):
            x[:, :, :first] = own[:, :first].transpose(1, 2)
            x[:, :, last:] = own[:, first:].transpose(1, 2)
        return k.transpose(1, 2), v.transpose(1, 2)


class TemporalCache:
    """Sink, key groups and recent keys of every layer.

    Args:
        num_layers: Layers of the model.
        settings: What is kept.
        nearest: Finds the nearest key.
        dtype: Storage of uncompressed keys; None keeps that of the model.
    """

    def __init__(
        self, num_layers: int, settings: MergeSettings, nearest: Nearest, dtype: torch.dtype | None = None
    ) -> None:
        self._settings, self._nearest, self._dtype = settings, nearest, dtype
        self._layers = [self._new_layer(index) for index in range(num_layers)]
        self._min_cosine = settings.min_cosine

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        assert chunk.log_mass_BNK is None
        assert chunk.position_K3.dim() == 2
        layer = self._layers[layer_index]
        if layer.ends is None:
            layer.ends = self._new_ends(chunk)
        old, layer.view = layer.ends.append(chunk), None
        if old is not None:
            self._absorb(layer, old)

    def read(self, layer_index: int) -> KeyValues | None:
        layer = self._layers[layer_index]
        if layer.ends is None:
            return None
        if layer.view is None:
            layer.view = layer.ends.view() if layer.groups is None else _read_all(layer.ends, layer.groups)
        return layer.view

    def tighten(self, factor: float) -> None:
        """See `Tightens`: keys join only nearer groups. A full table still merges as far as its size asks."""
        self._min_cosine = 1 - (1 - self._settings.min_cosine) / factor

    def audit(self, layer_index: int) -> AuditKeys | None:
        layer = self._layers[layer_index]
        if layer.audit is None or layer.groups is None or layer.ends is None:
            return None
        return layer.audit.read(layer.groups.count_members, layer.ends.num_sink, layer.groups.num_used)

    def owners(self, layer_index: int) -> Tensor | None:
        layer = self._layers[layer_index]
        if layer.owners is None or layer.ends is None:
            return None
        ends, num_groups = layer.ends, 0 if layer.groups is None else layer.groups.num_used
        return layer.owners.owners(ends.num_sink, num_groups, ends.num_recent, ends.view())

    @property
    def num_tokens(self) -> int:
        layer = self._layers[0]
        raw = 0 if layer.ends is None else layer.ends.num_tokens
        return raw + (0 if layer.groups is None else layer.groups.num_used)

    @property
    def num_bytes(self) -> int:
        """Reserved, all layers: constant from the first absorbed chunk on, and at most the budget."""
        parts = (part for layer in self._layers for part in (layer.ends, layer.groups, layer.audit))
        return sum(part.num_bytes for part in parts if part is not None)

    def state(self) -> Mapping[str, Tensor]:
        state = {"min_cosine": torch.tensor(self._min_cosine, dtype=torch.float64)}
        for index, layer in enumerate(self._layers):
            if layer.ends is not None:
                state |= {f"{index}.ends.{key}": tensor for key, tensor in layer.ends.state().items()}
            if layer.groups is not None:
                state |= {f"{index}.groups.{key}": tensor for key, tensor in layer.groups.state().items()}
                if layer.audit is not None:
                    state |= {f"{index}.audit.{key}": tensor for key, tensor in layer.audit.state().items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._min_cosine = float(state["min_cosine"])
        for index in range(len(self._layers)):
            layer = self._layers[index] = self._new_layer(index)
            ends, table, sample = (_under(f"{index}.{name}.", state) for name in ("ends", "groups", "audit"))
            if ends:
                kept = KeyValues(ends["k"], ends["v"], ends["position"])
                layer.ends = self._new_ends(kept)
                layer.ends.append(kept)
            if layer.ends is not None and table:
                layer.groups = self._new_groups(layer.ends)
                layer.groups.restore(table)
                _show_ends(layer.ends, layer.groups)
            if sample and layer.audit is not None:
                layer.audit.restore(sample)

    def _new_layer(self, index: int) -> _Layer:
        s = self._settings
        audit = AuditSample(s.audit_tokens, index) if s.audit_tokens else None
        return _Layer(audit=audit, owners=OwnerRecord() if s.track_owners else None)

    def _new_ends(self, like: KeyValues) -> Uncompressed:
        s = self._settings
        return Uncompressed(like, s.sink_tokens, s.recent_tokens, self._dtype or like.k_BKND.dtype)

    def _new_groups(self, ends: Uncompressed) -> KeyGroups:
        s, k = self._settings, ends.view().k_BKND
        batch, _, heads, dim = k.shape
        form = TableForm((batch, heads, s.num_groups, dim), s.storage, s.sink_tokens, s.recent_tokens)
        return KeyGroups(form, k.dtype, k.device, self._nearest)

    def _absorb(self, layer: _Layer, old: KeyValues) -> None:
        assert layer.ends is not None
        if layer.groups is None:
            layer.groups = self._new_groups(layer.ends)
        threshold = torch.tensor(self._min_cosine, device=old.k_BKND.device).expand(1, old.k_BKND.shape[2], 1)
        slot, moved = layer.groups.absorb(_as_tokens(old), threshold)
        _show_ends(layer.ends, layer.groups)
        if layer.audit is not None:
            layer.audit.follow(old, slot, moved)
        if layer.owners is not None:
            layer.owners.follow(slot, moved)


def _show_ends(ends: Uncompressed, groups: KeyGroups) -> None:
    """Let readers of the table see where sink and newest keys are."""
    position = ends.view().position_K3
    groups.records.show(groups.num_used, position[: ends.num_sink], position[ends.num_sink :])


def _read_all(ends: Uncompressed, groups: KeyGroups) -> KeyValues:
    """One view in the order sink, groups, recent; the groups are unpacked as far as somebody looks at them."""
    return PackedKeys(_Pack(ends, groups), *groups.records.read(ends.num_tokens + groups.num_used))


def _as_tokens(frame: KeyValues) -> Tokens:
    k, v = frame.k_BKND.transpose(1, 2), frame.v_BKND.transpose(1, 2)
    return Tokens(k, v, frame.position_K3[None, None].expand(*k.shape[:3], 3))


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Part of a state."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}

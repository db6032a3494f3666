"""TempCache: the whole history in a fixed number of bytes, by merging the keys of one thing over time.

The sink and the newest latent frames stay as they are. What grows older is absorbed into
the key groups of its layer (`groups.py`): a key joins the group whose key has the highest cosine with it before RoPE,
if that reaches the threshold. Source: FAST-AR (arXiv 2602.01801), sections 5.2, A and C. The paper finds the earlier
key by the query's top-1; we compare keys before RoPE, because their cosine does not fall with the distance in time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.cache.audit import AuditSample, OwnerRecord
from workers.cache.groups import KeyGroups, Tokens
from workers.cache.low_bit import Storage
from workers.cache.near_tiles import Nearest
from workers.contracts import AuditKeys, KeyValues
from workers.packed_keys import PackedKeys


@dataclass(frozen=True)
class MergeSettings:
    """What a temporal cache keeps, in tokens."""

    sink_tokens: int
    recent_tokens: int
    """Newest keys kept as they are; whole chunks leave, so up to a chunk less one token more is held meanwhile."""
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
    sink: KeyValues | None = None
    recent: KeyValues | None = None
    groups: KeyGroups | None = None
    audit: AuditSample | None = None
    owners: OwnerRecord | None = None
    view: KeyValues | None = None


class _Pack:
    """The entries of one layer as they are stored: sink, groups, recent."""

    def __init__(self, sink: KeyValues | None, groups: KeyGroups, recent: KeyValues | None) -> None:
        self._sink, self._groups, self._recent = sink, groups, recent
        num_sink = 0 if sink is None else sink.num_tokens
        self.packed = range(num_sink, num_sink + groups.num_used)
        self.head_dim = groups.keys.dim

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        first, last = self.packed.start, self.packed.stop
        if self._sink is not None and stop <= first:
            part = self._sink.narrow(start, stop)
            return part.k_BKND, part.v_BKND
        if self._recent is not None and start >= last:
            part = self._recent.narrow(start - last, stop - last)
            return part.k_BKND, part.v_BKND
        k, v = self._read_all()
        return k[:, start:stop], v[:, start:stop]

    def take_keys(self, index_RL: Tensor, row_R: Tensor, out_RLD: Tensor | None = None) -> Tensor:
        return self._groups.keys.take(index_RL, row_R, out_RLD)

    def take_values(self, index_RL: Tensor, row_R: Tensor, out_RLD: Tensor | None = None) -> Tensor:
        return self._groups.values.take(index_RL, row_R, out_RLD)

    def _read_all(self) -> tuple[Tensor, Tensor]:
        raw = [part for part in (self._sink, self._recent) if part is not None]
        some = raw[0].k_BKND
        batch, _, heads, dim = some.shape
        num_tokens = self._groups.num_used + sum(part.num_tokens for part in raw)
        shape = (batch, heads, num_tokens, dim)
        k, v = some.new_empty(shape), some.new_empty(shape)  # heads outside, as kernels want them
        run = slice(self.packed.start, self.packed.stop)
        self._groups.read_into(k[:, :, run], v[:, :, run])
        for part, start in ((self._sink, 0), (self._recent, self.packed.stop)):
            if part is not None:
                run = slice(start, start + part.num_tokens)
                k[:, :, run], v[:, :, run] = part.k_BKND.transpose(1, 2), part.v_BKND.transpose(1, 2)
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
        chunk = self._own(chunk)
        held = 0 if layer.sink is None else layer.sink.num_tokens
        to_sink = min(chunk.num_tokens, self._settings.sink_tokens - held)
        if to_sink > 0:
            layer.sink = _join(layer.sink, chunk.narrow(0, to_sink))
            chunk = chunk.narrow(to_sink, chunk.num_tokens)
        if chunk.num_tokens == 0:
            layer.view = None
            return
        recent = _join(layer.recent, chunk)
        leaving = max(0, recent.num_tokens - self._settings.recent_tokens)
        if leaving:
            self._absorb(layer, recent.narrow(0, leaving))
            recent = self._own(recent.narrow(leaving, recent.num_tokens))  # lets go of the longer memory
        layer.recent, layer.view = recent, None

    def read(self, layer_index: int) -> KeyValues | None:
        layer = self._layers[layer_index]
        if layer.view is None and layer.sink is None and layer.recent is None:
            return None
        if layer.view is None:
            layer.view = self._assemble(layer)
        return layer.view

    def tighten(self, factor: float) -> None:
        """See `Tightens`: keys join only nearer groups. A full table still merges as far as its size asks."""
        self._min_cosine = 1 - (1 - self._settings.min_cosine) / factor

    def audit(self, layer_index: int) -> AuditKeys | None:
        layer = self._layers[layer_index]
        if layer.audit is None or layer.groups is None:
            return None
        num_sink = 0 if layer.sink is None else layer.sink.num_tokens
        return layer.audit.read(layer.groups.count_members, num_sink, layer.groups.num_used)

    def owners(self, layer_index: int) -> Tensor | None:
        layer = self._layers[layer_index]
        some = layer.sink or layer.recent
        if layer.owners is None or some is None:
            return None
        num_sink, num_recent = (0 if part is None else part.num_tokens for part in (layer.sink, layer.recent))
        num_groups = 0 if layer.groups is None else layer.groups.num_used
        return layer.owners.owners(num_sink, num_groups, num_recent, some)

    @property
    def num_tokens(self) -> int:
        layer = self._layers[0]
        raw = sum(part.num_tokens for part in (layer.sink, layer.recent) if part is not None)
        return raw + (0 if layer.groups is None else layer.groups.num_used)

    @property
    def num_bytes(self) -> int:
        return sum(self._layer_bytes(layer) for layer in self._layers)

    def state(self) -> Mapping[str, Tensor]:
        state = {"min_cosine": torch.tensor(self._min_cosine, dtype=torch.float64)}
        for index, layer in enumerate(self._layers):
            for name, part in (("sink", layer.sink), ("recent", layer.recent)):
                if part is not None:
                    values = {"k": part.k_BKND, "v": part.v_BKND, "position": part.position_K3}
                    state |= {f"{index}.{name}.{key}": tensor for key, tensor in values.items()}
            if layer.groups is not None:
                state |= {f"{index}.groups.{key}": tensor for key, tensor in layer.groups.state().items()}
                if layer.audit is not None:
                    state |= {f"{index}.audit.{key}": tensor for key, tensor in layer.audit.state().items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._min_cosine = float(state["min_cosine"])
        for index in range(len(self._layers)):
            layer = self._layers[index] = self._new_layer(index)
            layer.sink, layer.recent = (_read_part(state, f"{index}.{name}") for name in ("sink", "recent"))
            prefix = f"{index}.groups."
            table = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            if table:
                assert layer.recent is not None
                layer.groups = self._new_groups(layer.recent)
                layer.groups.restore(table)
            prefix = f"{index}.audit."
            sample = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            if sample and layer.audit is not None:
                layer.audit.restore(sample)

    def _new_layer(self, index: int) -> _Layer:
        s = self._settings
        audit = AuditSample(s.audit_tokens, index) if s.audit_tokens else None
        return _Layer(audit=audit, owners=OwnerRecord() if s.track_owners else None)

    def _own(self, part: KeyValues) -> KeyValues:
        dtype = self._dtype or part.k_BKND.dtype
        k, v = (x.to(dtype, copy=True, memory_format=torch.contiguous_format) for x in (part.k_BKND, part.v_BKND))
        return KeyValues(k, v, part.position_K3.clone())

    def _new_groups(self, like: KeyValues) -> KeyGroups:
        batch, _, heads, dim = like.k_BKND.shape
        shape = (batch, heads, self._settings.num_groups, dim)
        s, k = self._settings, like.k_BKND
        return KeyGroups(shape, s.storage, k.dtype, k.device, self._nearest)

    def _absorb(self, layer: _Layer, old: KeyValues) -> None:
        if layer.groups is None:
            layer.groups = self._new_groups(old)
        threshold = torch.tensor(self._min_cosine, device=old.k_BKND.device).expand(1, old.k_BKND.shape[2], 1)
        slot, moved = layer.groups.absorb(_as_tokens(old), threshold)
        if layer.audit is not None:
            layer.audit.follow(old, slot, moved)
        if layer.owners is not None:
            layer.owners.follow(slot, moved)

    def _assemble(self, layer: _Layer) -> KeyValues:
        """One view in the order sink, groups, recent; the groups are unpacked as far as somebody looks at them."""
        raw = [part for part in (layer.sink, layer.recent) if part is not None]
        if layer.groups is None:
            return raw[0] if len(raw) == 1 else _join(*raw)
        position, mass = layer.groups.read_records()
        batch, heads, _ = mass.shape
        positions, masses = [position], [mass]
        for part in raw:
            at = part.position_K3[None, None].expand(batch, heads, -1, 3)
            side = 0 if part is layer.sink else len(positions)
            positions.insert(side, at)
            masses.insert(side, mass.new_zeros(()).expand(at.shape[:3]))
        pack = _Pack(layer.sink, layer.groups, layer.recent)
        return PackedKeys(pack, torch.cat(positions, 2).transpose(1, 2), torch.cat(masses, 2))

    def _layer_bytes(self, layer: _Layer) -> int:
        raw = sum(part.num_bytes for part in (layer.sink, layer.recent) if part is not None)
        audit = 0 if layer.audit is None else layer.audit.num_bytes
        return raw + audit + (0 if layer.groups is None else layer.groups.num_bytes)


def _as_tokens(frame: KeyValues) -> Tokens:
    k, v = frame.k_BKND.transpose(1, 2), frame.v_BKND.transpose(1, 2)
    return Tokens(k, v, frame.position_K3[None, None].expand(*k.shape[:3], 3))


def _join(a: KeyValues | None, b: KeyValues) -> KeyValues:
    if a is None:
        return b
    pairs = ((a.k_BKND, b.k_BKND, 1), (a.v_BKND, b.v_BKND, 1), (a.position_K3, b.position_K3, 0))
    return KeyValues(*(torch.cat((x, y), dim=dim) for x, y, dim in pairs))


def _read_part(state: Mapping[str, Tensor], prefix: str) -> KeyValues | None:
    if f"{prefix}.k" not in state:
        return None
    return KeyValues(*(state[f"{prefix}.{name}"].clone() for name in ("k", "v", "position")))

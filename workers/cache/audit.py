"""What became of the keys that a layer merged: for all of them (measurements), or for a small fair sample (the guard).

Both follow the slots that keys are given and the moves of slots; neither decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from workers.contracts import AuditKeys, KeyValues


class OwnerRecord:
    """The slot of every key that was ever absorbed, in the order of their coming: grows with the history."""

    def __init__(self) -> None:
        self.slot_BNT: Tensor | None = None

    def follow(self, slot_BNQ: Tensor, moved_BNC: Tensor | None) -> None:
        """Keys were absorbed into these slots; before that, old slots went where `moved_BNC` says."""
        if self.slot_BNT is None:
            self.slot_BNT = slot_BNQ.clone()
            return
        self.slot_BNT = torch.cat((_move(self.slot_BNT, moved_BNC), slot_BNQ), -1)

    def owners(self, num_sink: int, num_slots: int, num_recent: int, like: KeyValues) -> Tensor:
        """owner_BNT of all tokens, for entries in the order sink, slots, recent."""
        batch, _, heads, _ = like.k_BKND.shape
        device = like.k_BKND.device
        sink = torch.arange(num_sink, device=device)
        recent = torch.arange(num_recent, device=device) + num_sink + num_slots
        parts = [part.expand(batch, heads, -1) for part in (sink, recent)]
        if self.slot_BNT is not None:
            parts.insert(1, torch.where(self.slot_BNT >= 0, self.slot_BNT + num_sink, -1))
        return torch.cat(parts, -1)


class AuditSample:
    """A uniform sample of fixed size of the keys that one layer absorbed.

    Each key draws a number once and the smallest ones stay, so that every key has had the same chance.

    Args:
        num_keys: Size of the sample.
        layer_index: Layers draw different numbers.
    """

    def __init__(self, num_keys: int, layer_index: int) -> None:
        self._num_keys, self._layer_index = num_keys, layer_index
        self._num_seen = 0
        self._k: Tensor | None = None
        self._position = self._draw = self._slot = torch.zeros(0)

    def follow(self, new: KeyValues, slot_BNQ: Tensor, moved_BNC: Tensor | None) -> None:
        """Keys were absorbed into these slots; before that, old slots went where `moved_BNC` says."""
        # torch's own generator takes 32 bits of a seed; this one takes both numbers.
        generator = np.random.Generator(np.random.Philox(key=[self._layer_index, self._num_seen]))
        draw = torch.from_numpy(generator.random(new.num_tokens)).to(new.k_BKND.device)
        self._num_seen += new.num_tokens
        k, position, slot = new.k_BKND, new.position_K3, slot_BNQ
        if self._k is not None:
            k = torch.cat((self._k, k), 1)
            position, draw = torch.cat((self._position, position)), torch.cat((self._draw, draw))
            slot = torch.cat((_move(self._slot, moved_BNC), slot), -1)
        kept = draw.argsort(stable=True)[: self._num_keys]
        self._k, self._position, self._draw = k[:, kept], position[kept], draw[kept]
        self._slot = slot[..., kept]

    def read(self, count_members: Callable[[Tensor], Tensor], num_sink: int, num_slots: int) -> AuditKeys | None:
        """The sample now, for entries in the order sink, slots, recent.

        Args:
            count_members: slot_BNA -> how many keys these slots hold.
            num_sink: Entries before the slots.
            num_slots: Slots that are read.
        """
        if self._k is None:
            return None
        held = self._slot.clamp(min=0)
        owner = torch.where(self._slot >= 0, held + num_sink, -1)
        members = count_members(held).clamp(min=1)
        stop = num_sink + num_slots
        return AuditKeys(self._k, self._position, owner, members, self._num_seen, num_sink, stop)

    @staticmethod
    def bytes_per_key(num_heads: int, dim: int, dtype: torch.dtype) -> int:
        """Of one key in all heads: itself, position, draw and slots."""
        return dim * dtype.itemsize + 3 * 4 + 8 + 8 * num_heads

    @property
    def num_bytes(self) -> int:
        """Of the sample."""
        tensors = (self._position, self._draw, self._slot)
        return 0 if self._k is None else self._k.nbytes + sum(tensor.nbytes for tensor in tensors)

    def state(self) -> Mapping[str, Tensor]:
        """Everything that decides what comes; empty before the first key."""
        if self._k is None:
            return {}
        seen = torch.tensor(self._num_seen)
        return {"k": self._k, "position": self._position, "draw": self._draw, "slot": self._slot, "seen": seen}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become the sample that `state` came from."""
        if not state:
            self._k, self._num_seen = None, 0
            return
        self._k, self._position = state["k"].clone(), state["position"].clone()
        self._draw, self._slot = state["draw"].clone(), state["slot"].clone()
        self._num_seen = int(state["seen"])


def _move(slot: Tensor, moved_BNC: Tensor | None) -> Tensor:
    """Where slots have gone; what was nowhere stays there."""
    if moved_BNC is None:
        return slot
    return torch.where(slot >= 0, moved_BNC.gather(-1, slot.clamp(min=0)), -1)

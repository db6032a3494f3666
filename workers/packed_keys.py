"""Keys that are unpacked when they are asked for: whoever looks at some of a compressed history pays for those alone.

A cache that stores its history in few bits gives out `PackedKeys` in the place of `KeyValues`. Who takes some keys
(`take`) gets them unpacked and, after `turned`, rotated; who reads `k_BKND` or `v_BKND` gets all of them, once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

from workers.contracts import KeyValues

Turn = Callable[[KeyValues, bool], KeyValues]
"""RoPE of keys at their positions; values are passed on. True: the keys are nobody else's and may be written over."""


class Pack(Protocol):
    """Where packed keys lie; entries are counted from the first one of the whole view."""

    packed: range
    """Entries that are packed; those before and behind them are kept as they are."""
    head_dim: int
    lineage: Hashable
    """Equal in packs of which the later one holds what the earlier one held, in the same places, and perhaps newer keys
    behind it or where a head had nothing."""

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of some entries, [B, K, N, D]; without a copy where none of them is packed."""
        ...

    def take_keys(self, index_RL: Tensor, row_R: Tensor, out_RLD: Tensor | None = None) -> Tensor:
        """Packed keys by row (batch times heads) and index among the packed ones, k_RLD; written to `out_RLD`."""
        ...

    def take_values(self, index_RL: Tensor, row_R: Tensor, out_RLD: Tensor | None = None) -> Tensor:
        """The same of values."""
        ...


class PackedKeys(KeyValues):
    """Entries of one layer, `start` up to `stop` of its view.

    Args:
        pack: Where they lie; it must not change while these exist.
        position_BKN3, log_mass_BNK: Of these entries.
        start: Of the first one in the view.
        turn: What is done to keys that are unpacked; None leaves them as they are stored.
        turns_alike: Whether a key is turned in the same way whenever it is asked for.
    """

    def __init__(
        self,
        pack: Pack,
        position_BKN3: Tensor,
        log_mass_BNK: Tensor,
        start: int = 0,
        turn: Turn | None = None,
        turns_alike: bool = True,
    ) -> None:
        for name, value in {
            "pack": pack,
            "start": start,
            "turn": turn,
            "turns_alike": turns_alike,
            "position_K3": position_BKN3,
            "log_mass_BNK": log_mass_BNK,
            "_plain": {},
            "_runs": {},
        }.items():
            object.__setattr__(self, name, value)

    pack: Pack
    start: int
    turn: Turn | None
    turns_alike: bool
    _plain: dict[tuple[int, int], KeyValues]
    _runs: dict[tuple[int, int], PackedKeys]
    """Runs by their first and last entry in the view: the same object each time, so that what is unpacked is kept."""

    @property
    def k_BKND(self) -> Tensor:  # noqa: N802, a field of `KeyValues`
        return self.unpacked().k_BKND

    @property
    def v_BKND(self) -> Tensor:  # noqa: N802
        return self.unpacked().v_BKND

    @property
    def num_tokens(self) -> int:
        return self.position_K3.shape[1]

    @property
    def head_dim(self) -> int:
        return self.pack.head_dim

    @property
    def num_bytes(self) -> int:
        return self.unpacked().num_bytes

    def unpacked(self) -> KeyValues:
        """All of them as they are otherwise given out; made once."""
        return self._plain_run(self.start, self.start + self.num_tokens)

    def narrow(self, start: int, stop: int) -> KeyValues:
        """A run, the same object each time; one of which no entry is packed comes as it is."""
        if (start, stop) == (0, self.num_tokens):
            return self
        first, last = self.start + start, self.start + stop
        packed = self.pack.packed
        if last <= packed.start or first >= packed.stop:
            return self._plain_run(first, last)
        if (first, last) not in self._runs:
            position, mass = self.position_K3[:, start:stop], self._mass[..., start:stop]
            self._runs[first, last] = PackedKeys(self.pack, position, mass, first, self.turn, self.turns_alike)
        return self._runs[first, last]

    def turned(self, turn: Turn, alike: bool = False) -> PackedKeys:
        """The same keys after RoPE.

        Args:
            turn: Does it.
            alike: Whether it does the same to a key in every chunk.
        """
        return PackedKeys(self.pack, self.position_K3, self._mass, self.start, turn, alike)

    @property
    def lineage(self) -> Hashable | None:
        """See `Pack`; None where `take` gives other keys in every chunk, or not all of them are packed."""
        return (self.pack.lineage, self.start) if self.turns_alike and self.are_all_packed else None

    @property
    def are_all_packed(self) -> bool:
        """Whether `take` serves every entry."""
        packed = self.pack.packed
        return packed.start <= self.start and self.start + self.num_tokens <= packed.stop

    def take(self, index_RL: Tensor, row_R: Tensor, out: tuple[Tensor, Tensor] | None = None) -> KeyValues:
        """Some entries: R in the place of the batch, one head.

        Args:
            index_RL: Which of these entries, for each row.
            row_R: Batch times heads that each row looks into.
            out: Contiguous memory for keys and values, [R, L, D] both.
        """
        place_RL = index_RL + (self.start - self.pack.packed.start)
        k_RLD = self.pack.take_keys(place_RL, row_R, None if out is None else out[0])
        v_RLD = self.pack.take_values(place_RL, row_R, None if out is None else out[1])
        return self._taken(k_RLD, v_RLD, index_RL, row_R)

    def take_keys(self, index_BNS: Tensor) -> KeyValues:
        """Some entries of each head, [B, S, N, D]; the values are not unpacked: keys stand in their place."""
        index_RL = index_BNS.flatten(0, 1)
        row_R = torch.arange(len(index_RL), device=index_RL.device)
        k_RLD = self.pack.take_keys(index_RL + (self.start - self.pack.packed.start), row_R)
        found = self._taken(k_RLD, k_RLD, index_RL, row_R)
        heads = index_BNS.shape[:2]
        k_BSND = found.k_BKND[:, :, 0].unflatten(0, heads).transpose(1, 2)
        position_BSN3 = found.position_K3[:, :, 0].unflatten(0, heads).transpose(1, 2)
        assert found.log_mass_BNK is not None
        return KeyValues(k_BSND, k_BSND, position_BSN3, found.log_mass_BNK[:, 0].unflatten(0, heads))

    def _taken(self, k_RLD: Tensor, v_RLD: Tensor, index_RL: Tensor, row_R: Tensor) -> KeyValues:
        position_RC3 = self.position_K3.transpose(1, 2).flatten(0, 1)
        line_RL = index_RL + (row_R * position_RC3.shape[1])[:, None]
        position_RL3 = position_RC3.flatten(0, 1).index_select(0, line_RL.flatten()).view(*index_RL.shape, 3)
        mass_RL = self._mass.reshape(-1).index_select(0, line_RL.flatten()).view(index_RL.shape)
        taken = KeyValues(k_RLD[:, :, None], v_RLD[:, :, None], position_RL3[:, :, None], mass_RL[:, None])
        return taken if self.turn is None else self.turn(taken, True)

    def _plain_run(self, first: int, last: int) -> KeyValues:
        if (first, last) not in self._plain:
            k, v = self.pack.read(first, last)
            run, packed = slice(first - self.start, last - self.start), self.pack.packed
            is_raw = last <= packed.start or first >= packed.stop  # and stands for itself alone
            plain = KeyValues(k, v, self.position_K3[:, run], None if is_raw else self._mass[..., run])
            self._plain[first, last] = plain if self.turn is None else self.turn(plain, False)
        return self._plain[first, last]

    @property
    def _mass(self) -> Tensor:
        assert self.log_mass_BNK is not None
        return self.log_mass_BNK

"""Sink and newest keys of one layer as they came, side by side in one buffer of fixed size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.contracts import KeyValues


class Uncompressed:
    """The sink, then the newest keys.

    Args:
        like: Keys of the model, before RoPE: batch, heads and channels.
        sink_tokens: First keys of the rollout, always kept.
        recent_tokens: Newest keys kept besides.
        dtype: Storage.
    """

    def __init__(self, like: KeyValues, sink_tokens: int, recent_tokens: int, dtype: torch.dtype) -> None:
        batch, _, *rest = like.k_BKND.shape
        shape = (batch, sink_tokens + recent_tokens, *rest)
        self._k_BKND, self._v_BKND = (torch.zeros(shape, dtype=dtype, device=like.k_BKND.device) for _ in range(2))
        self._sink_tokens, self._recent_tokens = sink_tokens, recent_tokens
        self._position_K3 = like.position_K3.new_zeros(0, 3)

    @property
    def num_tokens(self) -> int:
        return len(self._position_K3)

    @property
    def num_sink(self) -> int:
        return min(self.num_tokens, self._sink_tokens)

    @property
    def num_recent(self) -> int:
        return self.num_tokens - self.num_sink

    @property
    def num_bytes(self) -> int:
        """Reserved."""
        return self._k_BKND.nbytes + self._v_BKND.nbytes + self._position_K3.nbytes

    def view(self) -> KeyValues:
        """All of them, as views that the next `append` writes over."""
        num = self.num_tokens
        return KeyValues(self._k_BKND[:, :num], self._v_BKND[:, :num], self._position_K3)

    def append(self, chunk: KeyValues) -> KeyValues | None:
        """Take over keys (copied); those that are no longer among the newest, in the order of time, for the caller."""
        held, to_sink = self.num_tokens, min(chunk.num_tokens, self._sink_tokens - self.num_sink)
        if to_sink:
            self._write(held, chunk.narrow(0, to_sink))
            chunk = chunk.narrow(to_sink, chunk.num_tokens)
        first = self.num_sink
        leaving = max(0, self.num_recent + chunk.num_tokens - self._recent_tokens)
        of_old = min(leaving, self.num_recent)
        old = self._leave(first, of_old, chunk.narrow(0, leaving - of_old)) if leaving else None
        self._write(self.num_tokens, chunk.narrow(leaving - of_old, chunk.num_tokens))
        return old

    def _leave(self, first: int, num: int, new: KeyValues) -> KeyValues:
        """The oldest of the newest go, and with them new ones that have not come in; the others move up."""
        stop = self.num_tokens
        left = []
        for x, more in ((self._k_BKND, new.k_BKND), (self._v_BKND, new.v_BKND)):
            left.append(torch.cat((x[:, first : first + num], more.to(x.dtype)), 1))
            # Cloned because source and destination overlap.
            x[:, first : stop - num] = x[:, first + num : stop].clone()
        position = self._position_K3
        self._position_K3 = torch.cat((position[:first], position[first + num :]))
        return KeyValues(left[0], left[1], torch.cat((position[first : first + num], new.position_K3)))

    def _write(self, start: int, new: KeyValues) -> None:
        """Keys behind all that are there."""
        run = slice(start, start + new.num_tokens)
        self._k_BKND[:, run], self._v_BKND[:, run] = new.k_BKND, new.v_BKND
        self._position_K3 = torch.cat((self._position_K3, new.position_K3))

    def state(self) -> Mapping[str, Tensor]:
        """Everything that decides what comes."""
        kept = self.view()
        return {"k": kept.k_BKND, "v": kept.v_BKND, "position": kept.position_K3}

"""What a call saw of the history, kept for the calls of the same chunk that do not look at it themselves.

A call that looks attends to its listed tiles and keeps result and log-sum-exp of every layer, in buffers that never
move. Every call attends afresh to the slots that are always seen (own chunk, and as configured newest chunks and sink)
and composes the two exactly, as if the queries that looked had been its own.

On a GPU a call that looks computes both at once: the 444 programs of a chunk at 480x832 are three waves and a third on
132 multiprocessors, and what one kernel leaves idle at its end the other fills (`tests/bench/attention_waves.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from workers.attention.tile_choice import TileRuns
from workers.coded_tiles import CODED_TILE, TILE_BYTES, CodedTiles, erase_keys, room_for_tiles
from workers.kernels.listed_parts import CodedAttention, PartedAttention
from workers.streams import stream_for

Mark = Callable[[str], None]
"""Told the name of each part of a call as it ends."""


class Keys(Protocol):
    """Of one layer of a table."""

    k_NLW: Tensor
    v_NLD: Tensor


@dataclass(frozen=True)
class FreshSlots:
    """What every call attends to itself: whole tiles at the start of a table and at its end."""

    num_first: int
    """Tiles of the sink, where that is always seen."""
    num_last: int
    """Tiles of the newest chunks, where they are always seen, and of the own chunk, which lies last."""
    own_tiles: int
    own_tokens: int
    """Keys of the own chunk, as many as queries."""
    tile: int

    @classmethod
    def of(cls, runs: TileRuns, own_tokens: int, tile: int) -> FreshSlots:
        """The runs that are always seen; what lies between a sink and the newest chunks is chosen among."""
        own_tiles = -(-own_tokens // tile)
        starts = {stop: first for first, stop in runs.always}
        last = runs.num_tiles
        while last in starts and starts[last] > 0:
            last = starts[last]
        first = max((stop for start, stop in runs.always if start == 0 and stop <= last), default=0)
        fresh = cls(first, runs.num_tiles - last, own_tiles, own_tokens, tile)
        assert fresh.num_tiles == sum(stop - start for start, stop in runs.always), "sink, newest and own chunk alone"
        return fresh

    @property
    def num_tiles(self) -> int:
        return self.num_first + self.num_last

    @property
    def is_own_alone(self) -> bool:
        return self.num_tiles == self.own_tiles

    def list_of(self, num_tiles: int) -> list[int]:
        """By number, in a table of so many."""
        return [*range(self.num_first), *range(num_tiles - self.num_last, num_tiles)]


class Looked(NamedTuple):
    """What a call that looks at the history reads."""

    keys: Keys | CodedTiles
    """Coded where the call attends so (`KeptHistory.reads_coded`)."""
    index_NIJ: Tensor
    """int32: tiles of the history that a tile of queries sees, none of those that are always seen."""


class _Kept(NamedTuple):
    out_QND: Tensor
    lse_QN: Tensor


class KeptHistory:
    """The self-attention of a rollout some of whose calls look at the history.

    Args:
        ways: How the parts are attended to and composed.
        fresh: What every call attends to itself.
        layers: Of the table; sizes, dtype and device are theirs.
        clean_ways: Of a clean pass, if those are others.
        lay_out_coded: The coded tiles of a layer that its lists name, where a way reads such.
    """

    def __init__(
        self,
        ways: PartedAttention,
        fresh: FreshSlots,
        layers: Sequence[Keys],
        clean_ways: PartedAttention | None = None,
        lay_out_coded: Callable[[int], CodedTiles] | None = None,
    ) -> None:
        self._ways, self._clean_ways, self._fresh = ways, clean_ways or ways, fresh
        k_NLW, v_NLD = layers[0].k_NLW, layers[0].v_NLD
        heads, slots, head_dim = v_NLD.shape
        shape, device = (fresh.own_tokens, heads, head_dim), v_NLD.device
        exact = torch.float64 if v_NLD.dtype == torch.float64 else torch.float32
        self._kept = [
            _Kept(
                torch.zeros(shape, dtype=v_NLD.dtype, device=device),
                torch.full((heads, fresh.own_tokens), -torch.inf, dtype=exact, device=device).T,
            )
            for _ in layers
        ]
        # Without a sink the last tiles are a table of their own: some kernels take longer for one that has more.
        num_tiles = slots // fresh.tile if fresh.num_first else fresh.num_last
        listed = torch.tensor(fresh.list_of(num_tiles), dtype=torch.int32, device=k_NLW.device)
        self._list_NIJ = listed.expand(heads, fresh.own_tiles, -1).contiguous()
        is_coded = any(way.coded is not None for way in (self._ways, self._clean_ways))
        assert lay_out_coded is not None or not is_coded
        self._lay_out_coded = lay_out_coded
        self._coded = room_for_tiles(heads, fresh.num_tiles, device) if is_coded else None
        self._own_q_NIB: Tensor | None = None
        if self._coded is not None and fresh.is_own_alone:
            # What is coded into these rooms ends with the last query and key: the rest stays as it is here.
            self._own_q_NIB = self._coded.k_NTB.new_zeros(heads, -(-fresh.own_tokens // CODED_TILE), TILE_BYTES)
            erase_keys(self._coded, fresh.own_tokens)
        self._beside = stream_for("own keys beside the history", device) if k_NLW.is_cuda else None
        self.attends_at_once = True
        """To both, in calls that look; a bench that times them apart asks for one after the other."""

    @property
    def num_slots_fresh(self) -> int:
        """That every call sees, empty ones included."""
        return self._fresh.num_tiles * self._fresh.tile

    @property
    def has_clean_ways(self) -> bool:
        """Whether a clean pass attends otherwise than a step."""
        return self._clean_ways is not self._ways

    def reads_coded(self, *, clean: bool) -> bool:
        """Whether such a call reads the history as coded tiles."""
        return self._ways_of(clean).coded is not None

    def lay_out_coded(self, layer_index: int) -> CodedTiles:
        """What a call that `reads_coded` looks at, until anything else of the table is laid out."""
        assert self._lay_out_coded is not None
        return self._lay_out_coded(layer_index)

    def rooms_for_codes(self, *, clean: bool) -> tuple[Tensor, Tensor] | None:
        """q_NIB and k_NTB of own queries and keys, the same of all layers: where such a call attends to codes of these
        and whoever computes them may write those, before a call of `attend` that is told so."""
        if self._own_q_NIB is None or self._coded is None or not self.reads_coded(clean=clean):
            return None
        return self._own_q_NIB, self._coded.k_NTB

    @property
    def num_bytes(self) -> int:
        """Of what is kept."""
        return sum(x.nbytes for kept in self._kept for x in kept)

    def attend(
        self,
        layer_index: int,
        q_QNW: Tensor,
        fresh: Keys,
        looked: Looked | None,
        mark: Mark = lambda name: None,
        *,
        clean: bool = False,
        is_coded: bool = False,
    ) -> Tensor:
        """out_QND of one call of one layer.

        Args:
            layer_index: Which.
            q_QNW: Queries after RoPE, ones in the channels of log m.
            fresh: Keys of the layer; of these, what is always seen is read.
            looked: None takes what the newest call that looked saw.
            mark: Told the parts.
            clean: A clean pass.
            is_coded: Its queries and own keys lie in `rooms_for_codes`; only own values are read otherwise.
        """
        kept, ways = self._kept[layer_index], self._ways_of(clean)
        q, own = (q_QNW, None) if ways.coded is None else self._code(ways.coded, q_QNW, fresh, is_coded=is_coded)
        beside = self._beside if looked is not None and self.attends_at_once else None
        if beside is not None:
            beside.wait_stream(torch.cuda.current_stream())
        if looked is not None:
            self._attend_listed(ways, q, looked, kept)
            mark("attention to the history")
        with torch.cuda.stream(beside):  # None changes nothing
            if is_coded:
                self._code_values(ways, fresh)
            out, lse = self._attend_fresh(ways, q, fresh if own is None else own)
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)
        mark("attention to own keys")
        whole = ways.compose(*kept, out, lse)
        mark("composition")
        return whole

    def _ways_of(self, clean: bool) -> PartedAttention:
        return self._clean_ways if clean else self._ways

    def _attend_listed(self, ways: PartedAttention, q: Tensor, looked: Looked, to: _Kept) -> None:
        keys = looked.keys
        if not isinstance(keys, CodedTiles):
            ways.listed_into(q, keys.k_NLW, keys.v_NLD, looked.index_NIJ, to)
            return
        assert ways.coded is not None
        ways.coded.attend(q, keys, looked.index_NIJ, self._fresh.own_tokens, to)

    def _attend_fresh(self, ways: PartedAttention, q: Tensor, keys: Keys | CodedTiles) -> tuple[Tensor, Tensor]:
        f = self._fresh
        if isinstance(keys, CodedTiles):
            assert ways.coded is not None
            return ways.coded.attend(q, keys, None, f.own_tokens)
        if f.num_first:
            return ways.listed(q, keys.k_NLW, keys.v_NLD, self._list_NIJ)
        k, v = self._last_run(keys, in_tiles=ways.run is None)
        if ways.run is None:
            return ways.listed(q, k, v, self._list_NIJ)
        return ways.run(q[..., : k.shape[2]], k, v)

    def _code_values(self, ways: PartedAttention, keys: Keys) -> None:
        assert ways.coded is not None
        assert self._coded is not None
        ways.coded.code_values(self._last_run(keys)[1], self._coded.v_NTB)

    def _code(self, coded: CodedAttention, q_QNW: Tensor, keys: Keys, *, is_coded: bool) -> tuple[Tensor, CodedTiles]:
        """The queries, and what every call attends to itself."""
        f = self._fresh
        if is_coded:
            assert self._own_q_NIB is not None
            assert self._coded is not None
            return self._own_q_NIB, self._coded
        k, v = self._last_run(keys)
        if f.num_first:
            first = f.num_first * f.tile
            k, v = torch.cat((keys.k_NLW[:, :first], k), 1), torch.cat((keys.v_NLD[:, :first], v), 1)
        return coded.code_chunk(q_QNW, k, v, self._coded)

    def _last_run(self, keys: Keys, *, in_tiles: bool = False) -> tuple[Tensor, Tensor]:
        """Keys and values that lie last and that every call sees; `in_tiles`: empty slots of the last one, too."""
        f, k, v = self._fresh, keys.k_NLW, keys.v_NLD
        start = k.shape[1] - f.num_last * f.tile
        if in_tiles or not f.is_own_alone:
            return k[:, start:], v[:, start:]
        # Its keys alone: no empty slot, log m 0, so the channels of log m need not be read.
        own = slice(start, start + f.own_tokens)
        return k[:, own, : v.shape[2]], v[:, own]

"""Tile-sparse attention by any kernel that is dense: gather the keys that each query tile sees, attend, put back.

The rows (batch, head, query tile) become the batch of dense calls; rows that see about equally much go together, so
little is padded. The cost follows the density. What was gathered can be kept for the other steps of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import KeyValues, TiledKeys, Tiles
from workers.kernels.buffers import Buffers
from workers.kernels.memory import KeyMemory
from workers.packed_keys import PackedKeys

AttendDense = Callable[[Tensor, KeyValues], tuple[Tensor, Tensor]]

_MAX_PADDING = 1.25
"""Rows share a call while the longest sees at most this many times the shortest: bounds the work done for nothing."""
_GROUP_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""Keys and values gathered at once, the rest in turn: on a CPU so that they are read again while in its cache, on a GPU
few enough calls to keep it busy."""


class RowGroup(NamedTuple):
    """Query tiles that are computed in one call, and the keys that each of them sees."""

    row_R: Tensor
    """int64: which of the batch x heads x query tiles."""
    keys: KeyValues
    """R in the place of the batch, one head; log m is -inf on padding."""


class GroupMemory(KeyMemory[tuple[RowGroup, ...]]):
    """Gathered keys of the chunk in hand; their buffers serve the next chunk."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        self.buffers = Buffers(max_bytes)
        super().__init__(max_bytes, self._give_back)

    def _give_back(self, groups: tuple[RowGroup, ...]) -> None:
        for _, keys in groups:
            self.buffers.give(keys.k_BKND)
            self.buffers.give(keys.v_BKND)


def attend_tiled(
    q_BQND: Tensor, part: TiledKeys, attend_dense: AttendDense, memory: GroupMemory | None = None
) -> tuple[Tensor, Tensor]:
    """Attention where each query sees the keys of its visible tiles; out_BQND and lse_BQN as of a `Kernel`.

    Args:
        q_BQND: Queries after RoPE.
        part: Keys and tiles. Waits once for the device where nothing is kept: the sizes of the calls depend on tiles.
        attend_dense: Computes each group; takes log m, and -inf in it for a key that does not exist.
        memory: Keeps what was gathered, for the next call with the same keys and tiles.
    """
    batch, num_queries, heads, head_dim = q_BQND.shape
    tiles = part.tiles
    num_tiles = tiles.visible_BNIJ.shape[2]
    q_BNQD = q_BQND.transpose(1, 2)
    if tiles.query_order_BNQ is not None:
        q_BNQD = q_BNQD.gather(2, tiles.query_order_BNQ[..., None].expand_as(q_BNQD))
    if num_tiles * tiles.query_tile > num_queries:  # to pad by nothing is to copy
        q_BNQD = F.pad(q_BNQD, (0, 0, 0, num_tiles * tiles.query_tile - num_queries))
    q_RQ1D = q_BNQD.reshape(-1, tiles.query_tile, 1, head_dim)
    # Rows that see nothing are computed by nobody: 0 and -inf.
    out_RQ1D = torch.zeros_like(q_RQ1D)
    lse_type = torch.float64 if q_BQND.dtype == torch.float64 else torch.float32
    lse_RQ1 = torch.full(q_RQ1D.shape[:-1], -torch.inf, dtype=lse_type, device=q_BQND.device)
    for row_R, keys in _groups(part, q_BQND.dtype, memory):
        rows = slice(int(row_R), int(row_R) + 1) if len(row_R) == 1 and row_R.is_cpu else row_R
        out_RQ1D[rows], lse_RQ1[rows] = attend_dense(q_RQ1D[rows], keys)
    out_BNQD = out_RQ1D.view(batch, heads, -1, head_dim)[:, :, :num_queries]
    lse_BNQ = lse_RQ1.view(batch, heads, -1)[..., :num_queries]
    if tiles.query_order_BNQ is not None:
        back_BNQ = tiles.query_order_BNQ.argsort(-1)
        out_BNQD = out_BNQD.gather(2, back_BNQ[..., None].expand_as(out_BNQD))
        lse_BNQ = lse_BNQ.gather(2, back_BNQ)
    return out_BNQD.transpose(1, 2), lse_BNQ.transpose(1, 2)


def _groups(part: TiledKeys, dtype: torch.dtype, memory: GroupMemory | None) -> Iterator[RowGroup]:
    """All groups, from memory or gathered one by one."""
    if memory is not None:
        kept = memory.find(*part, dtype)
        if kept is not None:
            yield from kept
            return
        whole = None if part.tiles.first_of is None else memory.find(part.keys, part.tiles.first_of, dtype)
        if whole is not None:
            yield from _first_tiles(whole, part.tiles)
            return
    gathered: list[RowGroup] | None = None if memory is None else []
    buffers = None if memory is None else memory.buffers
    for group in _gather(part, dtype, buffers):
        if memory is not None and gathered is not None:
            gathered.append(group)
            if not memory.has_room_for(_num_bytes(gathered)):
                gathered = None
        yield group
    if memory is not None and gathered is not None:
        memory.keep(*part, dtype, tuple(gathered), num_bytes=_num_bytes(gathered))


def _first_tiles(whole: tuple[RowGroup, ...], tiles: Tiles) -> Iterator[RowGroup]:
    """Views of what was gathered for the tiles that these are the first of, row by row."""
    lengths = (tiles.visible_BNIJ.sum(-1).flatten() * tiles.key_tile).tolist()
    for row_R, keys in whole:
        for place, row in enumerate(row_R.tolist()):
            if not lengths[row]:
                continue
            k, v = (x[place : place + 1, : lengths[row]] for x in (keys.k_BKND, keys.v_BKND))
            mass = None if keys.log_mass_BNK is None else keys.log_mass_BNK[place : place + 1, :, : lengths[row]]
            yield RowGroup(row_R[place : place + 1], KeyValues(k, v, keys.position_K3[: lengths[row]], mass))


def _gather(part: TiledKeys, dtype: torch.dtype, buffers: Buffers | None) -> Iterator[RowGroup]:
    keys, tiles = part
    visible_BNIJ = tiles.visible_BNIJ
    rows_each = visible_BNIJ.shape[2]
    count_R = visible_BNIJ.sum(-1).flatten()
    order_R = count_R.argsort(descending=True, stable=True)
    if tiles.tile_order_BNIJ is not None:
        seen_RJ = tiles.tile_order_BNIJ.flatten(0, 2)
    else:  # the tiles that a row sees come first, in their order; int32 sorts faster than bool
        seen_RJ = visible_BNIJ.flatten(0, 2).int().argsort(dim=-1, descending=True, stable=True)
    bytes_per_tile = 2 * tiles.key_tile * keys.head_dim * dtype.itemsize
    counts: list[int] = count_R[order_R].tolist()
    start = 0
    most_bytes = _GROUP_BYTES.get(visible_BNIJ.device.type, _GROUP_BYTES["cpu"])
    for stop in _cut(counts, bytes_per_tile, most_bytes):
        row_R = order_R[start:stop]
        head_R = row_R // rows_each
        index_RL, there_RL = _key_index(seen_RJ[row_R, : counts[start]], count_R[row_R], head_R, keys, tiles)
        yield RowGroup(row_R, _take(keys, index_RL, there_RL, head_R, dtype, buffers))
        start = stop


def _cut(counts: list[int], bytes_per_tile: int, most_bytes: int) -> Iterator[int]:
    """Where to end each group of rows that are sorted by count, most first; rows that see nothing are left out."""
    start = 0
    for row in range(1, len(counts) + 1):
        if counts[start] == 0:
            return
        is_last = row == len(counts) or counts[row] * _MAX_PADDING < counts[start]
        if is_last or (row - start + 1) * counts[start] * bytes_per_tile > most_bytes:
            yield row
            start = row
            if start == len(counts):
                return


def _key_index(
    seen_RM: Tensor, count_R: Tensor, head_R: Tensor, keys: KeyValues, tiles: Tiles
) -> tuple[Tensor, Tensor | None]:
    """Which key stands at each place of each row, and where there is one at all (None: everywhere)."""
    num_keys, most = keys.num_tokens, seen_RM.shape[1]
    within = torch.arange(tiles.key_tile, device=seen_RM.device)
    place_RL = (seen_RM[..., None] * tiles.key_tile + within).flatten(1)
    there_RL = place_RL < num_keys
    filled_RM = torch.arange(most, device=seen_RM.device) < count_R[:, None]
    there_RL &= filled_RM.repeat_interleave(tiles.key_tile, 1)
    place_RL = place_RL.clamp(max=num_keys - 1)
    if tiles.key_order_BNK is not None:
        place_RL = tiles.key_order_BNK.flatten(0, 1)[head_R].gather(1, place_RL)
    return place_RL, None if bool(there_RL.all()) else there_RL


def _take(
    keys: KeyValues,
    index_RL: Tensor,
    there_RL: Tensor | None,
    head_R: Tensor,
    dtype: torch.dtype,
    buffers: Buffers | None,
) -> KeyValues:
    """Keys at an index of each row; `head_R` counts batch x heads."""
    mass_RL: Tensor | None = None
    if isinstance(keys, PackedKeys) and keys.are_all_packed:
        taken = keys.take(index_RL, head_R, _room_for(index_RL, keys.head_dim, dtype, buffers))
        k, v = (x.to(dtype) for x in (taken.k_BKND, taken.v_BKND))
        mass_RL = None if taken.log_mass_BNK is None else taken.log_mass_BNK[:, 0]
    else:
        k, v = (_take_lines(x, index_RL, head_R, buffers).to(dtype)[:, :, None] for x in (keys.k_BKND, keys.v_BKND))
        if keys.log_mass_BNK is not None:
            mass_RL = keys.log_mass_BNK.flatten(0, 1)[head_R].gather(1, index_RL)
    if there_RL is not None:
        zeros_RL = mass_RL if mass_RL is not None else torch.zeros_like(index_RL, dtype=torch.float32)
        mass_RL = zeros_RL.masked_fill(~there_RL, -torch.inf)
    nowhere = keys.position_K3.new_zeros(1, 3).expand(index_RL.shape[1], 3)
    return KeyValues(k, v, nowhere, None if mass_RL is None else mass_RL[:, None])


def _room_for(
    index_RL: Tensor, head_dim: int, dtype: torch.dtype, buffers: Buffers | None
) -> tuple[Tensor, Tensor] | None:
    """Memory for keys and values that are unpacked."""
    if buffers is None or index_RL.is_cuda or torch.is_grad_enabled():
        return None
    shape, like = (*index_RL.shape, head_dim), torch.empty(0, dtype=dtype)
    return buffers.take(shape, like), buffers.take(shape, like)


def _take_lines(x_BKND: Tensor, index_RL: Tensor, head_R: Tensor, buffers: Buffers | None) -> Tensor:
    """x_RLD. One index over all lines of D numbers: several times faster than indexing three dimensions."""
    head_dim = x_BKND.shape[-1]
    if x_BKND.stride(3) != 1 or any(stride % head_dim for stride in x_BKND.stride()[:3]):
        x_BKND = x_BKND.contiguous()
    to_batch, to_key, to_head = (stride // head_dim for stride in x_BKND.stride()[:3])
    batch, num_keys, heads, _ = x_BKND.shape
    num_lines = 1 + (batch - 1) * to_batch + (num_keys - 1) * to_key + (heads - 1) * to_head
    lines = x_BKND.as_strided((num_lines, head_dim), (head_dim, 1))  # of a narrowed run too, without a copy
    begin_R = head_R // heads * to_batch + head_R % heads * to_head
    line_RL = index_RL * to_key + begin_R[:, None]
    if buffers is None or x_BKND.is_cuda or torch.is_grad_enabled():
        return lines.index_select(0, line_RL.flatten()).view(*index_RL.shape, head_dim)
    into = buffers.take((line_RL.numel(), head_dim), lines)
    return torch.index_select(lines, 0, line_RL.flatten(), out=into).view(*index_RL.shape, head_dim)


def _num_bytes(groups: list[RowGroup]) -> int:
    return sum(group.keys.num_bytes for group in groups)

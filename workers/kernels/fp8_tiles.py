"""Attention in 8-bit floats (e4m3) over listed tiles of 128 keys: what tiles are, how they are made, and the reference.

Queries, keys and values have fixed scales, and what does not fit saturates. Queries and keys of a tile are 128 rows of
128 channels, values 128 channels of 128 keys. In a row of 128 bytes, piece c of 16 bytes of row r lies at piece
c ^ (r % 8) (tensor cores' 128-byte swizzle); keys of values lie in the order of `key_order` before that. So a tile is
16 KB that one plain copy brings, and p goes into the second product without moving between threads. Log m is a bias.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.fp8_attention import Coded, Cut, attend_tiles

SCALE_QK = 4.0
"""Of queries and keys each."""
SCALE_V = 8.0
TILE, HEAD_DIM = 128, 128
TILE_BYTES = TILE * HEAD_DIM
LARGEST = 448.0
"""In e4m3."""
P_SCALE = 256.0
"""Of p, whose largest is 1."""
NO_KEY = -(2.0**16)
"""Channels with log m that sum to less belong to no key (`mass.py` writes -2^17)."""
_LOG2_E = math.log2(math.e)
CUT = Cut(split=True)
CODED_BY_CUDA = True
"""Else by Triton."""


class CodedTiles(NamedTuple):
    """Keys and values as the kernel reads them."""

    k_NTB: Tensor
    v_NTB: Tensor
    """uint8 [heads, tiles, 16384]."""
    bias_NL: Tensor
    """float32 [heads, tiles * 128]: log m in base 2; -inf: no key."""


@functools.cache
def key_order(device: torch.device | str = "cpu") -> Tensor:
    """Keys of a tile in the order in which values have them."""
    position = torch.arange(TILE)
    low, quad, next_eight, half = position & 1, position >> 2 & 3, position >> 1 & 1, position >> 4 & 1
    return ((position & ~31) + half * 16 + next_eight * 8 + quad * 2 + low).to(device)


def empty_tiles(heads: int, tiles: int, device: torch.device) -> CodedTiles:
    """Room for tiles, not set."""
    k, v = (torch.empty(heads, tiles, TILE_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return CodedTiles(k, v, torch.empty(heads, tiles * TILE, dtype=torch.float32, device=device))


def code_queries(q_QNW: Tensor) -> Tensor:
    """uint8 [heads, query tiles, 16384]; rows behind the last query are zero."""
    if is_coded_by_cuda(q_QNW):
        return _code(q_QNW, None, None)[0]
    from workers.kernels.triton_fp8_tiles import code_rows

    return code_rows(q_QNW, SCALE_QK)


def code_tiles(k_NKW: Tensor, v_NKD: Tensor, out: CodedTiles | None = None) -> CodedTiles:
    """Tiles of keys that lie in one run; what is left of the last tile is no key.

    Args:
        k_NKW: Log m stands in two channels behind the head dimension, if there are any.
        v_NKD: The values.
        out: Written if given: as many tiles as the keys need.
    """
    from workers.kernels.triton_fp8_tiles import code_run

    if is_coded_by_cuda(v_NKD):
        return _code(None, (k_NKW, v_NKD), out)[1]
    heads, num_keys = v_NKD.shape[:2]
    out = empty_tiles(heads, -(-num_keys // TILE), v_NKD.device) if out is None else out
    assert out.k_NTB.shape == out.v_NTB.shape == (heads, -(-num_keys // TILE), TILE_BYTES)
    code_run(k_NKW, v_NKD, out.k_NTB, out.v_NTB, out.bias_NL, (SCALE_QK, SCALE_V, NO_KEY))
    return out


def code_chunk(q_QNW: Tensor, k_NKW: Tensor, v_NKD: Tensor, out: CodedTiles | None = None) -> tuple[Tensor, CodedTiles]:
    """`code_queries` and `code_tiles` at once: in bfloat16, in one launch."""
    if is_coded_by_cuda(v_NKD):
        return _code(q_QNW, (k_NKW, v_NKD), out)
    return code_queries(q_QNW), code_tiles(k_NKW, v_NKD, out)


def is_coded_by_cuda(x: Tensor) -> bool:
    """The kernel in CUDA reads bfloat16, the one in Triton 32 bits too, and runs in its interpreter."""
    return CODED_BY_CUDA and x.is_cuda and x.dtype == torch.bfloat16


def _code(
    q_QNW: Tensor | None, keys: tuple[Tensor, Tensor] | None, out: CodedTiles | None
) -> tuple[Tensor, CodedTiles]:
    """What is not given is left empty."""
    from workers.kernels.fp8_codes import code_all

    given = q_QNW if keys is None else keys[1]
    assert given is not None
    queries, heads = (0, 0) if q_QNW is None else q_QNW.shape[:2]
    coded = torch.empty(heads, -(-queries // TILE), TILE_BYTES, dtype=torch.uint8, device=given.device)
    if keys is not None:
        heads, num_keys = keys[1].shape[:2]
        assert keys[0].shape[:2] == (heads, num_keys)
        out = empty_tiles(heads, -(-num_keys // TILE), given.device) if out is None else out
        assert out.k_NTB.shape == out.v_NTB.shape == (heads, -(-num_keys // TILE), TILE_BYTES)
    tiles = empty_tiles(0, 0, given.device) if out is None else out
    code_all(q_QNW, keys, (coded, *tiles), (SCALE_QK, SCALE_V, NO_KEY))
    return coded, tiles


def attend_coded(
    q_NIB: Tensor, tiles: CodedTiles, index_NIJ: Tensor | None, num_queries: int, cut: Cut = CUT
) -> tuple[Tensor, Tensor]:
    """out_QND in bfloat16 and the natural log-sum-exp lse_QN in float32; 0 and -inf where no key is.

    Args:
        q_NIB: Of `code_queries`.
        tiles: The keys.
        index_NIJ: int32, tiles that a tile of queries sees, in any order; None: all.
        num_queries: Those of `q_NIB` without what fills the last tile.
        cut: How it is done.
    """
    return attend_tiles(Coded(q_NIB, *tiles, index_NIJ), num_queries, (SCALE_QK**2, SCALE_V), cut)


def cast(x: Tensor, scale: float) -> Tensor:
    """To e4m3, saturating."""
    wide: Tensor = x.float() * scale
    return wide.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def swizzle(rows: Tensor) -> Tensor:
    """Rows [..., 128, 128] of a byte each as a tile has them: [..., 16384]."""
    row, piece = torch.arange(128, device=rows.device)[:, None], torch.arange(8, device=rows.device)[None, :]
    from_piece = (piece ^ (row & 7))[..., None].expand(128, 8, 16)
    pieces: Tensor = rows.unflatten(-1, (8, 16))
    return pieces.gather(-2, from_piece.expand(pieces.shape)).flatten(-3)


def code_queries_plain(q_QNW: Tensor) -> Tensor:
    """The reference of `code_queries`."""
    num, heads = q_QNW.shape[:2]
    q_NQD = F.pad(q_QNW[..., :HEAD_DIM].transpose(0, 1).float(), (0, 0, 0, -num % TILE))
    return swizzle(cast(q_NQD, SCALE_QK).view(torch.uint8).view(heads, -1, TILE, HEAD_DIM))


def code_tiles_plain(k_NKW: Tensor, v_NKD: Tensor) -> CodedTiles:
    """The reference of `code_tiles`."""
    heads, num = v_NKD.shape[:2]
    fill = -num % TILE
    k, v = (F.pad(x[..., :HEAD_DIM].float(), (0, 0, 0, fill)) for x in (k_NKW, v_NKD))
    k = cast(k, SCALE_QK).view(torch.uint8).view(heads, -1, TILE, HEAD_DIM)
    v = cast(v, SCALE_V).view(torch.uint8).view(heads, -1, TILE, HEAD_DIM)
    v = v[:, :, key_order(v.device)].mT.contiguous()
    return CodedTiles(swizzle(k), swizzle(v), F.pad(read_bias(k_NKW, HEAD_DIM), (0, fill), value=-torch.inf))


def read_bias(k_NLW: Tensor, head_dim: int) -> Tensor:
    """Log m in base 2, from the channels behind a key's own; 0 where there are none."""
    if k_NLW.shape[-1] == head_dim:
        return k_NLW.new_zeros(k_NLW.shape[:-1], dtype=torch.float32)
    wanted = k_NLW[..., head_dim].float() + k_NLW[..., head_dim + 1].float()
    return (wanted * (_LOG2_E / math.sqrt(head_dim))).masked_fill(wanted < NO_KEY, -torch.inf)


def attend_coded_plain(
    q_QNW: Tensor, k_NLW: Tensor, v_NLD: Tensor, index_NIJ: Tensor | None, tile: int
) -> tuple[Tensor, Tensor]:
    """The reference of what products in 8 bits do to attention, for any tile size and head dimension; head by head.

    It differs from the kernel in that p is cast relative to the highest logit of all keys, not of those so far.
    """
    num, heads = q_QNW.shape[:2]
    head_dim = v_NLD.shape[-1]
    fill_q, fill_k = -num % tile, -k_NLW.shape[1] % tile
    q_NID = F.pad(q_QNW[..., :head_dim].transpose(0, 1), (0, 0, 0, fill_q)).unflatten(1, (-1, tile))
    bias_NTL = F.pad(read_bias(k_NLW, head_dim), (0, fill_k), value=-torch.inf).unflatten(1, (-1, tile))
    k_NTD, v_NTD = (F.pad(x[..., :head_dim], (0, 0, 0, fill_k)).unflatten(1, (-1, tile)) for x in (k_NLW, v_NLD))
    out = q_QNW.new_empty(num, heads, head_dim)
    lse = torch.empty(num, heads, dtype=torch.float32, device=q_QNW.device)
    for head in range(heads):
        q, k, v = (cast(x[head], s).float() for x, s in ((q_NID, SCALE_QK), (k_NTD, SCALE_QK), (v_NTD, SCALE_V)))
        bias = bias_NTL[head]
        if index_NIJ is None:
            q = q.flatten(0, 1)[None]
            k, v, bias = (x.flatten(0, 1)[None] for x in (k, v, bias))
        else:
            k, v, bias = (x[index_NIJ[head].long()].flatten(1, 2) for x in (k, v, bias))
        found, sums = _attend_rows(q, k, v, bias)
        out[:, head], lse[:, head] = found.flatten(0, 1)[:num].to(out.dtype), sums.flatten()[:num]
    return out, lse


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of queries that see the same keys, batched; all cast."""
    logit = q @ k.mT * (_LOG2_E / math.sqrt(q.shape[-1]) / SCALE_QK**2) + bias[:, None]
    top = logit.amax(-1, keepdim=True)
    p = torch.exp2(logit - top.masked_fill(top.isneginf(), 0.0))
    sums = p.sum(-1, keepdim=True)
    found = cast(p, P_SCALE).float() @ v / (sums * (P_SCALE * SCALE_V))
    return found.masked_fill(sums == 0, 0.0), (top + sums.log2()) / _LOG2_E

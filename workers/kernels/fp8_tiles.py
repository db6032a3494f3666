"""Attention in 8-bit floats (e4m3) over listed tiles of 128 keys, on compute capability 9.0; `coded_tiles.py` says how
tiles lie, `fp8_plain.py` is the reference.

A tile is 16 KB that one plain copy brings, and p goes into the second product without moving between threads. p is cast
relative to the highest logit of the keys so far, the reference's to that of all keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.coded_tiles import CODED_TILE as TILE
from workers.coded_tiles import SCALE_QK, SCALE_V, TILE_BYTES, CodedTiles, room_for_tiles
from workers.kernels.fp8_attention import Coded, attend_tiles
from workers.kernels.fp8_codes import code_all
from workers.kernels.fp8_codes import code_values as launch_values


def code_chunk(q_QNW: Tensor, k_NKW: Tensor, v_NKD: Tensor, out: CodedTiles | None = None) -> tuple[Tensor, CodedTiles]:
    """q_NIB and tiles of keys that lie in one run, from bfloat16 in one launch.

    Args:
        q_QNW: Queries, uint8 [heads, query tiles, 16384] then; rows behind the last are zero.
        k_NKW: Log m stands in two channels behind the head dimension, if there are any.
        v_NKD: Their values; what is left of the last tile is no key.
        out: Written if given: as many tiles as the keys need.
    """
    queries, heads = q_QNW.shape[:2]
    tiles = -(-v_NKD.shape[1] // TILE)
    q_NIB = torch.empty(heads, -(-queries // TILE), TILE_BYTES, dtype=torch.uint8, device=q_QNW.device)
    out = room_for_tiles(heads, tiles, q_QNW.device) if out is None else out
    assert out.k_NTB.shape == out.v_NTB.shape == (heads, tiles, TILE_BYTES)
    code_all(q_QNW, k_NKW, v_NKD, (q_NIB, *out), (SCALE_QK, SCALE_V))
    return q_NIB, out


def code_values(v_NKD: Tensor, out_NTB: Tensor) -> None:
    """Values alone, as `code_chunk` writes them: where queries and keys were coded as they were computed."""
    launch_values(v_NKD, out_NTB, (SCALE_QK, SCALE_V))


def attend_coded(
    q_NIB: Tensor,
    tiles: CodedTiles,
    index_NIJ: Tensor | None,
    num_queries: int,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """out_QND in bfloat16 and the natural log-sum-exp lse_QN in float32; 0 and -inf where no key is.

    Args:
        q_NIB: Of `code_chunk`.
        tiles: The keys.
        index_NIJ: int32, tiles that a tile of queries sees, in any order; None: all.
        num_queries: Those of `q_NIB` without what fills the last tile.
        out: Written if given: out_QND, contiguous, and lse_QN.
    """
    return attend_tiles(Coded(q_NIB, *tiles, index_NIJ), num_queries, (SCALE_QK**2, SCALE_V), out)

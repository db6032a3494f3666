"""Attention in 8-bit floats (e4m3) over listed tiles of 128 keys, on compute capability 9.0; `coded_tiles.py` says how
tiles lie, `fp8_plain.py` is the reference.

A tile is 16 KB that one plain copy brings, and p goes into the second product without moving between threads. p is cast
relative to the highest logit of the keys so far, the reference's to that of all keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.coded_tiles import CODED_TILE as TILE
from workers.coded_tiles import LEAST_MASS, SCALE_QK, SCALE_V, TILE_BYTES, CodedTiles, room_for_tiles
from workers.kernels.fp8_attention import Coded, Cut, attend_tiles

CUT = Cut(split=True)
CODED_BY_CUDA = True
"""Else by Triton."""


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
    out = room_for_tiles(heads, -(-num_keys // TILE), v_NKD.device) if out is None else out
    assert out.k_NTB.shape == out.v_NTB.shape == (heads, -(-num_keys // TILE), TILE_BYTES)
    code_run(k_NKW, v_NKD, out.k_NTB, out.v_NTB, out.bias_NL, (SCALE_QK, SCALE_V, LEAST_MASS))
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
        out = room_for_tiles(heads, -(-num_keys // TILE), given.device) if out is None else out
        assert out.k_NTB.shape == out.v_NTB.shape == (heads, -(-num_keys // TILE), TILE_BYTES)
    tiles = room_for_tiles(0, 0, given.device) if out is None else out
    code_all(q_QNW, keys, (coded, *tiles), (SCALE_QK, SCALE_V, LEAST_MASS))
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

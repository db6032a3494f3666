"""Tiles of keys and values as 8-bit floats, laid out as the kernel of `kernels/fp8_tiles.py` reads them.

A number times a fixed scale is cast to e4m3, saturating: keys after RMSNorm and values are far from its ends, and a
fixed scale needs no pass over them. A tile is 128 keys of 128 channels. A row of 128 bytes lies in eight pieces of 16,
piece c of row r at place c ^ (r % 8), so that a whole tile is copied into shared memory as it lies. What is plain torch
here is the reference of kernels that code.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CODED_TILE = 128
"""Keys of a tile, queries of one, and channels of a head."""
TILE_BYTES = CODED_TILE * CODED_TILE
SCALE_QK = 4.0
"""Of queries and of keys."""
SCALE_V = 8.0
LARGEST = 448.0
"""Of e4m3."""
LEAST_MASS = -5e4
"""A key with less in its channels of log m does not exist (`cache/table_layout.py` has -1e5 there)."""
PIECE, PIECES = 16, 8
_GROUP = 32


class CodedTiles(NamedTuple):
    """Keys and values of one layer."""

    k_NTB: Tensor
    """uint8 [heads, tiles, 16384]: rows are keys."""
    v_NTB: Tensor
    """uint8 [heads, tiles, 16384]: rows are channels, their bytes keys in the order of `key_of_byte`."""
    bias_NL: Tensor
    """float32 [heads, slots]: log2 of m; -inf where there is no key."""


def room_for_tiles(heads: int, tiles: int, device: torch.device) -> CodedTiles:
    """To be written."""
    k, v = (torch.zeros(heads, tiles, TILE_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return CodedTiles(k, v, torch.zeros(heads, tiles * CODED_TILE, dtype=torch.float32, device=device))


def key_of_byte() -> Tensor:
    """Which key of a tile each byte of a row of values holds: as a thread holds shares of a softmax."""
    byte = torch.arange(CODED_TILE)
    group, place = byte // _GROUP * _GROUP, byte % _GROUP
    return group + place // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """The nearest, saturating."""
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def log2_mass(k_NLW: Tensor, head_dim: int) -> Tensor:
    """`CodedTiles.bias_NL` of keys as they lie in a table; zero for keys without channels of log m."""
    if k_NLW.shape[-1] == head_dim:
        return torch.zeros(k_NLW.shape[:-1], dtype=torch.float32, device=k_NLW.device)
    value = k_NLW[..., head_dim : head_dim + 2].float().sum(-1)
    return torch.where(value <= LEAST_MASS, -torch.inf, value * (math.log2(math.e) / math.sqrt(head_dim)))


def code_rows(x_NLD: Tensor, scale: float) -> Tensor:
    """Rows of 128 channels as tiles, uint8 [N, T, 16384]; rows that are missing in the last tile are zero."""
    rows = F.pad(to_e4m3(x_NLD, scale).view(torch.uint8), (0, 0, 0, -x_NLD.shape[1] % CODED_TILE))
    return _swizzle(rows.unflatten(1, (-1, CODED_TILE))).flatten(2)


def code_queries_plain(q_QNW: Tensor) -> Tensor:
    """Queries as tiles, uint8 [N, I, 16384]; channels behind the first 128 are left out."""
    return code_rows(q_QNW[..., :CODED_TILE].transpose(0, 1), SCALE_QK)


def code_tiles_plain(k_NKW: Tensor, v_NKD: Tensor) -> CodedTiles:
    """Keys and values that lie in one run; no key is where the last tile is not full."""
    num_keys, dim = v_NKD.shape[1:]
    bias_NK = log2_mass(k_NKW, dim)
    return CodedTiles(
        code_rows(k_NKW[..., :dim], SCALE_QK),
        code_values_plain(v_NKD),
        F.pad(bias_NK, (0, -num_keys % CODED_TILE), value=-torch.inf),
    )


def code_values_plain(v_NKD: Tensor) -> Tensor:
    """Of `code_tiles_plain`, the values."""
    v = F.pad(to_e4m3(v_NKD, SCALE_V).view(torch.uint8), (0, 0, 0, -v_NKD.shape[1] % CODED_TILE))
    return _swizzle(v.unflatten(1, (-1, CODED_TILE)).mT[..., key_of_byte().to(v.device)]).flatten(2)


def decode_rows(x_NTB: Tensor) -> Tensor:
    """What `code_rows` was given, times the scale and rounded: float32 [N, T, 128, 128]."""
    rows = _swizzle(x_NTB.unflatten(2, (CODED_TILE, CODED_TILE)))  # once more undoes it
    return rows.view(torch.float8_e4m3fn).float()


def decode_values(v_NTB: Tensor) -> Tensor:
    """Values of `CodedTiles` again, times their scale: float32 [N, T, keys, channels]."""
    return decode_rows(v_NTB)[..., key_of_byte().argsort().to(v_NTB.device)].mT


def _swizzle(x: Tensor) -> Tensor:
    """Pieces of rows in their places, [..., R, 128]."""
    row = torch.arange(x.shape[-2], device=x.device)[:, None]
    piece = torch.arange(PIECES, device=x.device)[None] ^ (row % PIECES)
    pieces = x.unflatten(-1, (PIECES, PIECE))
    placed: Tensor = pieces.gather(-2, piece[..., None].expand_as(pieces))
    return placed.flatten(-2)

"""Tiles of keys and values as 8-bit floats, laid out as the kernel of `kernels/fp8_tiles.py` reads them.

A number times a fixed scale is cast to e4m3, saturating: keys after RMSNorm and values are far from its ends, and a
fixed scale needs no pass over them. A tile is 128 keys of 128 channels. A row of 128 bytes lies in eight pieces of 16,
piece c of row r at place c ^ (r % 8), so that a whole tile is copied into shared memory as it lies. Log m of a key is
four more channels, so that products add it to the logits: each codes what those before left. What is plain torch here
is the reference of kernels that code.
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
MASS_SCALES = (448.0, 1.0, 1.0, 1.0)
"""What the codes of log m are multiplied by: their sum has 16 bits, and that of a key that does not exist is -2e5."""
PIECE, PIECES = 16, 8
MASS_BYTES = CODED_TILE * PIECE
_GROUP = 32
_LEAST = 0xFE
"""The code of -448."""


class CodedTiles(NamedTuple):
    """Keys and values of one layer."""

    k_NTB: Tensor
    """uint8 [heads, tiles, 16384]: rows are keys."""
    v_NTB: Tensor
    """uint8 [heads, tiles, 16384]: rows are channels, their bytes keys in the order of `key_of_byte`."""
    mass_NTB: Tensor
    """uint8 [heads, tiles, 2048]: of each key four codes of log m, as large as products are, and 12 zeros."""


def room_for_tiles(
    heads: int, tiles: int, device: torch.device, rooms: tuple[Tensor, Tensor] | None = None
) -> CodedTiles:
    """To be written; `rooms` of keys and values if those are there already."""

    def make(size: int) -> Tensor:
        return torch.zeros(heads, tiles, size, dtype=torch.uint8, device=device)

    k, v = rooms or (make(TILE_BYTES), make(TILE_BYTES))
    return CodedTiles(k, v, make(MASS_BYTES))


def key_of_byte() -> Tensor:
    """Which key of a tile each byte of a row of values holds: as a thread holds shares of a softmax."""
    byte = torch.arange(CODED_TILE)
    group, place = byte // _GROUP * _GROUP, byte % _GROUP
    return group + place // 16 * 16 + place % 4 // 2 * 8 + place % 16 // 4 * 2 + place % 2


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """The nearest, saturating."""
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def log2_mass(k_NLW: Tensor, head_dim: int) -> Tensor:
    """log2 of m of keys as they lie in a table, -inf where there is none; zero without channels of log m."""
    value = _read_mass(k_NLW, head_dim)
    return torch.where(value <= LEAST_MASS, -torch.inf, value * (math.log2(math.e) / math.sqrt(head_dim)))


def _read_mass(k_NLW: Tensor, head_dim: int) -> Tensor:
    """Log m as a query without any scale adds it, float32."""
    if k_NLW.shape[-1] == head_dim:
        return torch.zeros(k_NLW.shape[:-1], dtype=torch.float32, device=k_NLW.device)
    return k_NLW[..., head_dim : head_dim + 2].float().sum(-1)


def code_masses(value_NL: Tensor) -> Tensor:
    """`CodedTiles.mass_NTB` of what `_read_mass` reads; in the last tile no key is behind them."""
    left = F.pad(value_NL, (0, -value_NL.shape[1] % CODED_TILE), value=-1e30) * SCALE_QK**2
    codes = torch.zeros(*left.shape, PIECE, dtype=torch.uint8, device=left.device)
    for i, scale in enumerate(MASS_SCALES):
        code = to_e4m3(left, 1 / scale)
        left = left - code.float() * scale
        codes[..., i] = code.view(torch.uint8)
    tiles: Tensor = codes.unflatten(1, (-1, CODED_TILE)).flatten(2)
    return tiles


def decode_masses(mass_NTB: Tensor, head_dim: int) -> Tensor:
    """`log2_mass` again: float32 [N, T, keys]."""
    codes = mass_NTB.unflatten(2, (-1, PIECE)).view(torch.float8_e4m3fn)[..., : len(MASS_SCALES)].float()
    products = (codes * torch.tensor(MASS_SCALES, device=codes.device)).sum(-1)
    log2 = products * (math.log2(math.e) / (math.sqrt(head_dim) * SCALE_QK**2))
    return torch.where(codes[..., 0] == -LARGEST, -torch.inf, log2)


def erase_keys(tiles: CodedTiles, first: int) -> None:
    """From the `first` of every head on there is no key any more."""
    tiles.mass_NTB.unflatten(2, (-1, PIECE)).flatten(1, 2)[:, first:, : len(MASS_SCALES)] = _LEAST


def code_rows(x_NLD: Tensor, scale: float) -> Tensor:
    """Rows of 128 channels as tiles, uint8 [N, T, 16384]; rows that are missing in the last tile are zero."""
    return _swizzle(_code_tiles(x_NLD, scale)).flatten(2)


def _code_tiles(x_NLD: Tensor, scale: float) -> Tensor:
    """Rows as they are in each tile, uint8 [N, T, rows, D]."""
    rows = F.pad(to_e4m3(x_NLD, scale).view(torch.uint8), (0, 0, 0, -x_NLD.shape[1] % CODED_TILE))
    return rows.unflatten(1, (-1, CODED_TILE))  # type: ignore[no-any-return]


def code_queries_plain(q_QNW: Tensor) -> Tensor:
    """Queries as tiles, uint8 [N, I, 16384]; channels behind the first 128 are left out."""
    return code_rows(q_QNW[..., :CODED_TILE].transpose(0, 1), SCALE_QK)


def code_tiles_plain(k_NKW: Tensor, v_NKD: Tensor) -> CodedTiles:
    """Keys and values that lie in one run; no key is where the last tile is not full."""
    dim = v_NKD.shape[2]
    masses = code_masses(_read_mass(k_NKW, dim))
    return CodedTiles(code_rows(k_NKW[..., :dim], SCALE_QK), code_values_plain(v_NKD), masses)


def code_values_plain(v_NKD: Tensor) -> Tensor:
    """Of `code_tiles_plain`, the values."""
    return _swizzle(_code_tiles(v_NKD, SCALE_V).mT[..., key_of_byte().to(v_NKD.device)]).flatten(2)


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

"""A kernel that unpacks tiles of a packed table into 8-bit floats, as attention with products of such reads them.

What `packed_history.PlainPacking` does, in one launch. A program does a tile of one head: keys row by
row, values turned round: a thread makes words of four keys of one channel, which are turned as they are. Tiles that
nobody sees are skipped.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.packed_history import PackedLayer
from workers.cache.table_codes import LIMITS
from workers.cache.table_layout import TableSettings
from workers.cache.triton_pack import vector_shape
from workers.coded_tiles import CODED_TILE, LEAST_MASS, SCALE_QK, SCALE_V, CodedTiles

NUM_WARPS = 2
KEYS_AT_ONCE = 16
"""Rows of keys that a program holds, a power of two."""
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter has no assembly."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _number(codes, half: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    if HALVES == 2:
        return ((codes >> (4 * half)) & 15).to(tl.float32) - 8.0
    return codes.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _to_byte(x):  # type: ignore[no-untyped-def]
    return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _to_word(a, b, c, d, ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four numbers as 8-bit floats, the first in the lowest byte."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    low = _to_byte(a).to(tl.int32) | (_to_byte(b).to(tl.int32) << 8)
    return low | (_to_byte(c).to(tl.int32) << 16) | (_to_byte(d).to(tl.int32) << 24)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_key_pieces(x, out, row, first_piece):  # type: ignore[no-untyped-def]
    """[rows, pieces, 16] to their places in a tile."""
    piece, byte = first_piece + tl.arange(0, x.shape[1]), tl.arange(0, 16)[None, None, :]
    place = piece[None, :] ^ (row & 7)[:, None]
    tl.store(out + row[:, None, None] * 128 + place[:, :, None] * 16 + byte, _to_byte(x))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_bias(mass, out, row, stride, per_nat, least):  # type: ignore[no-untyped-def]
    """log2 of m of some keys; `mass` is where their two channels lie."""
    at = mass + row * stride
    value = tl.load(at).to(tl.float32) + tl.load(at + 1).to(tl.float32)
    tl.store(out + row, tl.where(value <= least, float("-inf"), value * per_nat))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _values_of(  # type: ignore[no-untyped-def]
    code, largest, row, step_of_one, half: tl.constexpr,
    GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Some values of a tile of the history, one half of their channels: float32 [rows, HALF]."""
    HALF: tl.constexpr = 128 // HALVES
    RUNS: tl.constexpr = HALF // RUN
    run, channel = tl.arange(0, RUNS), tl.arange(0, RUN)[None, None, :]
    codes = tl.load(code + row[:, None, None] * HALF + run[None, :, None] * RUN + channel)
    at_largest = row[:, None] * (128 // GROUP) + ((half * HALF + run * RUN) // GROUP)[None, :]
    step = tl.load(largest + at_largest).to(tl.float32) * step_of_one
    return tl.reshape(_number(codes, half, HALVES) * step[:, :, None], (row.shape[0], HALF))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_words(words, out, first_channel, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[32, channels]: four words of each piece of 16 keys, to their places in a tile of values."""
    turned = tl.permute(tl.reshape(words, (8, 4, CHANNELS)), (2, 0, 1))
    channel, piece = first_channel + tl.arange(0, CHANNELS), tl.arange(0, 8)
    place = piece[None, :] ^ (channel & 7)[:, None]
    at = channel[:, None, None] * 32 + place[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    tl.store(out + at, turned)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _unpack_coded(  # type: ignore[no-untyped-def]
    k_code, k_largest, v_code, v_largest, mass, end_k, end_v, k, v, bias, is_seen,
    num_tiles, first_tile, stop_tile, history_slots, end_slots, step_of_one, scale_k, scale_v, per_nat, least,
    EXTRA: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr, M: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one head. The history is tiles from `first_tile` up to `stop_tile`."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_wanted = tl.load(is_seen + head * num_tiles + tile) > 0
    is_history = (tile >= first_tile) & (tile < stop_tile)
    HALF: tl.constexpr = 128 // HALVES
    PIECES: tl.constexpr = HALF // 16
    W: tl.constexpr = 128 + EXTRA
    at_tile = (head * num_tiles + tile) * 128
    k, v, bias = k + at_tile * 128, v + at_tile * 32, bias + at_tile
    piece, byte, every = tl.arange(0, PIECES), tl.arange(0, 16)[None, None, :], tl.arange(0, 128)
    # The first of the four keys of each word: 0, 2, 4, 6 of every 16; with it go the next one and the two 8 behind.
    first_key = tl.arange(0, 32) // 4 * 16 + tl.arange(0, 32) % 4 * 2
    if is_wanted & is_history:
        slot = head * history_slots + (tile - first_tile) * 128
        _store_bias(mass + slot * 2, bias, every, 2, per_nat, least)
        k_code, k_largest = k_code + slot * HALF, k_largest + slot * (128 // GROUP)
        v_code, v_largest = v_code + slot * HALF, v_largest + slot * (128 // GROUP)
        for start in range(0, 128, M):
            row = start + tl.arange(0, M)
            codes = tl.load(k_code + row[:, None, None] * HALF + piece[None, :, None] * 16 + byte)
            for half in tl.static_range(HALVES):
                at_largest = row[:, None] * (128 // GROUP) + ((half * HALF + piece * 16) // GROUP)[None, :]
                step = tl.load(k_largest + at_largest).to(tl.float32) * step_of_one
                x = _number(codes, half, HALVES) * step[:, :, None]
                _store_key_pieces(x * scale_k, k, row, half * PIECES)
        for half in tl.static_range(HALVES):
            a = _values_of(v_code, v_largest, first_key, step_of_one, half, GROUP, RUN, HALVES)
            b = _values_of(v_code, v_largest, first_key + 1, step_of_one, half, GROUP, RUN, HALVES)
            c = _values_of(v_code, v_largest, first_key + 8, step_of_one, half, GROUP, RUN, HALVES)
            d = _values_of(v_code, v_largest, first_key + 9, step_of_one, half, GROUP, RUN, HALVES)
            words = _to_word(a * scale_v, b * scale_v, c * scale_v, d * scale_v, ASSEMBLY)
            _store_words(words, v, half * HALF, HALF)
    if is_wanted & (is_history == 0):
        slot = head * end_slots + tl.where(tile < first_tile, tile * 128, tile * 128 - history_slots)
        end_k, end_v = end_k + slot * W, end_v + slot * 128
        _store_bias(end_k + 128, bias, every, W, per_nat, least)
        for start in range(0, 128, M):
            row = start + tl.arange(0, M)
            x = tl.load(end_k + row[:, None, None] * W + tl.arange(0, 8)[None, :, None] * 16 + byte)
            _store_key_pieces(x.to(tl.float32) * scale_k, k, row, 0)
        for half in tl.static_range(2):
            at = end_v + first_key[:, None] * 128 + half * 64 + tl.arange(0, 64)[None, :]
            a, b = tl.load(at).to(tl.float32) * scale_v, tl.load(at + 128).to(tl.float32) * scale_v
            c, d = tl.load(at + 8 * 128).to(tl.float32) * scale_v, tl.load(at + 9 * 128).to(tl.float32) * scale_v
            _store_words(_to_word(a, b, c, d, ASSEMBLY), v, half * 64, 64)


def unpack_coded(layer: PackedLayer, to: CodedTiles, s: TableSettings, is_seen_NJ: Tensor) -> None:
    """See `PlainPacking.unpack_coded`; tiles whose flag is 0 are left as they are."""
    assert s.storage != "model"
    assert s.head_dim == s.tile == CODED_TILE
    tensors = (layer.k_code_NCB, layer.k_largest_NCG, layer.v_code_NCB, layer.v_largest_NCG, layer.mass_NC2)
    ends = layer.k_NLW, layer.v_NLD
    assert all(x.is_contiguous() for x in (*tensors, *ends, *to, is_seen_NJ))
    shape = vector_shape(s, s.storage)
    del shape["D"]
    _unpack_coded[(s.num_slots // s.tile, s.num_heads)](
        *tensors, *ends, to.k_NTB, to.v_NTB.view(torch.int32), to.bias_NL, is_seen_NJ,
        s.num_slots // s.tile, s.history_start // s.tile, s.recent_start // s.tile, s.history_slots,
        s.num_slots - s.history_slots, 1 / LIMITS[s.storage],
        SCALE_QK, SCALE_V, math.log2(math.e) / math.sqrt(s.head_dim), LEAST_MASS,
        **shape, M=KEYS_AT_ONCE, ASSEMBLY=not _IS_INTERPRETED, num_warps=NUM_WARPS,
    )  # fmt: skip

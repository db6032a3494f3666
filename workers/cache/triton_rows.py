"""How kernels read keys and values of a history, as they were computed or as codes, and turn keys back to before RoPE.

A row is read in two halves, because `int4` holds a channel of either in one byte; what is decoded is rounded to the
dtype of the workspace, so that it is the same bits wherever it is read. Sums over channels go up a tree of pairs and
sums over keys are whole numbers: neither depends on launch settings or on how a row lies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.packed_history import PackedLayer
from workers.cache.partners import History
from workers.cache.table_codes import LIMITS, CodedStorage, group_channels
from workers.cache.table_layout import TableSettings
from workers.triton_decode import STEP_OF_4, decode_codes, load_codes

_MEAN_UNITS = tl.constexpr(float(2**22))
MOST_AVERAGED = 256
"""Keys of a tile: so many channels of length 1 add up in 31 bits."""
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)
"""1.5 * 2^23: behind it the last bit of a float32 is 1, so the bits of a sum with it count whole numbers."""
_STEP_OF_8 = tl.constexpr(1 / LIMITS["int8"])
assert STEP_OF_4.value == 1 / LIMITS["int4"]
_KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Rows(NamedTuple):
    """Keys or values of a history, where they lie."""

    x: Tensor
    """Rows as computed [N, L, W], or codes [N, C, B]."""
    largest: Tensor
    """Largest channels of the groups of codes [N, C, G]; or the rows again."""
    start: int
    """Row of a head with which the history begins."""
    form: dict[str, Any]
    """Constants of the kernels: bits of a code, 0 where there are none; channels of a group; dtype when read."""

    @property
    def at(self) -> tuple[int, int, int]:
        """Numbers from a head to the next and from a row to the next, and the first row."""
        return self.x.stride(0), self.x.stride(1), self.start


class StoredHistory(NamedTuple):
    """A full history as kernels that merge it read it; records are those of the slots that are used."""

    k: Rows
    v: Rows
    position_NC3: Tensor
    m_NC: Tensor
    weight_NC: Tensor
    partner_NC: Tensor


def rows_as_computed(x_NLW: Tensor, start: int, dim: int) -> Rows:
    """Rows of which the first `dim` channels are looked at."""
    return Rows(x_NLW, x_NLW, start, {"BITS": 0, "GROUP": dim, "KIND": _KINDS[x_NLW.dtype]})


def keys_of(history: History, dim: int) -> Rows:
    return rows_as_computed(history.k_NLW, history.start, dim)


def coded_rows(code: Tensor, largest: Tensor, dim: int, storage: CodedStorage, kind: torch.dtype) -> Rows:
    assert code.is_contiguous()
    assert largest.is_contiguous()
    bits, group = 4 if storage == "int4" else 8, group_channels(dim, storage)
    return Rows(code, largest, 0, {"BITS": bits, "GROUP": group, "KIND": _KINDS[kind]})


def coded_history(layer: PackedLayer, s: TableSettings) -> StoredHistory:
    """A packed layer, read as if it had been unpacked into a workspace of the dtype of its log m."""
    assert s.storage != "model"
    codes = (layer.k_code_NCB, layer.k_largest_NCG), (layer.v_code_NCB, layer.v_largest_NCG)
    k, v = (coded_rows(*pair, s.head_dim, s.storage, layer.mass_NC2.dtype) for pair in codes)
    records = layer.position_NC3, layer.m_NC, layer.weight_NC, layer.partner_NC
    return StoredHistory(k, v, *(x[:, : s.history_tokens] for x in records))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _split_codes(code):  # type: ignore[no-untyped-def]
    """Codes of 4 bits, 8 off, as float32; those of upper halves of bytes 16 times as large.

    Behind 2^23 the last bit is 1, so no unit for conversions is waited for.
    """
    bits = code.to(tl.int32)
    low = ((bits & 15) | 0x4B000000).to(tl.float32, bitcast=True)
    high = ((bits & 240) | 0x4B000000).to(tl.float32, bitcast=True)
    return low - 8388616.0, high - 8388736.0


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rounded(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """To this dtype and back; to bfloat16 two at once, which the compiler leaves to a slow unit else."""
    if tl.bfloat16 == KIND:
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 both;
                cvt.rn.bf16x2.f32 both, $3, $2;
                shl.b32 $0, both, 16;
                and.b32 $1, both, 0xFFFF0000;
            }
            """,
            "=f,=f,f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(KIND).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _in_runs(x, M: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.reshape(x.to(tl.float32), [M, x.shape[1] // RUN, RUN])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_halves(  # type: ignore[no-untyped-def]
    x, largest, at, there, D: tl.constexpr, M: tl.constexpr, HALVES: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Both halves of M rows that begin at these places of `x`, float32 [M, runs, RUN]; or twice the whole rows.

    Channels of a run share a largest one. Rows that are not there are 0. `int4` is read in halves alone, and as
    bfloat16 decoded by fewer instructions that give the same bits.
    """
    HALF: tl.constexpr = D // HALVES
    RUN: tl.constexpr = GROUP if GROUP < HALF else HALF
    at_x, here = at[:, None] + tl.arange(0, HALF)[None, :], there[:, None]
    if BITS == 0:
        first = tl.load(x + at_x, mask=here, other=0.0)
        second = first
        if HALVES == 2:
            second = tl.load(x + at_x + HALF, mask=here, other=0.0)
        return _in_runs(first, M, RUN), _in_runs(second, M, RUN)
    else:
        GROUPS: tl.constexpr = D // GROUP
        BYTES: tl.constexpr = D // 2 if BITS == 4 else D
        step_of_one = STEP_OF_4 if BITS == 4 else _STEP_OF_8
        of_second = 0.0625 if BITS == 4 else 1.0
        first = tl.load(x + at_x, mask=here, other=0)
        at_largest = (at // BYTES * GROUPS)[:, None] + tl.arange(0, HALF // RUN)[None, :] * RUN // GROUP
        step = tl.load(largest + at_largest, mask=here, other=0.0).to(tl.float32) * step_of_one
        if BITS == 4 and tl.bfloat16 == KIND:
            return decode_codes(*load_codes(x, largest, at, there, D, GROUP), M, D, GROUP)
        else:
            second = first
            if BITS == 4:
                first, second = _split_codes(first)
            elif HALVES == 2:
                second = tl.load(x + at_x + HALF, mask=here, other=0)
            first = _in_runs(first, M, RUN) * step[:, :, None]
            if GROUPS > 1:
                step = tl.load(largest + at_largest + HALF // GROUP, mask=here, other=0.0).to(tl.float32) * step_of_one
            second = _in_runs(second, M, RUN) * (step * of_second)[:, :, None]
            return _rounded(first, KIND), _rounded(second, KIND)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def as_pairs(first, second, P: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    even_a, odd_a = tl.split(tl.reshape(first, [M, P // 2, 2]))
    even_b, odd_b = tl.split(tl.reshape(second, [M, P // 2, 2]))
    return even_a, odd_a, even_b, odd_b


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_pairs(  # type: ignore[no-untyped-def]
    x, largest, at, there, P: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Even and odd channels of the first half of rows, then of the second, float32 [M, P / 2] each."""
    first, second = load_halves(x, largest, at, there, 2 * P, M, 2, BITS, GROUP, KIND)
    return as_pairs(first, second, P, M)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def add_up(x, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of rows [M, N], neighbours first; N is a power of two."""
    if N == 1:
        return tl.reshape(x, [M])
    else:
        return add_up(tl.sum(tl.reshape(x, [M, N // 2, 2]), 2), M, N // 2)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _squares(even_a, odd_a, even_b, odd_b):  # type: ignore[no-untyped-def]
    return tl.fma(even_a, even_a, odd_a * odd_a) + tl.fma(even_b, even_b, odd_b * odd_b)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _negate(x, turn):  # type: ignore[no-untyped-def]
    """Where the second bit is set: it goes to that of the sign."""
    return (x.to(tl.int32, bitcast=True) ^ ((turn << 30) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def sin_cos(angle):  # type: ignore[no-untyped-def]
    """Of angles up to some ten thousand, to 1e-7: without the branch for larger ones that the library's ways carry.

    A multiple of pi/2 is taken off in three parts, the first two so short that their products are exact; parts and
    polynomials are those of Cephes (Moshier, sinf.c).
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - quarter * 1.5703125 - quarter * 4.837512969970703125e-4 - quarter * 7.549789954891882e-8
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    turn = quarter.to(tl.int32)
    is_odd = (turn & 1) > 0
    first, second = tl.where(is_odd, cos, sin), tl.where(is_odd, sin, cos)
    return _negate(first, turn), _negate(second, turn + 1)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def sin_cos_by_unit(angle):  # type: ignore[no-untyped-def]
    """The same to 1e-6 by the unit that a GPU has for it: a third of the instructions."""
    turns = tl.fma(angle, 0.15915494309189535, _MAGIC) - _MAGIC
    # The first part of 2 pi is so short that its product is exact.
    r = tl.fma(turns, -1.9353071795864769e-3, tl.fma(turns, -6.28125, angle))
    sin = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [r], dtype=tl.float32, is_pure=True, pack=1)
    cos = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [r], dtype=tl.float32, is_pure=True, pack=1)
    return sin, cos


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _turn(places, channel, axis, frequency, pair, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sine and cosine of the angles of these pairs of channels at these places, in the layout of the channels.

    As exact as keys of this dtype deserve: those of 16 bits are rounded to 2^-9.
    """
    time, line, column = places
    turns, step = tl.load(axis + pair), tl.load(frequency + pair)
    # Two of three products are 0: fewer instructions than to choose among three places.
    by_time, by_line = tl.where(turns == 0, step, 0.0), tl.where(turns == 1, step, 0.0)
    by_column = tl.where(turns == 2, step, 0.0)
    angle = tl.fma(line[:, None], by_line[None, :], column[:, None] * by_column[None, :])
    angle = tl.fma(time[:, None], by_time[None, :], angle)
    # Channels are finite: it is only their layout that counts, else sine and cosine go through shared memory.
    angle = tl.fma(channel, 0.0, angle)
    if KIND.primitive_bitwidth == 16:
        return sin_cos_by_unit(angle)
    else:
        return sin_cos(angle)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def load_places(position, at, there):  # type: ignore[no-untyped-def]
    """Time, row and column of the positions that begin there."""
    time = tl.load(position + at, mask=there, other=0.0)
    line = tl.load(position + at + 1, mask=there, other=0.0)
    return time, line, tl.load(position + at + 2, mask=there, other=0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _turn_back(even, odd, scale, places, axis, frequency, pair, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    sin, cos = _turn(places, even, axis, frequency, pair, KIND)
    sin, cos = sin * scale, cos * scale
    return tl.fma(even, cos, odd * sin), tl.fma(odd, cos, -(even * sin))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def unit_pairs(  # type: ignore[no-untyped-def]
    k, largest, at_k, position, at_p, there, axis, frequency, P: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Keys before RoPE, of length 1: even and odd channels of the first half, then of the second, float32 [M, P / 2].

    Those that are not there are 0.
    """
    even_a, odd_a, even_b, odd_b = _load_pairs(k, largest, at_k, there, P, M, BITS, GROUP, KIND)
    places = load_places(position, at_p, there)
    return turned_back(even_a, odd_a, even_b, odd_b, places, there, axis, frequency, P, M, KIND, False)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def turned_back(  # type: ignore[no-untyped-def]
    even_a, odd_a, even_b, odd_b, places, there, axis, frequency, P: tl.constexpr, M: tl.constexpr,
    KIND: tl.constexpr, NAN: tl.constexpr,
):  # fmt: skip
    """`unit_pairs` of what is loaded; with NAN, what is not there is no number."""
    pair = tl.arange(0, P // 2)
    squares = add_up(_squares(even_a, odd_a, even_b, odd_b), M, P // 2)
    scale = 1.0 / tl.sqrt(tl.maximum(squares, 1e-24))
    if NAN:
        scale = tl.where(there, scale, float("nan"))
    scale = scale[:, None]
    even_a, odd_a = _turn_back(even_a, odd_a, scale, places, axis, frequency, pair, KIND)
    even_b, odd_b = _turn_back(even_b, odd_b, scale, places, axis, frequency, P // 2 + pair, KIND)
    return even_a, odd_a, even_b, odd_b


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def in_mean_units(x):  # type: ignore[no-untyped-def]
    """Channels of keys of length 1 as whole numbers, whose sums have no order."""
    return tl.fma(x, _MEAN_UNITS, _MAGIC).to(tl.int32, bitcast=True) - _MAGIC_BITS


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_mean(mean, even_a, odd_a, even_b, odd_b, P: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a tile, from sums of whole numbers [M, P / 2]; `mean` points at its first channel."""
    # Joined first: each sum over threads waits for all of them.
    sums = tl.sum(tl.join(tl.join(even_a, even_b), tl.join(odd_a, odd_b)), 0)
    sums = tl.reshape(tl.permute(sums, (1, 0, 2)), [2 * P])
    tl.store(mean + tl.arange(0, 2 * P), (sums.to(tl.float32) * (1.0 / (_MEAN_UNITS * TILE))).to(mean.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _inner(even_a, odd_a, even_b, odd_b, apart, axis, frequency, pair, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of pairs of channels before RoPE: only the difference of two rotations counts."""
    sin, cos = _turn(apart, even_a, axis, frequency, pair, KIND)
    along, across = tl.fma(even_a, even_b, odd_a * odd_b), tl.fma(odd_a, even_b, -(even_a * odd_b))
    return tl.fma(along, cos, across * sin)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def compare_pairs(  # type: ignore[no-untyped-def]
    k, largest, at_a, at_b, position, at_pa, at_pb, there, axis, frequency, P: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Of pairs of keys before RoPE: inner product and squared lengths, float32 [M]."""
    pair = tl.arange(0, P // 2)
    even_a, odd_a, more_even_a, more_odd_a = _load_pairs(k, largest, at_a, there, P, M, BITS, GROUP, KIND)
    even_b, odd_b, more_even_b, more_odd_b = _load_pairs(k, largest, at_b, there, P, M, BITS, GROUP, KIND)
    time_a, line_a, column_a = load_places(position, at_pa, there)
    time_b, line_b, column_b = load_places(position, at_pb, there)
    apart = time_a - time_b, line_a - line_b, column_a - column_b
    inner = _inner(even_a, odd_a, even_b, odd_b, apart, axis, frequency, pair, KIND)
    inner += _inner(more_even_a, more_odd_a, more_even_b, more_odd_b, apart, axis, frequency, P // 2 + pair, KIND)
    squares_a = _squares(even_a, odd_a, more_even_a, more_odd_a)
    squares_b = _squares(even_b, odd_b, more_even_b, more_odd_b)
    return add_up(inner, M, P // 2), add_up(squares_a, M, P // 2), add_up(squares_b, M, P // 2)

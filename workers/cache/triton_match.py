"""Kernels that find partners: what `partners.py` does, for all rows of keys of some layers at once.

A first kernel turns the new keys and the latent frame before them back to where they were before RoPE, at length 1, and
makes the means of their tiles; a second compares each key with the latent frame before its own, a third with the keys
of a few tiles, which it turns back itself. Of the products only the largest is kept: it is looked for place by place
while tiles pass, and across places once at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.partners import History, Look
from workers.cache.unrotated import TurnBack

ROWS = 32
"""Keys that a program turns back at a time: sines, cosines and both halves stay in registers."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def turn_by(position, at, there, axis, frequency, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Angle of each pair of channels, [rows, P], at the positions that begin at these places."""
    pair = tl.arange(0, P)
    turns = tl.load(axis + pair)[None, :]
    time = tl.load(position + at, mask=there, other=0.0)[:, None]
    line = tl.load(position + at + 1, mask=there, other=0.0)[:, None]
    column = tl.load(position + at + 2, mask=there, other=0.0)[:, None]
    place = tl.where(turns == 0, time, tl.where(turns == 1, line, column))
    return place * tl.load(frequency + pair)[None, :]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def beside(angle, channel):  # type: ignore[no-untyped-def]
    """The angle, in the layout of these channels, which are finite: else sin and cos go through shared memory."""
    return tl.fma(channel, 0.0, angle)


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
def load_halves(x, at, there, P: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Even and odd channels of rows that begin at these places, float32 [M, P] each."""
    channel = tl.arange(0, 2 * P)
    row = tl.load(x + at[:, None] + channel[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    return tl.split(tl.reshape(row, [M, P, 2]))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def unit_halves(  # type: ignore[no-untyped-def]
    k, at_k, position, at_p, there, axis, frequency, P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Even and odd channels before RoPE, of length 1, float32."""
    even, odd = load_halves(k, at_k, there, P, M)
    sin, cos = sin_cos(beside(turn_by(position, at_p, there, axis, frequency, P), even))
    a, b = even * cos + odd * sin, odd * cos - even * sin
    scale = 1.0 / tl.sqrt(tl.maximum(tl.sum(a * a + b * b, 1), 1e-24))
    return a * scale[:, None], b * scale[:, None]


@triton.jit(do_not_specialize=["first_tile", "before", "stop"])  # type: ignore[untyped-decorator, unused-ignore]
def _turn_back(  # type: ignore[no-untyped-def]
    k, position, m, unit, mean, axis, frequency,
    stride_kn, stride_kl, stride_pn, stride_mn, stride_jn, start_k, first_tile, before, stop,
    TILE: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the history. Unit keys are stored even channels first."""
    tile = first_tile + tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, P)
    sum_even, sum_odd = tl.zeros([P], tl.float32), tl.zeros([P], tl.float32)
    for step in range(TILE // M):
        slot = tile * TILE + step * M + tl.arange(0, M)
        live = tl.load(m + row * stride_mn + slot) > 0
        at_k = row * stride_kn + (start_k + slot).to(tl.int64) * stride_kl
        even, odd = unit_halves(k, at_k, position, row * stride_pn + slot * 3, live, axis, frequency, P, M)
        even, odd = even.to(unit.dtype.element_ty), odd.to(unit.dtype.element_ty)
        at = (row * (stop - before) + slot - before)[:, None] * (2 * P) + pair[None, :]
        wanted = ((slot >= before) & (slot < stop))[:, None]
        tl.store(unit + at, even, mask=wanted)
        tl.store(unit + at + P, odd, mask=wanted)
        # Those of slots without a key are 0.
        sum_even += tl.sum(even.to(tl.float32), 0)
        sum_odd += tl.sum(odd.to(tl.float32), 0)
    at = mean + row * stride_jn + tile * (2 * P) + 2 * pair
    tl.store(at, (sum_even / TILE).to(mean.dtype.element_ty))
    tl.store(at + 1, (sum_odd / TILE).to(mean.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _best_of_places(highest, place, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of [rows, N] places with the first of each key that was best there: the best key of each row, first of equals."""
    most = tl.max(highest, 1)
    key = tl.where(highest == most[:, None], place + tl.arange(0, N)[None, :], 2147483647)
    return tl.min(key, 1), most


@triton.jit(do_not_specialize=["before", "num_rows", "skip"])  # type: ignore[untyped-decorator, unused-ignore]
def _frame_before(  # type: ignore[no-untyped-def]
    unit, m, found, best, stride_mn, before, num_rows, skip, frame,
    P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: M keys of one new latent frame against all of the one before."""
    own = tl.program_id(0) * M + tl.arange(0, M)
    number = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, 2 * P)[None, :]
    base = unit + row * num_rows * (2 * P)
    first_own, first_other = skip + number * frame, skip + (number - 1) * frame
    keys = tl.load(base + (first_own + own)[:, None] * (2 * P) + channel, mask=(own < frame)[:, None], other=0.0)
    highest = tl.full([M, N], float("-inf"), tl.float32)
    place = tl.zeros([M, N], tl.int32)
    stop = tl.where(first_other >= 0, frame, 0)
    for start in range(0, stop, N):
        other = start + tl.arange(0, N)
        inside = other < frame
        others = tl.load(base + (first_other + other)[:, None] * (2 * P) + channel, mask=inside[:, None], other=0.0)
        live = tl.load(m + row * stride_mn + before + first_other + other, mask=inside, other=0) > 0
        cosine = tl.dot(keys, tl.trans(others), input_precision=PRECISION)
        cosine += tl.where(live, 0.0, float("-inf"))[None, :]
        place = tl.where(cosine > highest, before + first_other + start, place)
        highest = tl.maximum(highest, cosine)
    key, most = _best_of_places(highest, place, N)
    at = row * (num_rows - skip) + number * frame + own
    tl.store(found + at, key, mask=own < frame)
    tl.store(best + at, most, mask=own < frame)


@triton.jit(do_not_specialize=["first_tile", "before", "start", "stop"])  # type: ignore[untyped-decorator, unused-ignore]
def _near_tiles(  # type: ignore[no-untyped-def]
    unit, k, position, m, chosen, found, best, partner, axis, frequency,
    stride_kn, stride_kl, stride_pn, stride_mn, stride_rn, start_k, first_tile, before, start, stop, num_chosen,
    TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the new keys of a tile against the keys of its near tiles; then the better of both finds."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    own = (first_tile + tile) * TILE + tl.arange(0, TILE)
    is_new = (own >= start) & (own < stop)
    pair = tl.arange(0, P)[None, :]
    at_unit = (row * (stop - before) + own - before)[:, None] * (2 * P) + pair
    even = tl.load(unit + at_unit, mask=is_new[:, None], other=0.0)
    odd = tl.load(unit + at_unit + P, mask=is_new[:, None], other=0.0)
    highest = tl.full([TILE, N], float("-inf"), tl.float32)
    place = tl.zeros([TILE, N], tl.int32)
    list_at = chosen + (row * tl.num_programs(0) + tile) * num_chosen
    for step in range(num_chosen * (TILE // N)):
        first = tl.load(list_at + step // (TILE // N)) * TILE + step % (TILE // N) * N
        slot = first + tl.arange(0, N)
        live = (tl.load(m + row * stride_mn + slot) > 0) & (slot < start)
        at_k = row * stride_kn + (start_k + slot).to(tl.int64) * stride_kl
        a, b = unit_halves(k, at_k, position, row * stride_pn + slot * 3, live, axis, frequency, P, N)
        cosine = tl.dot(even, tl.trans(a.to(even.dtype)), input_precision=PRECISION)
        cosine = tl.dot(odd, tl.trans(b.to(odd.dtype)), cosine, input_precision=PRECISION)
        cosine += tl.where(live, 0.0, float("-inf"))[None, :]
        place = tl.where(cosine > highest, first, place)
        highest = tl.maximum(highest, cosine)
    key, most = _best_of_places(highest, place, N)
    at = row * (stop - start) + own - start
    near = tl.load(best + at, mask=is_new, other=float("-inf"))
    key = tl.where(most > near, key, tl.load(found + at, mask=is_new, other=0))
    nobody = tl.maximum(most, near) == float("-inf")
    tl.store(partner + row * stride_rn + own, tl.where(nobody, -1, key), mask=is_new)


def match(history: History, partner_NC: Tensor, turn_back: TurnBack, new: slice, look: Look) -> None:
    """Partners of the keys in the slots `new`, and the means of the tiles that they fill; both are written.

    Args:
        history: Of as many heads as one likes; the new keys are there.
        partner_NC: Slot of the partner, -1 for none.
        turn_back: RoPE of the model.
        new: Slots, a whole number of latent frames in the order of time.
        look: Where to look; its tile divides the history, its number of tiles is given.
    """
    assert look.num_tiles is not None
    k, tile, frame = history.k_NLW, look.tile, look.frame_tokens
    heads, pairs = k.shape[0], turn_back.head_dim // 2
    before, first_tile, stop_tile = max(0, new.start - frame), new.start // tile, -(-new.stop // tile)
    skip, num_new = new.start - before, new.stop - new.start
    unit = torch.empty((heads, new.stop - before, 2 * pairs), dtype=k.dtype, device=k.device)
    found = torch.empty((heads, num_new), dtype=torch.int32, device=k.device)
    best = torch.empty((heads, num_new), dtype=torch.float32, device=k.device)
    m, position, mean = history.m_NC, history.position_NC3, history.mean_NJD
    precision = "ieee" if k.dtype == torch.float32 else "tf32"
    tables = turn_back.axis_int32_D, turn_back.frequency_D
    _turn_back[(stop_tile - before // tile, heads)](
        k, position, m, unit, mean, *tables, *k.stride()[:2], position.stride(0), m.stride(0), mean.stride(0),
        history.start, before // tile, before, new.stop, TILE=tile, P=pairs, M=min(ROWS, tile), num_warps=4,
    )  # fmt: skip
    _frame_before[(triton.cdiv(frame, 128), num_new // frame, heads)](
        unit, m, found, best, m.stride(0), before, new.stop - before, skip, frame,
        P=pairs, M=128, N=64, PRECISION=precision, num_warps=8, num_stages=3,
    )  # fmt: skip
    chosen = _choose_tiles(mean, first_tile, stop_tile, look.num_tiles)
    look.bring(chosen.flatten(1))
    _near_tiles[(stop_tile - first_tile, heads)](
        unit, k, position, m, chosen, found, best, partner_NC, *tables, *k.stride()[:2],
        position.stride(0), m.stride(0), partner_NC.stride(0), history.start, first_tile, before, new.start, new.stop,
        chosen.shape[-1], TILE=tile, P=pairs, N=min(look.keys_at_once, tile), PRECISION=precision,
        num_warps=8, num_stages=1,
    )  # fmt: skip


def _choose_tiles(mean_NJD: Tensor, first_tile: int, stop_tile: int, num: int) -> Tensor:
    """Tiles whose mean is nearest to that of each tile of new keys, int32 [N, I, n]."""
    if num == 0:
        return torch.empty((mean_NJD.shape[0], stop_tile - first_tile, 0), dtype=torch.int32, device=mean_NJD.device)
    score_NIJ = torch.bmm(mean_NJD[:, first_tile:stop_tile], mean_NJD[:, : max(num, first_tile)].mT)
    return score_NIJ.topk(min(num, score_NIJ.shape[-1]), -1, sorted=False).indices.to(torch.int32)

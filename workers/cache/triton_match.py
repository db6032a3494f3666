"""Kernels that find partners: what `partners.py` does, for all rows of keys of some layers at once.

A first kernel turns the new keys and the latent frame before them back to where they were before RoPE, at length 1, and
makes the means of their tiles; a second compares each key with the latent frame before its own. The nearest tiles are
listed by a third, their keys turned back by a fourth, from codes where they lie so, and compared by a fifth. Of the
products only the largest is kept: it is looked for place by place while keys pass, and across places once at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.partners import History, Look
from workers.cache.triton_rows import (
    MOST_AVERAGED,
    in_mean_units,
    keys_of,
    older_keys_of,
    store_mean,
    unit_pairs,
)
from workers.cache.unrotated import TurnBack

TURNED_AT_ONCE = 16
"""Keys that a program turns back at a time."""
OWN_AT_ONCE, OTHERS_AT_ONCE = 128, 64
"""New keys that a program compares, and keys of the latent frame before that it compares them with at a time."""
NEAR_AT_ONCE = 64
"""Keys of near tiles, the same way."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_unit(unit, at, a, b, c, d, wanted, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Even channels first; those of the first half are `a`, of the second `c`."""
    to = unit + at[:, None] * (2 * P) + tl.arange(0, P // 2)[None, :]
    kind = unit.dtype.element_ty
    wanted = wanted[:, None]
    tl.store(to, a.to(kind), mask=wanted)
    tl.store(to + P // 2, c.to(kind), mask=wanted)
    tl.store(to + P, b.to(kind), mask=wanted)
    tl.store(to + P + P // 2, d.to(kind), mask=wanted)


@triton.jit(do_not_specialize=["first_tile", "before", "stop"])  # type: ignore[untyped-decorator, unused-ignore]
def _turn_back(  # type: ignore[no-untyped-def]
    k, largest, position, m, unit, bias, mean, axis, frequency,
    stride_kn, stride_kl, start_k, stride_pn, stride_mn, stride_jn, first_tile, before, stop,
    TILE: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the history. The bias of a slot without a key is -inf."""
    tile = first_tile + tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    even_a, odd_a = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
    even_b, odd_b = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
    for step in range(TILE // M):
        slot = tile * TILE + step * M + tl.arange(0, M)
        live = tl.load(m + row * stride_mn + slot) > 0
        at_k = row * stride_kn + (start_k + slot).to(tl.int64) * stride_kl
        a, b, c, d = unit_pairs(
            k, largest, at_k, position, row * stride_pn + slot * 3, live, axis, frequency, P, M, BITS, GROUP, KIND
        )
        at, wanted = row * (stop - before) + slot - before, (slot >= before) & (slot < stop)
        _store_unit(unit, at, a, b, c, d, wanted, P)
        tl.store(bias + at, tl.where(live, 0.0, float("-inf")), mask=wanted)
        # Those of slots without a key are 0.
        even_a += in_mean_units(a)
        odd_a += in_mean_units(b)
        even_b += in_mean_units(c)
        odd_b += in_mean_units(d)
    store_mean(mean + row * stride_jn + tile * (2 * P), even_a, odd_a, even_b, odd_b, P, TILE)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _keep_best(highest, place, keys, others, bias, first, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The higher cosine at each place, and the first key of those that it was found among."""
    cosine = tl.dot(keys, tl.trans(others), input_precision=PRECISION) + bias[None, :]
    place = tl.where(cosine > highest, first, place)
    return tl.maximum(highest, cosine), place


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _best_of_places(highest, place, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of [rows, N] places with the first of each key that was best there: the best key of each row, first of equals."""
    most = tl.max(highest, 1)
    key = tl.where(highest == most[:, None], place + tl.arange(0, N)[None, :], 2147483647)
    return tl.min(key, 1), most


@triton.jit(do_not_specialize=["before", "num_rows", "skip"])  # type: ignore[untyped-decorator, unused-ignore]
def _frame_before(  # type: ignore[no-untyped-def]
    unit, bias, found, best, before, num_rows, skip, frame,
    P: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: M keys of one new latent frame against all of the one before."""
    own = tl.program_id(0) * M + tl.arange(0, M)
    number = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, 2 * P)[None, :]
    base, bias = unit + row * num_rows * (2 * P), bias + row * num_rows
    first_own, first_other = skip + number * frame, skip + (number - 1) * frame
    keys = tl.load(base + (first_own + own)[:, None] * (2 * P) + channel, mask=(own < frame)[:, None], other=0.0)
    highest = tl.full([M, N], float("-inf"), tl.float32)
    place = tl.zeros([M, N], tl.int32)
    base, bias, first_key = base + first_other * (2 * P), bias + first_other, before + first_other
    stop = tl.where(first_other >= 0, frame, 0)
    whole = stop // N * N
    for start in range(0, whole, N):
        other = start + tl.arange(0, N)
        others = tl.load(base + other[:, None] * (2 * P) + channel)
        highest, place = _keep_best(highest, place, keys, others, tl.load(bias + other), first_key + start, PRECISION)
    if whole < stop:
        other = whole + tl.arange(0, N)
        others = tl.load(base + other[:, None] * (2 * P) + channel, mask=(other < stop)[:, None], other=0.0)
        there = tl.load(bias + other, mask=other < stop, other=float("-inf"))
        highest, place = _keep_best(highest, place, keys, others, there, first_key + whole, PRECISION)
    key, most = _best_of_places(highest, place, N)
    at = row * (num_rows - skip) + number * frame + own
    tl.store(found + at, key, mask=own < frame)
    tl.store(best + at, most, mask=own < frame)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _list_nearest(score, chosen, stride_sn, num_tiles, num, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: the places of the highest scores of a row, highest first; of equal ones the first."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, M)
    value = tl.load(score + row * stride_sn + tile, mask=tile < num_tiles, other=float("-inf")).to(tl.float32)
    tile = tl.where(tile < num_tiles, tile, M)
    for place in range(num):
        nearest = tl.min(tl.where(value == tl.max(value, 0), tile, M), 0)
        tl.store(chosen + row * num + place, nearest)
        value = tl.where(tile == nearest, float("-inf"), value)
        tile = tl.where(tile == nearest, M, tile)


@triton.jit(do_not_specialize=["start"])  # type: ignore[untyped-decorator, unused-ignore]
def _turn_near(  # type: ignore[no-untyped-def]
    k, largest, position, m, chosen, unit, bias, axis, frequency,
    stride_kn, stride_kl, start_k, stride_pn, stride_mn, start, num_listed,
    TILE: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: M keys of a tile that is listed. The bias of a slot without an older key is -inf."""
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * M
    tile = tl.load(chosen + row * num_listed + first // TILE)
    slot = tile * TILE + first % TILE + tl.arange(0, M)
    live = (tl.load(m + row * stride_mn + slot) > 0) & (slot < start)
    at_k = row * stride_kn + (start_k + slot).to(tl.int64) * stride_kl
    a, b, c, d = unit_pairs(
        k, largest, at_k, position, row * stride_pn + slot * 3, live, axis, frequency, P, M, BITS, GROUP, KIND
    )
    at = row * (num_listed * TILE) + first + tl.arange(0, M)
    _store_unit(unit, at, a, b, c, d, slot >= 0, P)
    tl.store(bias + at, tl.where(live, 0.0, float("-inf")))


@triton.jit(do_not_specialize=["first_tile", "before", "start", "stop"])  # type: ignore[untyped-decorator, unused-ignore]
def _near_tiles(  # type: ignore[no-untyped-def]
    unit, near, bias, chosen, found, best, partner, stride_rn, first_tile, before, start, stop, num_chosen,
    TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the new keys of a tile against the keys of its near tiles; then the better of both finds."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    own = (first_tile + tile) * TILE + tl.arange(0, TILE)
    is_new = (own >= start) & (own < stop)
    channel = tl.arange(0, 2 * P)[None, :]
    at_unit = (row * (stop - before) + own - before)[:, None] * (2 * P) + channel
    keys = tl.load(unit + at_unit, mask=is_new[:, None], other=0.0)
    highest = tl.full([TILE, N], float("-inf"), tl.float32)
    place = tl.zeros([TILE, N], tl.int32)
    first_listed = (row * tl.num_programs(0) + tile) * num_chosen
    chosen, near, bias = chosen + first_listed, near + first_listed * (TILE * 2 * P), bias + first_listed * TILE
    for listed in range(0, num_chosen * TILE, N):
        other = listed + tl.arange(0, N)
        others = tl.load(near + other[:, None] * (2 * P) + channel)
        first = tl.load(chosen + listed // TILE) * TILE + listed % TILE
        highest, place = _keep_best(highest, place, keys, others, tl.load(bias + other), first, PRECISION)
    key, most = _best_of_places(highest, place, N)
    at = row * (stop - start) + own - start
    before_best = tl.load(best + at, mask=is_new, other=float("-inf"))
    key = tl.where(most > before_best, key, tl.load(found + at, mask=is_new, other=0))
    nobody = tl.maximum(most, before_best) == float("-inf")
    tl.store(partner + row * stride_rn + own, tl.where(nobody, -1, key), mask=is_new)


def match(history: History, partner_NC: Tensor, turn_back: TurnBack, new: slice, look: Look) -> None:
    """Partners of the keys in the slots `new`, and the means of the tiles that they fill; both are written.

    Args:
        history: Of as many heads as one likes; the new keys and the latent frame before are there.
        partner_NC: Slot of the partner, -1 for none.
        turn_back: RoPE of the model.
        new: Slots, a whole number of latent frames in the order of time.
        look: Where to look; its tile divides the history, its number of tiles is given.
    """
    assert look.num_tiles is not None
    assert look.tile <= MOST_AVERAGED
    tile, frame = look.tile, look.frame_tokens
    k, m, position, mean = keys_of(history, turn_back.head_dim), history.m_NC, history.position_NC3, history.mean_NJD
    heads, pairs, device = m.shape[0], turn_back.head_dim // 2, m.device
    before, first_tile, stop_tile = max(0, new.start - frame), new.start // tile, -(-new.stop // tile)
    skip, num_new = new.start - before, new.stop - new.start
    unit = torch.empty((heads, new.stop - before, 2 * pairs), dtype=mean.dtype, device=device)
    bias = torch.empty((heads, new.stop - before), dtype=torch.float32, device=device)
    found = torch.empty((heads, num_new), dtype=torch.int32, device=device)
    best = torch.empty((heads, num_new), dtype=torch.float32, device=device)
    precision = "ieee" if mean.dtype == torch.float32 else "tf32"
    _turn_back[(stop_tile - before // tile, heads)](
        k.x, k.largest, position, m, unit, bias, mean, turn_back.axis_int32_D, turn_back.frequency_D, *k.at,
        position.stride(0), m.stride(0), mean.stride(0), before // tile, before, new.stop,
        TILE=tile, P=pairs, M=min(TURNED_AT_ONCE, tile), **k.form, num_warps=4,
    )  # fmt: skip
    _frame_before[(triton.cdiv(frame, OWN_AT_ONCE), num_new // frame, heads)](
        unit, bias, found, best, before, new.stop - before, skip, frame,
        P=pairs, M=OWN_AT_ONCE, N=OTHERS_AT_ONCE, PRECISION=precision, num_warps=8, num_stages=3,
    )  # fmt: skip
    chosen = _choose_tiles(mean, first_tile, stop_tile, look.num_tiles)
    near, near_bias = _turn_chosen(history, chosen, turn_back, new.start, tile)
    _near_tiles[(stop_tile - first_tile, heads)](
        unit, near, near_bias, chosen, found, best, partner_NC, partner_NC.stride(0), first_tile, before, new.start,
        new.stop, chosen.shape[-1], TILE=tile, P=pairs, N=min(NEAR_AT_ONCE, tile), PRECISION=precision,
        num_warps=8, num_stages=3,
    )  # fmt: skip


def _choose_tiles(mean_NJD: Tensor, first_tile: int, stop_tile: int, num: int) -> Tensor:
    """Tiles whose mean is nearest to that of each tile of new keys, int32 [N, I, n]."""
    heads, num_own = mean_NJD.shape[0], stop_tile - first_tile
    num_tiles = min(max(num, first_tile), mean_NJD.shape[1])
    num = min(num, num_tiles)
    chosen = torch.empty((heads, num_own, num), dtype=torch.int32, device=mean_NJD.device)
    if num:
        score_NIJ = torch.bmm(mean_NJD[:, first_tile:stop_tile], mean_NJD[:, :num_tiles].mT)
        _list_nearest[(heads * num_own,)](
            score_NIJ, chosen, score_NIJ.stride(1), num_tiles, num, M=triton.next_power_of_2(num_tiles), num_warps=4
        )
    return chosen


def _turn_chosen(history: History, chosen: Tensor, turn_back: TurnBack, start: int, tile: int) -> tuple[Tensor, Tensor]:
    """Keys of these tiles of length 1, [N, I * n * tile, D], and -inf for those not older than slot `start`, else 0."""
    k = older_keys_of(history, turn_back.head_dim)
    position, m, mean = history.position_NC3, history.m_NC, history.mean_NJD
    heads, num_listed = m.shape[0], chosen.shape[1] * chosen.shape[2]
    near = torch.empty((heads, num_listed * tile, turn_back.head_dim), dtype=mean.dtype, device=m.device)
    bias = torch.empty((heads, num_listed * tile), dtype=torch.float32, device=m.device)
    at_once = min(TURNED_AT_ONCE, tile)
    if num_listed:
        _turn_near[(num_listed * tile // at_once, heads)](
            k.x, k.largest, position, m, chosen, near, bias, turn_back.axis_int32_D, turn_back.frequency_D, *k.at,
            position.stride(0), m.stride(0), start, num_listed,
            TILE=tile, P=turn_back.head_dim // 2, M=at_once, **k.form, num_warps=4,
        )  # fmt: skip
    return near, bias

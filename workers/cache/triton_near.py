"""New keys of a tile against the older keys of its near tiles: a kernel of `triton_match.py`.

Multipliers are busy half of the time where each key's codes wait for the record that says whether it is there. So rows
are read whether or not they are, those of the next step before this one's are turned back, and what is not there is no
number. A thread has the cosines of every fourth pair of keys; it keeps their best alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.cache.triton_rows import as_pairs, load_halves, load_places, turned_back
from workers.triton_decode import decode_codes, load_codes


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _side_by_side(a, b, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows [M, N] of `a`, then of `b`: [M, 2 * N]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [M, 2 * N])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def keep_higher(highest, place, cosine, first, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The higher one at each place, and where it was found; NaN is never higher."""
    is_higher = cosine > highest
    place = tl.where(is_higher, first, place)
    if PRECISION == "ieee":  # the interpreter's maximum would be NaN
        return tl.where(is_higher, cosine, highest), place
    else:
        return tl.maximum(highest, cosine), place


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fold(  # type: ignore[no-untyped-def]
    highest, place, cosine, first, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Of [M, 4, N], pairs of columns of which every fourth is a thread's: the first of the highest, in their order."""
    if N == 1:
        return keep_higher(highest, place, tl.reshape(cosine, [M, 4]), first, PRECISION)
    else:
        halves = tl.permute(tl.reshape(cosine, [M, 4, 2, N // 2]), (0, 1, 3, 2))
        low, high = tl.split(halves)
        highest, place = _fold(highest, place, low, first, M, N // 2, PRECISION)
        return _fold(highest, place, high, first + (1 if N == 2 else 2 * N), M, N // 2, PRECISION)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load(  # type: ignore[no-untyped-def]
    k, largest, position, m, first, start, base_k, start_k, stride_kl, P: tl.constexpr, N: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Of N slots, which are there or not: whether they are, their places, and keys as codes where they lie so."""
    slot, every = first + tl.arange(0, N), tl.full([N], True, tl.int1)
    live = (tl.load(m + slot) > 0) & (slot < start)
    time, line, column = load_places(position, slot * 3, every)
    at = base_k + (start_k + slot).to(tl.int64) * stride_kl
    if BITS == 4 and tl.bfloat16 == KIND:
        a, b, c = load_codes(k, largest, at, every, 2 * P, GROUP)
    else:
        a, b = load_halves(k, largest, at, every, 2 * P, N, 2, BITS, GROUP, KIND)
        c = b
    return live, time, line, column, a, b, c


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _others(  # type: ignore[no-untyped-def]
    live, time, line, column, a, b, c, axis, frequency, P: tl.constexpr, N: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Of what `_load` read: keys before RoPE, of length 1, as new keys lie."""
    if BITS == 4 and tl.bfloat16 == KIND:
        a, b = decode_codes(a, b, c, N, 2 * P, GROUP)
    even_a, odd_a, even_b, odd_b = as_pairs(a, b, P, N)
    places = time, line, column
    a, b, c, d = turned_back(even_a, odd_a, even_b, odd_b, places, live, axis, frequency, P, N, KIND, True)
    return _side_by_side(_side_by_side(a, c, N, P // 2), _side_by_side(b, d, N, P // 2), N, P)


@triton.jit(do_not_specialize=["first_tile", "before", "start", "stop"])  # type: ignore[untyped-decorator, unused-ignore]
def near_tiles(  # type: ignore[no-untyped-def]
    k, largest, position, m, unit, chosen, found, best, partner, axis, frequency,
    stride_kn, stride_kl, start_k, stride_pn, stride_mn, stride_rn, first_tile, before, start, stop, num_chosen,
    TILE: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: the new keys of a tile against the older keys of its near tiles; then the better of both finds."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    own = (first_tile + tile) * TILE + tl.arange(0, TILE)
    is_new = (own >= start) & (own < stop)
    chosen += (row * tl.num_programs(0) + tile) * num_chosen
    position += row * stride_pn
    m += row * stride_mn
    last = num_chosen * TILE - N
    first = 0
    if last >= 0:
        first = tl.load(chosen) * TILE
    following = first
    if last >= N:
        following = tl.load(chosen + N // TILE) * TILE + N % TILE
    base_k = row * stride_kn
    live, time, line, column, a, b, c = _load(
        k, largest, position, m, first, start, base_k, start_k, stride_kl, P, N, BITS, GROUP, KIND
    )
    at_unit = (row * (stop - before) + own - before)[:, None] * (2 * P) + tl.arange(0, 2 * P)[None, :]
    keys = tl.load(unit + at_unit, mask=is_new[:, None], other=0.0)
    highest = tl.full([TILE, 4], float("-inf"), tl.float32)
    place = tl.zeros([TILE, 4], tl.int32)
    for listed in range(0, num_chosen * TILE, N):
        coming = _load(k, largest, position, m, following, start, base_k, start_k, stride_kl, P, N, BITS, GROUP, KIND)
        beyond = tl.minimum(listed + 2 * N, last)
        beyond = tl.load(chosen + beyond // TILE) * TILE + beyond % TILE
        others = _others(live, time, line, column, a, b, c, axis, frequency, P, N, BITS, GROUP, KIND).to(keys.dtype)
        cosine = tl.dot(keys, tl.trans(others), input_precision=PRECISION)
        of_thread = tl.reshape(tl.permute(tl.reshape(cosine, [TILE, N // 8, 4, 2]), (0, 2, 1, 3)), [TILE, 4, N // 4])
        highest, place = _fold(highest, place, of_thread, first, TILE, N // 4, PRECISION)
        first, following = following, beyond
        live, time, line, column, a, b, c = coming
    most = tl.max(highest, 1)
    place += tl.arange(0, 4)[None, :] * 2
    key = tl.min(tl.where(highest == most[:, None], place, 2147483647), 1)
    at = row * (stop - start) + own - start
    before_best = tl.load(best + at, mask=is_new, other=float("-inf"))
    key = tl.where(most > before_best, key, tl.load(found + at, mask=is_new, other=0))
    nobody = tl.maximum(most, before_best) == float("-inf")
    tl.store(partner + row * stride_rn + own, tl.where(nobody, -1, key), mask=is_new)

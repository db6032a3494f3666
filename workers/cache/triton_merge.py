"""Kernels that make room in a full history: what `shrink.py` does, for all rows of keys of some layers at once.

Pairs are compared where they lie, chains of merged pairs are followed by pointers, and each key that is given up adds
itself to its group by atomic sums of whole numbers: their order does not matter, and a large group takes no longer than
many small ones. Or the first of a group are listed and summed where the group is collected (`Room.num_listed`), and
only the others add themselves: most groups are small. What survives goes through a buffer of one layer, from which the
layer is written again together with the means of its tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.partners import History
from workers.cache.shrink import Room
from workers.cache.table_layout import NO_KEY
from workers.cache.triton_families import find_links
from workers.cache.triton_rows import (
    MOST_AVERAGED,
    StoredHistory,
    in_mean_units,
    keys_of,
    load_halves,
    rows_as_computed,
    store_mean,
    unit_pairs,
)
from workers.cache.triton_sums import WEIGHT_UNITS, Found, find_sums
from workers.cache.unrotated import TurnBack

VALUE_UNITS = tl.constexpr(float(2**20))
"""As in `shrink.py`."""
_ADDED_AT_ONCE, _WRITTEN_AT_ONCE, _CLEARED_AT_ONCE = 16, 16, 8192
"""Keys of a program whose values are added; that are written again and turned back for means; numbers it sets to 0."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _clear_sums(summed, num_large, first_row, size, D: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums of groups that are there."""
    local = tl.program_id(1).to(tl.int64)
    num = tl.load(num_large + first_row + local) * D
    for first in range(tl.program_id(0) * M, tl.minimum(num, size), tl.num_programs(0) * M):
        at = first + tl.arange(0, M)
        tl.store(summed + local * size + at, tl.zeros([M], tl.int32), mask=at < tl.minimum(num, size))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def total_weight(weight, added, slot, there):  # type: ignore[no-untyped-def]
    """Own weight of a survivor, and that of its group; pointers are those of its row."""
    own = tl.load(weight + slot, mask=there, other=0.0)
    return own, own + tl.load(added + slot, mask=there, other=0).to(tl.float32) / WEIGHT_UNITS


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def in_units(value, part):  # type: ignore[no-untyped-def]
    """Values times their share of the group in units, in whole numbers."""
    return tl.floor(tl.fma(value, part, 0.5)).to(tl.int32)


@triton.jit(do_not_specialize=["first_row"])  # type: ignore[untyped-decorator, unused-ignore]
def _add_values(  # type: ignore[no-untyped-def]
    v, largest, weight, share, added, head_of, number, rest, counts, summed, stride_vn, stride_vl, start_v, stride_wn,
    first_row, num_slots, num_rest, num_groups, P: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: values of M keys that are given up and not listed are added to the sums of their groups."""
    local = tl.program_id(1).to(tl.int64)
    row = first_row + local
    num = tl.load(counts + row)
    if tl.program_id(0) * M < num:
        listed = tl.program_id(0) * M + tl.arange(0, M)
        given_up = listed < num
        slot = tl.load(rest + row * num_rest + listed, mask=given_up, other=0)
        at = row * num_slots + slot
        w = tl.load(share + at, mask=given_up, other=0.0)
        newest = tl.load(head_of + at, mask=given_up, other=0)
        _, total = total_weight(weight + row * stride_wn, added + row * num_slots, newest, given_up)
        part = (w / tl.maximum(total, 1e-30) * VALUE_UNITS)[:, None, None]
        at_v = row * stride_vn + (start_v + slot).to(tl.int64) * stride_vl
        first, second = load_halves(v, largest, at_v, given_up, 2 * P, M, 2, BITS, GROUP, KIND)
        group = tl.load(number + row * num_slots + newest, mask=given_up, other=0)
        there = (given_up & (group < num_groups))[:, None]
        at_sum = ((local * num_groups + group) * (2 * P))[:, None] + tl.arange(0, P)[None, :]
        tl.atomic_add(summed + at_sum, tl.reshape(in_units(first, part), [M, P]), mask=there, sem="relaxed")
        tl.atomic_add(summed + at_sum + P, tl.reshape(in_units(second, part), [M, P]), mask=there, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_log_mass(at, mass, is_key, inside, root_dim, no_key, EXTRA: tl.constexpr):  # type: ignore[no-untyped-def]
    """sqrt(D) log m in two parts, as `table_layout.write_log_mass`, and nothing in the channels behind them."""
    log_mass = tl.maximum(tl.log(tl.maximum(mass, 1e-30)) * root_dim, no_key)
    log_mass = tl.where(is_key & (mass > 0), log_mass, no_key)
    kind = at.dtype.element_ty
    high = log_mass.to(kind)
    low = (log_mass - high.to(tl.float32)).to(kind)
    extra = tl.arange(0, EXTRA)[None, :]
    parts = tl.where(extra == 0, high[:, None], tl.where(extra == 1, low[:, None], 0.0))
    tl.store(at[:, None] + extra, parts.to(kind), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def partner_of_group(partner, root, head_of, rank, slot, is_key, shift):  # type: ignore[no-untyped-def]
    """A group keeps the partner of its root, which is outside of it: where that one's group goes, or -1."""
    old = tl.load(partner + tl.load(root + slot, mask=is_key, other=0), mask=is_key, other=-1)
    has = is_key & (old >= 0)
    newest = tl.load(head_of + old, mask=has, other=0)
    return tl.where(has, tl.load(rank + newest, mask=has, other=0) + shift, -1)


@triton.jit(do_not_specialize=["first_row"])  # type: ignore[untyped-decorator, unused-ignore]
def _collect(  # type: ignore[no-untyped-def]
    k, v, position, m, weight, partner, source, added, joined, tally, number, summed, member, share,
    root, head_of, rank, new_k, new_v, new_position, new_m, new_weight, new_partner,
    stride_kn, stride_kl, stride_vn, stride_vl, stride_pn, stride_mn, stride_wn, stride_rn,
    start_k, first_row, num_slots, num_keep, num_groups, root_dim, no_key,
    D: tl.constexpr, EXTRA: tl.constexpr, M: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """One program: M slots as they will be, into the buffers of a layer."""
    place = tl.program_id(0) * M + tl.arange(0, M)
    local = tl.program_id(1).to(tl.int64)
    row = first_row + local
    inside = place < num_keep
    slot = tl.load(source + row * num_keep + place, mask=inside, other=-1)
    is_key = slot >= 0
    mine = row * num_slots
    more = tl.load(joined + mine + slot, mask=is_key, other=0)
    mass = tl.load(m + row * stride_mn + slot, mask=is_key, other=0) + more
    own, total = total_weight(weight + row * stride_wn, added + mine, slot, is_key)
    channel = tl.arange(0, D)[None, :]
    count = tl.load(tally + mine + slot, mask=is_key, other=0)
    has_rest = is_key & (count > LISTED)
    group = tl.load(number + mine + slot, mask=has_rest, other=0)
    at_sum = ((local * num_groups + group) * D)[:, None] + channel
    others = tl.load(summed + at_sum, mask=(has_rest & (group < num_groups))[:, None], other=0)
    for which in tl.static_range(LISTED):
        there = is_key & (count > which)
        of = tl.load(member + (mine + slot) * LISTED + which, mask=there, other=0)
        w = tl.load(share + mine + of, mask=there, other=0.0)
        at_v = row * stride_vn + (start_k + of).to(tl.int64) * stride_vl
        part = (w / tl.maximum(total, 1e-30) * VALUE_UNITS)[:, None]
        member_value = tl.load(v + at_v[:, None] + channel, mask=there[:, None], other=0.0).to(tl.float32)
        others += in_units(member_value, part)
    at_v = row * stride_vn + (start_k + slot).to(tl.int64) * stride_vl
    value = tl.load(v + at_v[:, None] + channel, mask=is_key[:, None], other=0.0).to(tl.float32)
    value = tl.fma(value, (own / tl.maximum(total, 1e-30))[:, None], others.to(tl.float32) / VALUE_UNITS)
    out = local * num_keep + place
    tl.store(new_v + out[:, None] * D + channel, value.to(new_v.dtype.element_ty), mask=inside[:, None])
    at_k = row * stride_kn + (start_k + slot).to(tl.int64) * stride_kl
    key = tl.load(k + at_k[:, None] + channel, mask=is_key[:, None], other=0.0)
    tl.store(new_k + out[:, None] * (D + EXTRA) + channel, key, mask=inside[:, None])
    store_log_mass(new_k + out * (D + EXTRA) + D, total, is_key, inside, root_dim, no_key, EXTRA)
    for axis in tl.static_range(3):
        at_p = tl.load(position + row * stride_pn + slot * 3 + axis, mask=is_key, other=0.0)
        tl.store(new_position + out * 3 + axis, at_p, mask=inside)
    tl.store(new_m + out, mass, mask=inside)
    tl.store(new_weight + out, tl.where(is_key, total, 0.0), mask=inside)
    shift = num_keep - tl.load(rank + mine + num_slots - 1) - 1
    older = partner_of_group(partner + row * stride_rn, root + mine, head_of + mine, rank + mine, slot, is_key, shift)
    tl.store(new_partner + out, older, mask=inside)


@triton.jit(do_not_specialize=["first_row"])  # type: ignore[untyped-decorator, unused-ignore]
def _write_again(  # type: ignore[no-untyped-def]
    k, v, position, m, weight, partner, mean, new_k, new_v, new_position, new_m, new_weight, new_partner,
    axis, frequency, stride_kn, stride_kl, stride_vn, stride_vl, stride_pn, stride_mn, stride_wn, stride_rn, stride_jn,
    start_k, first_row, num_slots, num_keep, no_key, no_key_low,
    TILE: tl.constexpr, D: tl.constexpr, EXTRA: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the history, from the buffers of a layer, and its mean."""
    local = tl.program_id(1).to(tl.int64)
    row = first_row + local
    P: tl.constexpr = D // 2
    channel, extra = tl.arange(0, D)[None, :], tl.arange(0, EXTRA)[None, :]
    even_a, odd_a = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
    even_b, odd_b = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
    kind: tl.constexpr = k.dtype.element_ty
    for step in range(TILE // M):
        slot = tl.program_id(0) * TILE + step * M + tl.arange(0, M)
        kept, used = slot < num_keep, slot < num_slots
        here = local * num_keep + slot
        at_k = (row * stride_kn + (start_k + slot).to(tl.int64) * stride_kl)[:, None]
        at_v = (row * stride_vn + (start_k + slot).to(tl.int64) * stride_vl)[:, None]
        x = tl.load(new_k + here[:, None] * (D + EXTRA) + channel, mask=kept[:, None], other=0.0)
        tl.store(k + at_k + channel, x, mask=kept[:, None])
        nothing = tl.where(extra == 0, no_key, tl.where(extra == 1, no_key_low, 0.0)).to(kind)
        parts = tl.load(new_k + here[:, None] * (D + EXTRA) + D + extra, mask=kept[:, None], other=0.0)
        tl.store(k + at_k + D + extra, tl.where(kept[:, None], parts, nothing), mask=used[:, None])
        x = tl.load(new_v + here[:, None] * D + channel, mask=kept[:, None], other=0.0)
        tl.store(v + at_v + channel, x, mask=kept[:, None])
        for which in tl.static_range(3):
            at = tl.load(new_position + here * 3 + which, mask=kept, other=0.0)
            tl.store(position + row * stride_pn + slot * 3 + which, at, mask=kept)
        mass = tl.load(new_m + here, mask=kept, other=0)
        tl.store(m + row * stride_mn + slot, mass, mask=used)
        tl.store(weight + row * stride_wn + slot, tl.load(new_weight + here, mask=kept, other=0.0), mask=used)
        tl.store(partner + row * stride_rn + slot, tl.load(new_partner + here, mask=kept, other=-1), mask=used)
        live = mass > 0
        a, b, c, d = unit_pairs(
            new_k, new_k, here * (D + EXTRA), new_position, here * 3, live, axis, frequency, P, M, 0, D, kind
        )
        even_a += in_mean_units(a)
        odd_a += in_mean_units(b)
        even_b += in_mean_units(c)
        odd_b += in_mean_units(d)
    store_mean(mean + row * stride_jn + tl.program_id(0) * D, even_a, odd_a, even_b, odd_b, P, TILE)


def merge(
    history: History, records: Sequence[Tensor], turn_back: TurnBack, room: Room, heads_at_once: int, tile: int
) -> None:
    """Merge pairs and move what survives to the end of the room that is kept; all of it is written.

    Args:
        history: Full, of as many heads as one likes.
        records: v_NLD in the slots of the keys; m_NC, weight_NC, partner_NC of each slot of the history.
        turn_back: RoPE of the model.
        room: How it is made.
        heads_at_once: Heads that are written again together, through a buffer.
        tile: Of the means.
    """
    assert tile <= MOST_AVERAGED
    v, m, weight, partner = records
    values = rows_as_computed(v, history.start, turn_back.head_dim)
    of = StoredHistory(keys_of(history, turn_back.head_dim), values, history.position_NC3, m, weight, partner)
    link = find_links(of, turn_back, room, None, m.shape[0])
    found, heads, device = find_sums(of, turn_back, room, link), m.shape[0], v.device
    buffers = _buffers(history, records, heads_at_once, room.num_keep)
    groups = (heads_at_once, most_groups(room), turn_back.head_dim)
    summed = torch.empty(groups, dtype=torch.int32, device=device)
    for first in range(0, heads, heads_at_once):
        add_rest(of, found, summed, first)
        _move(history, records, turn_back, found, (summed, buffers), first, tile, room.num_listed)


def most_groups(room: Room) -> int:
    """That can get more members than are listed: as many as keys are given up, if one is enough."""
    return max(1, room.num_merges // (room.num_listed + 1))


def add_rest(of: StoredHistory, found: Found, summed: Tensor, first: int) -> None:
    """Add up the values that are not listed.

    Args:
        of: As it is stored.
        found: By `find_sums`.
        summed: Written: int32 [heads, `most_groups`, D].
        first: Of those heads.
    """
    sums, families, v = found.sums, found.families, of.v
    (heads, num_groups, dim), rest = summed.shape, sums.members.rest
    size = num_groups * dim
    _clear_sums[(triton.cdiv(size, _CLEARED_AT_ONCE), heads)](
        summed, sums.members.num_large, first, size, D=dim, M=_CLEARED_AT_ONCE, num_warps=4
    )
    _add_values[(triton.cdiv(rest.shape[1], _ADDED_AT_ONCE), heads)](
        v.x, v.largest, of.weight_NC, sums.share, sums.added, families.head_of, sums.members.number, rest,
        sums.members.num_rest, summed, *v.at, of.weight_NC.stride(0), first, of.m_NC.shape[1], rest.shape[1],
        num_groups, P=dim // 2, M=_ADDED_AT_ONCE, **v.form, num_warps=4,
    )  # fmt: skip


def _buffers(history: History, records: Sequence[Tensor], heads: int, num_keep: int) -> tuple[Tensor, ...]:
    device = history.k_NLW.device
    v, m, weight, partner = records
    likes = history.k_NLW, v, history.position_NC3, m, weight, partner
    return tuple(torch.empty((heads, num_keep, *x.shape[2:]), dtype=x.dtype, device=device) for x in likes)


def _move(
    history: History, records: Sequence[Tensor], turn_back: TurnBack,
    found: Found, to: tuple[Tensor, tuple[Tensor, ...]], first: int, tile: int, listed: int,
) -> None:  # fmt: skip
    """Heads from `first` on, as many as the buffers hold."""
    (source, rank, sums, families), (summed, buffers) = found, to
    k, position, mean = history.k_NLW, history.position_NC3, history.mean_NJD
    v, m, weight, partner = records
    heads, num_keep = buffers[2].shape[:2]
    dim, num, num_groups = turn_back.head_dim, m.shape[1], summed.shape[1]
    extra = k.shape[-1] - dim
    strides = (*k.stride()[:2], *v.stride()[:2], *(x.stride(0) for x in (position, m, weight, partner)))
    _collect[(triton.cdiv(num_keep, 16), heads)](
        k, v, position, m, weight, partner, source, sums.added, sums.joined, sums.members.tally, sums.members.number,
        summed, sums.members.listed, sums.share, families.root, families.head_of, rank, *buffers, *strides,
        history.start, first, num, num_keep, num_groups, dim**0.5, NO_KEY,
        D=dim, EXTRA=extra, M=16, LISTED=listed, num_warps=4,
    )  # fmt: skip
    high = float(torch.tensor(NO_KEY).to(k.dtype))
    _write_again[(mean.shape[1], heads)](
        k, v, position, m, weight, partner, mean, *buffers, turn_back.axis_int32_D, turn_back.frequency_D, *strides,
        mean.stride(0), history.start, first, num, num_keep, high, NO_KEY - high,
        TILE=tile, D=dim, EXTRA=extra, M=min(_WRITTEN_AT_ONCE, tile), num_warps=4,
    )  # fmt: skip

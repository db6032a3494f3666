"""Kernels that make room in a full packed history: codes move as they are, and only what changes is coded anew.

Which keys merge, and all sums, are those of `triton_merge.py`, by the codes themselves: nothing is unpacked before. A
key never changes and its value only where another one joins it; coding again what was decoded would give the same codes
(`table_codes.py`). Codes and records move within the tensors of the layer, so they go through buffers, codes those of a
few heads at a time to save memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.packed_history import PackedLayer
from workers.cache.shrink import Room
from workers.cache.table_codes import LEAST, LIMITS
from workers.cache.table_layout import NO_KEY, TableSettings
from workers.cache.triton_merge import (
    VALUE_UNITS,
    Found,
    add_rest,
    find_sums,
    in_units,
    most_groups,
    partner_of_group,
    store_log_mass,
    total_weight,
)
from workers.cache.triton_pack import store_codes, vector_shape
from workers.cache.triton_rows import (
    MOST_AVERAGED,
    StoredHistory,
    coded_history,
    in_mean_units,
    load_halves,
    store_mean,
    unit_pairs,
)
from workers.cache.unrotated import TurnBack

_SUMMED_BYTES = 3 * 10**8
"""Of the sums of values of all heads; beyond, some heads are collected after the others."""
_MOVED_BYTES = 8 * 10**7
"""Of codes that move together, those of one head at least."""
_MOVED_AT_ONCE = 64
_AVERAGED_AT_ONCE = 16
"""Groups whose values become means."""
_TURNED_AT_ONCE = 16
"""Keys of a tile that are turned back together: with 32 a program of 4 warps takes 167 registers."""
_RECORDS_AT_ONCE = 512


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mean(value, share, others, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Own share and those of others, rounded as in a workspace; float32."""
    return tl.fma(value, share, others.to(tl.float32) / VALUE_UNITS).to(KIND).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_sums(summed, group, there, D: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of sums [M, runs, RUN], or twice the whole."""
    HALF: tl.constexpr = D // HALVES
    channel = tl.arange(0, HALF // RUN)[None, :, None] * RUN + tl.arange(0, RUN)[None, None, :]
    at, there = group.to(tl.int64)[:, None, None] * D + channel, there[:, None, None]
    first = tl.load(summed + at, mask=there, other=0)
    second = first
    if HALVES == 2:
        second = tl.load(summed + at + HALF, mask=there, other=0)
    return first, second


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mean_values(  # type: ignore[no-untyped-def]
    v, largest, tally, number, summed, member, share, own, total, slot, is_key, num_groups,
    D: tl.constexpr, M: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr, LISTED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Both halves of the means of the groups of some slots; pointers are those of their head."""
    BYTES: tl.constexpr = D // 2 if BITS == 4 else D
    count = tl.load(tally + slot, mask=is_key, other=0)
    has_rest = is_key & (count > LISTED)
    group = tl.load(number + slot, mask=has_rest, other=0)
    own_first, own_second = load_halves(
        v, largest, slot.to(tl.int64) * BYTES, is_key, D, M, HALVES, BITS, GROUP, KIND
    )  # fmt: skip
    first, second = _load_sums(summed, group, has_rest & (group < num_groups), D, RUN, HALVES)
    most = tl.maximum(total, 1e-30)
    # Most groups have one member, few as many as are listed.
    for which in range(tl.minimum(tl.max(tl.where(is_key, count, 0), 0), LISTED)):
        there = is_key & (count > which)
        of = tl.load(member + slot * LISTED + which, mask=there, other=0)
        part = (tl.load(share + of, mask=there, other=0.0) / most * VALUE_UNITS)[:, None, None]
        a, b = load_halves(v, largest, of.to(tl.int64) * BYTES, there, D, M, HALVES, BITS, GROUP, KIND)
        first += in_units(a, part)
        second += in_units(b, part)
    share_of_own = (own / most)[:, None, None]
    return _mean(own_first, share_of_own, first, KIND), _mean(own_second, share_of_own, second, KIND)


@triton.jit(do_not_specialize=["first_head"])  # type: ignore[untyped-decorator, unused-ignore]
def average_groups(  # type: ignore[no-untyped-def]
    v, v_largest, weight, added, tally, number, summed, member, share, rank, groups, num_group, to, to_largest,
    first_head, history_slots, num_slots, num_keep, num_groups, num_most, limit, least,
    D: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
    M: tl.constexpr, LISTED: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: values of M groups of a head that somebody joins, as codes. Compiled to fuse only what says so."""
    local = tl.program_id(1).to(tl.int64)
    head = first_head + local
    count = tl.load(num_group + head)
    if tl.program_id(0) * M < count:
        listed = tl.program_id(0) * M + tl.arange(0, M)
        is_key = listed < count
        slot = tl.load(groups + head * num_most + listed, mask=is_key, other=0)
        mine, held = head * num_slots, head * history_slots
        own, total = total_weight(weight + held, added + mine, slot, is_key)
        BYTES: tl.constexpr = D // 2 if BITS == 4 else D
        first, second = _mean_values(
            v + held * BYTES, v_largest + held * (D // GROUP), tally + mine, number + mine,
            summed + local * num_groups * D, member + mine * LISTED, share + mine, own, total, slot, is_key, num_groups,
            D, M, RUN, HALVES, LISTED, BITS, GROUP, KIND,
        )  # fmt: skip
        shift = num_keep - tl.load(rank + mine + num_slots - 1) - 1
        place = tl.load(rank + mine + slot, mask=is_key, other=0) + shift
        store_codes(
            first, second, to, to_largest, local * num_keep + place, is_key & (place >= 0), limit, least,
            D, GROUP, RUN, HALVES,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _move_rows(of, to, at_of, at_to, is_key, inside, nothing, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    channel = tl.arange(0, WIDTH)[None, :]
    x = tl.load(of + at_of[:, None] * WIDTH + channel, mask=is_key[:, None], other=nothing)
    tl.store(to + at_to[:, None] * WIDTH + channel, x, mask=inside[:, None])


@triton.jit(do_not_specialize=["first_head", "first_of", "first_to"])  # type: ignore[untyped-decorator, unused-ignore]
def move_codes(  # type: ignore[no-untyped-def]
    k_code, k_largest, v_code, v_largest, to_k_code, to_k_largest, to_v_code, to_v_largest, source,
    first_head, first_of, first_to, slots_of, slots_to, num_keep, CODE_OF_0: tl.constexpr,
    BYTES: tl.constexpr, GROUPS: tl.constexpr, M: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """One program: M slots of a head, from where they were, or as they lie; zero where no key goes."""
    place = tl.program_id(0) * M + tl.arange(0, M)
    local = tl.program_id(1).to(tl.int64)
    inside = place < num_keep
    slot, there = place, inside
    if GATHERS:
        slot = tl.load(source + (first_head + local) * num_keep + place, mask=inside, other=-1)
        there = slot >= 0
    at_of, at_to = (first_of + local) * slots_of + slot, (first_to + local) * slots_to + place
    _move_rows(k_code, to_k_code, at_of, at_to, there, inside, CODE_OF_0, BYTES)
    _move_rows(v_code, to_v_code, at_of, at_to, there, inside, CODE_OF_0, BYTES)
    _move_rows(k_largest, to_k_largest, at_of, at_to, there, inside, 0.0, GROUPS)
    _move_rows(v_largest, to_v_largest, at_of, at_to, there, inside, 0.0, GROUPS)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def collect_records(  # type: ignore[no-untyped-def]
    position, m, weight, partner, apart, log_mass, source, added, joined, root, head_of, rank,
    new_position, new_m, new_weight, new_partner, new_apart,
    history_slots, num_slots, num_keep, root_dim, no_key, M: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One program: records of M slots of a head as they will be, into buffers; log m at once."""
    place = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    inside = place < num_keep
    slot = tl.load(source + head * num_keep + place, mask=inside, other=-1)
    is_key = slot >= 0
    mine, held = head * num_slots, head * history_slots
    _, total = total_weight(weight + held, added + mine, slot, is_key)
    store_log_mass(log_mass + (held + place) * 2, total, is_key, inside, root_dim, no_key, 2)
    out = head * num_keep + place
    for axis in tl.static_range(3):
        at_p = tl.load(position + (held + slot) * 3 + axis, mask=is_key, other=0.0)
        tl.store(new_position + out * 3 + axis, at_p, mask=inside)
    more = tl.load(joined + mine + slot, mask=is_key, other=0)
    tl.store(new_m + out, tl.load(m + held + slot, mask=is_key, other=0) + more, mask=inside)
    tl.store(new_weight + out, tl.where(is_key, total, 0.0), mask=inside)
    shift = num_keep - tl.load(rank + mine + num_slots - 1) - 1
    older = partner_of_group(partner + held, root + mine, head_of + mine, rank + mine, slot, is_key, shift)
    tl.store(new_partner + out, older, mask=inside)
    if APART:
        # Of a key that follows no other one and whose partner stays.
        own_partner = tl.load(partner + held + slot, mask=is_key, other=-1)
        stays = is_key & (own_partner >= 0) & (tl.load(root + mine + slot, mask=is_key, other=-1) == slot)
        stays &= tl.load(head_of + mine + own_partner, mask=stays, other=-1) == own_partner
        tl.store(new_apart + out, tl.load(apart + held + slot, mask=stays, other=-1.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def write_records(  # type: ignore[no-untyped-def]
    position, m, weight, partner, apart, log_mass, new_position, new_m, new_weight, new_partner, new_apart,
    history_slots, num_slots, num_keep, no_key, no_key_low, M: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One program: records of M slots of a head, from the buffers."""
    slot = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    kept, used = slot < num_keep, slot < num_slots
    here, there = head * num_keep + slot, head * history_slots + slot
    for which in tl.static_range(3):
        at = tl.load(new_position + here * 3 + which, mask=kept, other=0.0)
        tl.store(position + there * 3 + which, at, mask=kept)
    tl.store(m + there, tl.load(new_m + here, mask=kept, other=0), mask=used)
    tl.store(weight + there, tl.load(new_weight + here, mask=kept, other=0.0), mask=used)
    tl.store(partner + there, tl.load(new_partner + here, mask=kept, other=-1), mask=used)
    if APART:
        tl.store(apart + there, tl.load(new_apart + here, mask=kept, other=-1.0), mask=used)
    # Codes of free slots may stay: there is no key by their log m.
    part = tl.arange(0, 2)[None, :]
    nothing = tl.where(part == 0, no_key, no_key_low).to(log_mass.dtype.element_ty)
    tl.store(log_mass + there[:, None] * 2 + part, nothing, mask=(used & (kept == 0))[:, None])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def average_tiles(  # type: ignore[no-untyped-def]
    k, largest, position, m, mean, axis, frequency, history_slots,
    TILE: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: the mean of a tile of a head."""
    BYTES: tl.constexpr = P if BITS == 4 else 2 * P
    even_a, odd_a = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
    even_b, odd_b = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
    first = tl.program_id(1).to(tl.int64) * history_slots + tl.program_id(0) * TILE
    for step in range(TILE // M):
        slot = first + step * M + tl.arange(0, M)
        live = tl.load(m + slot) > 0
        a, b, c, d = unit_pairs(
            k, largest, slot * BYTES, position, slot * 3, live, axis, frequency, P, M, BITS, GROUP, KIND
        )
        # Those of slots without a key are 0.
        even_a += in_mean_units(a)
        odd_a += in_mean_units(b)
        even_b += in_mean_units(c)
        odd_b += in_mean_units(d)
    store_mean(mean + first // TILE * (2 * P), even_a, odd_a, even_b, odd_b, P, TILE)


def merge_into_codes(to: PackedLayer, turn_back: TurnBack, room: Room, s: TableSettings) -> None:
    """`merge` of `triton_merge.py` for a packed layer: codes and records of its history are read and written.

    Args:
        to: Full.
        turn_back: RoPE of the model.
        room: How it is made.
        s: Sizes.
    """
    assert s.tile <= MOST_AVERAGED
    of, num, num_keep = coded_history(to, s), s.history_tokens, room.num_keep
    apart = to.weight_NC if to.apart_NC is None else to.apart_NC
    records = to.position_NC3, to.m_NC, to.weight_NC, to.partner_NC, apart
    written = *records, to.mass_NC2
    assert all(x.is_contiguous() for x in (*written, to.mean_NJD))
    found = find_sums(of, turn_back, room, None if to.apart_NC is None else to.apart_NC[:, :num])
    heads = s.num_heads
    buffers = tuple(torch.empty((heads, num_keep, *x.shape[2:]), dtype=x.dtype, device=x.device) for x in records)
    sums, families, slots = found.sums, found.families, (s.history_slots, num, num_keep)
    collect_records[(triton.cdiv(num_keep, _RECORDS_AT_ONCE), heads)](
        *written, found.source, sums.added, sums.joined, families.root, families.head_of, found.rank, *buffers,
        *slots, s.head_dim**0.5, NO_KEY, M=_RECORDS_AT_ONCE, APART=to.apart_NC is not None, num_warps=4,
    )  # fmt: skip
    _move_codes(of, found, room, to, s)
    high = float(torch.tensor(NO_KEY).to(to.mass_NC2.dtype))
    write_records[(triton.cdiv(num, _RECORDS_AT_ONCE), heads)](
        *written, *buffers, *slots, high, NO_KEY - high,
        M=_RECORDS_AT_ONCE, APART=to.apart_NC is not None, num_warps=4,
    )  # fmt: skip
    average_tiles[(s.history_slots // s.tile, heads)](
        of.k.x, of.k.largest, to.position_NC3, to.m_NC, to.mean_NJD, turn_back.axis_int32_D, turn_back.frequency_D,
        s.history_slots, TILE=s.tile, P=s.head_dim // 2, M=min(_TURNED_AT_ONCE, s.tile), **of.k.form, num_warps=4,
    )  # fmt: skip


def _move_codes(of: StoredHistory, found: Found, room: Room, to: PackedLayer, s: TableSettings) -> None:
    """To where they go, some heads after the others; values that change on the way. Records are still as they were."""
    codes = to.k_code_NCB, to.k_largest_NCG, to.v_code_NCB, to.v_largest_NCG
    assert all(x.is_contiguous() for x in codes)
    heads, num_keep = found.source.shape
    of_head, num_groups = num_keep * sum(x.shape[2] * x.itemsize for x in codes), most_groups(room)
    at_once = min(_MOVED_BYTES // of_head, _SUMMED_BYTES // (num_groups * s.head_dim * 4))
    at_once = min(heads, max(1, at_once))
    buffers = [x.new_empty((at_once, num_keep, x.shape[2])) for x in codes]
    summed = torch.empty((at_once, num_groups, s.head_dim), dtype=torch.int32, device=found.source.device)
    sizes = {"BYTES": codes[0].shape[2], "GROUPS": codes[1].shape[2], "M": _MOVED_AT_ONCE}
    sizes["CODE_OF_0"] = 0x88 if s.storage == "int4" else 0
    for first in range(0, heads, at_once):
        some = min(at_once, heads - first)
        grid = triton.cdiv(num_keep, _MOVED_AT_ONCE), some
        move_codes[grid](
            *codes, *buffers, found.source, first, first, 0, s.history_slots, num_keep, num_keep,
            **sizes, GATHERS=True, num_warps=4,
        )  # fmt: skip
        add_rest(of, found, summed[:some], first)
        _average_groups(of, found, summed[:some], first, room, (buffers[2], buffers[3]), s)
        move_codes[grid](
            *buffers, *codes, found.source, first, 0, first, num_keep, s.history_slots, num_keep,
            **sizes, GATHERS=False, num_warps=4,
        )  # fmt: skip


def _average_groups(
    of: StoredHistory, found: Found, summed: Tensor, first: int, room: Room, to: tuple[Tensor, Tensor], s: TableSettings
) -> None:
    """Values that change, of as many heads as there are sums: into buffers where the others are already."""
    assert s.storage != "model"
    v, sums, members = of.v, found.sums, found.sums.members
    average_groups[(triton.cdiv(members.group.shape[1], _AVERAGED_AT_ONCE), summed.shape[0])](
        v.x, v.largest, of.weight_NC, sums.added, members.tally, members.number, summed, members.listed, sums.share,
        found.rank, members.group, members.num_group, *to, first, s.history_slots, of.m_NC.shape[1], room.num_keep,
        summed.shape[1], members.group.shape[1], float(LIMITS[s.storage]), LEAST, **vector_shape(s, s.storage),
        M=_AVERAGED_AT_ONCE, LISTED=room.num_listed, BITS=v.form["BITS"], KIND=v.form["KIND"],
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip

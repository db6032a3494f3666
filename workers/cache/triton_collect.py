"""Kernels that make room in a full packed history: codes move as they are, and only what changes is coded anew.

Which keys merge, and all sums, are those of `triton_merge.py`. A key never changes and its value only where another one
joins it; coding again what was decoded would give the same codes (`table_codes.py`). Codes and records move within the
tensors of the layer, so they go through buffers, codes those of a few heads at a time to save memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.packed_history import PackedLayer
from workers.cache.partners import History
from workers.cache.shrink import Room
from workers.cache.table_codes import LEAST, LIMITS
from workers.cache.table_layout import NO_KEY, TableSettings
from workers.cache.triton_match import ROWS, unit_halves
from workers.cache.triton_merge import (
    VALUE_UNITS,
    Found,
    add_rest,
    find_sums,
    most_groups,
    partner_of_group,
    store_log_mass,
    total_weight,
)
from workers.cache.triton_pack import store_codes, vector_shape
from workers.cache.unrotated import TurnBack

_SUMMED_BYTES = 3 * 10**8
"""Of the sums of values of all heads; beyond, some heads are collected after the others."""
_MOVED_BYTES = 8 * 10**7
"""Of codes that move together, those of one head at least."""
_MOVED_AT_ONCE = 64
_AVERAGED_AT_ONCE = 16
_RECORDS_AT_ONCE = 512


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_halves(x, at, there, HALF: tl.constexpr, HALVES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Channels at these places [M, runs, RUN] and those half a vector behind, or again the first where it is whole."""
    first = tl.load(x + at, mask=there[:, None, None], other=0)
    second = first
    if HALVES == 2:
        second = tl.load(x + at + HALF, mask=there[:, None, None], other=0)
    return first, second


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _in_units(value, part):  # type: ignore[no-untyped-def]
    """As in `triton_merge.py`, where product and sum are fused."""
    return tl.floor(tl.fma(value.to(tl.float32), part[:, None, None], 0.5)).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mean(value, share, others):  # type: ignore[no-untyped-def]
    """Own share and those of others, fused as in `triton_merge.py` and rounded as in the workspace; float32."""
    mean = tl.fma(value.to(tl.float32), share[:, None, None], others.to(tl.float32) / VALUE_UNITS)
    return mean.to(value.dtype).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mean_values(  # type: ignore[no-untyped-def]
    v, tally, number, summed, member, share, own, total, slot, is_key, num_groups, channel,
    D: tl.constexpr, HALVES: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Both halves of the means of the groups of some slots; pointers are those of their head."""
    HALF: tl.constexpr = D // HALVES
    count = tl.load(tally + slot, mask=is_key, other=0)
    has_rest = is_key & (count > LISTED)
    group = tl.load(number + slot, mask=has_rest, other=0)
    at_sum = group.to(tl.int64)[:, None, None] * D + channel
    own_first, own_second = _load_halves(v, slot.to(tl.int64)[:, None, None] * D + channel, is_key, HALF, HALVES)
    first, second = _load_halves(summed, at_sum, has_rest & (group < num_groups), HALF, HALVES)
    most = tl.maximum(total, 1e-30)
    for which in tl.static_range(LISTED):
        there = is_key & (count > which)
        of = tl.load(member + slot * LISTED + which, mask=there, other=0)
        part = tl.load(share + of, mask=there, other=0.0) / most * VALUE_UNITS
        a, b = _load_halves(v, of.to(tl.int64)[:, None, None] * D + channel, there, HALF, HALVES)
        first += _in_units(a, part)
        second += _in_units(b, part)
    return _mean(own_first, own / most, first), _mean(own_second, own / most, second)


@triton.jit(do_not_specialize=["first_head"])  # type: ignore[untyped-decorator, unused-ignore]
def average_groups(  # type: ignore[no-untyped-def]
    v, weight, added, tally, number, summed, member, share, rank, groups, num_group, v_code, v_largest,
    first_head, start_k, table_slots, history_slots, num_slots, num_keep, num_groups, num_most, limit, least,
    D: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
    M: tl.constexpr, LISTED: tl.constexpr,
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
        HALF: tl.constexpr = D // HALVES
        channel = tl.arange(0, HALF // RUN)[None, :, None] * RUN + tl.arange(0, RUN)[None, None, :]
        first, second = _mean_values(
            v + (head * table_slots + start_k) * D, tally + mine, number + mine, summed + local * num_groups * D,
            member + mine * LISTED, share + mine, own, total, slot, is_key, num_groups, channel, D, HALVES, LISTED,
        )  # fmt: skip
        shift = num_keep - tl.load(rank + mine + num_slots - 1) - 1
        place = tl.load(rank + mine + slot, mask=is_key, other=0) + shift
        store_codes(
            first, second, v_code, v_largest, held + place, is_key & (place >= 0), limit, least,
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
    k, position, m, mean, source, axis, frequency, start_k, table_slots, history_slots, num_keep,
    TILE: tl.constexpr, D: tl.constexpr, EXTRA: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program: the mean of a tile of the history as it will be, from keys where they were. Records are buffers."""
    head = tl.program_id(1).to(tl.int64)
    P: tl.constexpr = D // 2
    summed = tl.zeros([P, 2], tl.float32)
    kind = k.dtype.element_ty
    row = head * table_slots + start_k
    for step in range(TILE // M):
        slot = tl.program_id(0) * TILE + step * M + tl.arange(0, M)
        here = head * num_keep + slot
        live = tl.load(m + here, mask=slot < num_keep, other=0) > 0
        at_k = (row + tl.load(source + here, mask=live, other=0)) * (D + EXTRA)
        even, odd = unit_halves(k, at_k, position, here * 3, live, axis, frequency, P, M)
        # Those of slots without a key are 0.
        summed += tl.sum(tl.join(even, odd).to(kind).to(tl.float32), 0)
    at = mean + (head * (history_slots // TILE) + tl.program_id(0)) * D
    channel = 2 * tl.arange(0, P)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(at + channel, (summed / TILE).to(mean.dtype.element_ty))


def merge_into_codes(
    history: History, records: Sequence[Tensor], turn_back: TurnBack, room: Room, to: PackedLayer, s: TableSettings
) -> None:
    """`merge` of `triton_merge.py` for a packed table: of the history, only codes and records are written.

    Args:
        history: Full, laid out in the workspace.
        records: As of `merge`: values lie in the workspace, the others in the layer.
        turn_back: RoPE of the model.
        room: How it is made.
        to: The layer.
        s: Sizes.
    """
    assert s.storage != "model"
    k, position = history.k_NLW, history.position_NC3
    _, m, weight, partner = records
    apart = to.weight_NC if to.apart_NC is None else to.apart_NC
    written = to.position_NC3, to.m_NC, to.weight_NC, to.partner_NC, apart, to.mass_NC2
    assert all(x.is_contiguous() for x in (k, *written, to.mean_NJD))
    (heads, num), num_keep = m.shape, room.num_keep
    found = find_sums(history, records, turn_back, room, None if to.apart_NC is None else to.apart_NC[:, :num])
    likes = position, m, weight, partner, apart
    buffers = tuple(torch.empty((heads, num_keep, *x.shape[2:]), dtype=x.dtype, device=x.device) for x in likes)
    sums, families, slots = found.sums, found.families, (s.history_slots, num, num_keep)
    collect_records[(triton.cdiv(num_keep, _RECORDS_AT_ONCE), heads)](
        *written, found.source, sums.added, sums.joined, families.root, families.head_of, found.rank, *buffers,
        *slots, s.head_dim**0.5, NO_KEY, M=_RECORDS_AT_ONCE, APART=to.apart_NC is not None, num_warps=4,
    )  # fmt: skip
    _move_codes(to, found.source, s)
    _average_groups(history, records, found, room, to, s)
    average_tiles[(s.history_slots // s.tile, heads)](
        k, *buffers[:2], to.mean_NJD, found.source, turn_back.axis_int32_D, turn_back.frequency_D,
        history.start, k.shape[1], s.history_slots, num_keep,
        TILE=s.tile, D=s.head_dim, EXTRA=s.width - s.head_dim, M=min(ROWS, s.tile), num_warps=4, maxnreg=80,
    )  # fmt: skip
    high = float(torch.tensor(NO_KEY).to(k.dtype))
    write_records[(triton.cdiv(num, _RECORDS_AT_ONCE), heads)](
        *written, *buffers, *slots, high, NO_KEY - high,
        M=_RECORDS_AT_ONCE, APART=to.apart_NC is not None, num_warps=4,
    )  # fmt: skip


def _move_codes(to: PackedLayer, source: Tensor, s: TableSettings) -> None:
    """To where they go, some heads after the others."""
    codes = to.k_code_NCB, to.k_largest_NCG, to.v_code_NCB, to.v_largest_NCG
    assert all(x.is_contiguous() for x in codes)
    heads, num_keep = source.shape
    of_head = num_keep * sum(x.shape[2] * x.itemsize for x in codes)
    at_once = min(heads, max(1, _MOVED_BYTES // of_head))
    buffers = [x.new_empty((at_once, num_keep, x.shape[2])) for x in codes]
    sizes = {"BYTES": codes[0].shape[2], "GROUPS": codes[1].shape[2], "M": _MOVED_AT_ONCE}
    sizes["CODE_OF_0"] = 0x88 if s.storage == "int4" else 0
    for first in range(0, heads, at_once):
        grid = triton.cdiv(num_keep, _MOVED_AT_ONCE), min(at_once, heads - first)
        move_codes[grid](
            *codes, *buffers, source, first, first, 0, s.history_slots, num_keep, num_keep,
            **sizes, GATHERS=True, num_warps=4,
        )  # fmt: skip
        move_codes[grid](
            *buffers, *codes, source, first, 0, first, num_keep, s.history_slots, num_keep,
            **sizes, GATHERS=False, num_warps=4,
        )  # fmt: skip


def _average_groups(
    history: History, records: Sequence[Tensor], found: Found, room: Room, to: PackedLayer, s: TableSettings
) -> None:
    """Values that change; records of the layer are still those before the merge, codes have moved."""
    assert s.storage != "model"
    (v, m, weight, _), sums, members = records, found.sums, found.sums.members
    (heads, num), num_groups, listed = m.shape, most_groups(room), room.num_listed
    assert v.is_contiguous()
    at_once = min(heads, max(1, _SUMMED_BYTES // (num_groups * s.head_dim * 4)))
    summed = torch.empty((at_once, num_groups, s.head_dim), dtype=torch.int32, device=v.device)
    for first in range(0, heads, at_once):
        some = min(at_once, heads - first)
        add_rest(history, records, found, summed[:some], first)
        average_groups[(triton.cdiv(members.group.shape[1], _AVERAGED_AT_ONCE), some)](
            v, weight, sums.added, members.tally, members.number, summed, members.listed, sums.share, found.rank,
            members.group, members.num_group, to.v_code_NCB, to.v_largest_NCG,
            first, history.start, v.shape[1], s.history_slots, num, room.num_keep, num_groups, members.group.shape[1],
            float(LIMITS[s.storage]), LEAST, **vector_shape(s, s.storage),
            M=_AVERAGED_AT_ONCE, LISTED=listed, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip

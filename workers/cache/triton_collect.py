"""Kernels that make room in a full packed history: codes move as they are, and only what changes is coded anew.

Which keys merge, and all sums, are those of `triton_merge.py`, by the codes themselves: nothing is unpacked before. A
key never changes and its value only where another one joins it; coding again what was decoded would give the same codes
(`table_codes.py`). Codes and records move within the tensors of the layer without a buffer: what stays goes to
an earlier slot if to another one at all, and a program writes where others have read. It also makes the mean of its
tile: some programs wait for memory while others calculate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache.average_rows import average_rows
from workers.cache.move_rows import can_move, move_rows
from workers.cache.packed_history import PackedLayer, heads_of
from workers.cache.row_distances import fits
from workers.cache.shrink import Room
from workers.cache.table_codes import LEAST, LIMITS
from workers.cache.table_layout import NO_KEY, TableSettings
from workers.cache.triton_families import find_links
from workers.cache.triton_merge import (
    VALUE_UNITS,
    add_rest,
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
    load_places,
    store_mean,
    unit_pairs,
)
from workers.cache.triton_sums import Found, find_sums
from workers.cache.unrotated import TurnBack

_SUMMED_BYTES = 3 * 10**8
"""Of the sums of values of all heads; beyond, some heads are collected after the others."""
_CHOSEN_AT_ONCE = 3
"""Layers whose links are chosen together, which takes 12 bytes of each slot."""
_AVERAGED_AT_ONCE = 16
"""Groups whose values become means."""
_TURNED_AT_ONCE = 16
"""Keys of a tile that are turned back together: with 32 a program of 4 warps takes 167 registers."""
_MOVE_REGISTERS = 80
"""Of a thread of the move: so more programs wait for memory while others calculate means."""


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
    v, v_largest, weight, added, tally, number, summed, member, share, groups, num_group,
    first_head, history_slots, num_slots, num_groups, num_most, limit, least,
    D: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
    M: tl.constexpr, LISTED: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: values of M groups of a head that somebody joins, as codes, in place.

    Nobody else reads that slot or those of the members. Compiled to fuse only what says so.
    """
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
        store_codes(first, second, v, v_largest, held + slot, is_key, limit, least, D, GROUP, RUN, HALVES)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_rows(x, at, there, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(x + at[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], mask=there[:, None], other=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_rows(x, at, rows, there, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + at[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], rows, mask=there[:, None])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store_position(at, place, there):  # type: ignore[no-untyped-def]
    time, line, column = place
    tl.store(at, time, mask=there)
    tl.store(at + 1, line, mask=there)
    tl.store(at + 2, column, mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _known_distance(apart, partner, root, head_of, slot, is_key):  # type: ignore[no-untyped-def]
    """Of a key that follows no other one and whose partner stays, else -1; pointers are those of its head."""
    own_partner = tl.load(partner + slot, mask=is_key, other=-1)
    stays = is_key & (own_partner >= 0) & (tl.load(root + slot, mask=is_key, other=-1) == slot)
    stays &= tl.load(head_of + own_partner, mask=stays, other=-1) == own_partner
    return tl.load(apart + slot, mask=stays, other=-1.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _wait_for_readers(is_read, first, stop, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until all of these programs have read; they were begun before this one and wait for nobody until then."""
    reader = first + tl.arange(0, MOST)
    num_waited_for = stop - first
    while num_waited_for > 0:
        flag = tl.load(is_read + reader, mask=reader < stop, other=1, volatile=True)
        num_waited_for = tl.sum((flag == 0).to(tl.int32), 0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mean_of_tile(  # type: ignore[no-untyped-def]
    k, largest, position, m, mean, axis, frequency, first,
    TILE: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Of the tile that begins with this slot, counted over all heads."""
    BYTES: tl.constexpr = P if BITS == 4 else 2 * P
    even_a, odd_a = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
    even_b, odd_b = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
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


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def move_history(  # type: ignore[no-untyped-def]
    k_code, k_largest, v_code, v_largest, position, m, weight, partner, apart, log_mass, old_partner,
    source, added, joined, root, head_of, rank, is_read, heads, history_slots, num_slots, num_keep, root_dim, no_key,
    k, largest, mean, axis, frequency,
    CODES: tl.constexpr, LARGEST: tl.constexpr, MOST: tl.constexpr, APART: tl.constexpr,
    TILE: tl.constexpr, P: tl.constexpr, TURNED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One program: a tile of a head as it will be, in place, and its mean.

    No key goes to a later slot, so these slots are where keys of no programs but earlier ones come from: when those
    have read, they may be written. Programs are counted as they begin, so the earlier ones run already.
    """
    pieces = history_slots // TILE
    nth = tl.atomic_add(is_read + heads * pieces, 1, sem="relaxed")
    piece, head = nth // heads, (nth % heads).to(tl.int64)
    place = piece * TILE + tl.arange(0, TILE)
    kept, used = place < num_keep, place < num_slots
    slot = tl.load(source + head * num_keep + place, mask=kept, other=-1)
    is_key = slot >= 0
    mine, held = head * num_slots, head * history_slots
    k_rows, k_most = _load_rows(k_code, held + slot, is_key, CODES), _load_rows(k_largest, held + slot, is_key, LARGEST)
    v_rows, v_most = _load_rows(v_code, held + slot, is_key, CODES), _load_rows(v_largest, held + slot, is_key, LARGEST)
    place_of_key = load_places(position, (held + slot) * 3, is_key)
    mass = tl.load(m + held + slot, mask=is_key, other=0) + tl.load(joined + mine + slot, mask=is_key, other=0)
    _, total = total_weight(weight + held, added + mine, slot, is_key)
    shift = num_keep - tl.load(rank + mine + num_slots - 1) - 1
    older = partner_of_group(old_partner + mine, root + mine, head_of + mine, rank + mine, slot, is_key, shift)
    distance = older.to(tl.float32)
    if APART:
        distance = _known_distance(apart + held, old_partner + mine, root + mine, head_of + mine, slot, is_key)
    # The first key of these slots goes there, or further behind.
    first = tl.load(rank + mine + tl.minimum(piece * TILE, num_slots - 1)) + shift
    # Loads of all threads come before what others write who see the flag: barrier, release, look.
    tl.debug_barrier()
    tl.atomic_xchg(is_read + head * pieces + piece, 1, sem="release")
    _wait_for_readers(is_read + head * pieces, tl.maximum(first, 0) // TILE, piece, MOST)
    here = held + place
    _store_rows(k_code, here, k_rows, kept, CODES)
    _store_rows(k_largest, here, k_most, kept, LARGEST)
    _store_rows(v_code, here, v_rows, kept, CODES)
    _store_rows(v_largest, here, v_most, kept, LARGEST)
    _store_position(position + here * 3, place_of_key, kept)
    # Codes of free slots may stay: there is no key by their log m.
    tl.store(m + here, mass, mask=used)
    tl.store(weight + here, tl.where(is_key, total, 0.0), mask=used)
    tl.store(partner + here, older, mask=used)
    if APART:
        tl.store(apart + here, distance, mask=used)
    store_log_mass(log_mass + here * 2, total, is_key, used, root_dim, no_key, 2)
    if piece * TILE < num_keep:
        # Codes and records are read again, from where other threads wrote them.
        tl.debug_barrier()
        _mean_of_tile(
            k, largest, position, m, mean, axis, frequency, held + piece * TILE, TILE, P, TURNED, BITS, GROUP, KIND
        )
    else:  # no key is left
        channel = tl.arange(0, 2 * P)
        nothing = tl.zeros([2 * P], tl.float32).to(mean.dtype.element_ty)
        tl.store(mean + (held // TILE + piece) * (2 * P) + channel, nothing)


def merge_into_codes(to: PackedLayer, turn_back: TurnBack, room: Room, s: TableSettings) -> None:
    """`merge` of `triton_merge.py` for packed layers: codes and records of their histories are read and written.

    What merges is chosen for some layers in one go, and then layers are written one by one: buffers of what is given up
    are those of one layer.

    Args:
        to: One layer or several side by side, full: as many keys stay as there are slots to keep, or more, so that none
            goes to a later slot.
        turn_back: RoPE of the model.
        room: How it is made.
        s: Sizes.
    """
    at_once = _CHOSEN_AT_ONCE * s.num_heads
    for start in range(0, len(to.m_NC), at_once):
        some = heads_of(to, slice(start, start + at_once))
        known = None if some.apart_NC is None else some.apart_NC[:, : s.history_tokens]
        links = find_links(coded_history(some, s), turn_back, room, known, s.num_heads)
        for first in range(0, len(links), s.num_heads):
            run = slice(first, first + s.num_heads)
            _merge_linked(heads_of(some, run), turn_back, room, s, links[run])


def _merge_linked(to: PackedLayer, turn_back: TurnBack, room: Room, s: TableSettings, link: Tensor) -> None:
    """One layer, by its links."""
    assert s.tile <= MOST_AVERAGED
    of, num_groups = coded_history(to, s), most_groups(room)
    found = find_sums(of, turn_back, room, link)
    at_once = min(s.num_heads, max(1, _SUMMED_BYTES // (num_groups * s.head_dim * 4)))
    summed = torch.empty((at_once, num_groups, s.head_dim), dtype=torch.int32, device=to.m_NC.device)
    for first in range(0, s.num_heads, at_once):
        some = summed[: s.num_heads - first]
        add_rest(of, found, some, first)
        if fits(of.v, turn_back):
            sums = found.sums
            average_rows(of, sums.members, sums.share, sums.added, some, first)
        else:
            _average_groups(of, found, some, first, room, s)
    _move(of, found, turn_back, to, s)


def _average_groups(of: StoredHistory, found: Found, summed: Tensor, first: int, room: Room, s: TableSettings) -> None:
    """Values that change, of as many heads as there are sums: in the slots that stand for their groups."""
    assert s.storage != "model"
    v, sums, members = of.v, found.sums, found.sums.members
    average_groups[(triton.cdiv(members.group.shape[1], _AVERAGED_AT_ONCE), summed.shape[0])](
        v.x, v.largest, of.weight_NC, sums.added, members.tally, members.number, summed, members.listed, sums.share,
        members.group, members.num_group, first, s.history_slots, of.m_NC.shape[1],
        summed.shape[1], members.group.shape[1], float(LIMITS[s.storage]), LEAST, **vector_shape(s, s.storage),
        M=_AVERAGED_AT_ONCE, LISTED=room.num_listed, BITS=v.form["BITS"], KIND=v.form["KIND"],
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _move(of: StoredHistory, found: Found, turn_back: TurnBack, to: PackedLayer, s: TableSettings) -> None:
    """Codes and records, to where they go, and means of tiles.

    By CUDA where that can: the kernel below is bound by how many instructions it takes.
    """
    codes = to.k_code_NCB, to.k_largest_NCG, to.v_code_NCB, to.v_largest_NCG
    apart = to.weight_NC if to.apart_NC is None else to.apart_NC
    records = to.position_NC3, to.m_NC, to.weight_NC, to.partner_NC, apart, to.mass_NC2
    assert all(x.is_contiguous() for x in (*codes, *records, to.mean_NJD))
    num_keep, sums, families = found.source.shape[1], found.sums, found.families
    old_partner = of.partner_NC.clone(memory_format=torch.contiguous_format)
    listed = old_partner, found.source, sums.added, sums.joined, families.root, families.head_of, found.rank
    sizes = s.num_heads, s.history_slots, s.history_tokens, num_keep
    if can_move(of, turn_back, s):
        known = *records[:4], to.apart_NC, to.mass_NC2
        move_rows(codes, known, listed, to.mean_NJD, turn_back, sizes, s.head_dim**0.5, NO_KEY)
        return
    words = [_in_words(x) for x in codes]
    pieces = s.history_slots // s.tile
    # Whether each program has read, and how many have begun.
    is_read = torch.zeros(s.num_heads * pieces + 1, dtype=torch.int32, device=to.m_NC.device)
    move_history[(pieces * s.num_heads,)](
        *words, *records, *listed, is_read, *sizes, s.head_dim**0.5, NO_KEY,
        of.k.x, of.k.largest, to.mean_NJD, turn_back.axis_int32_D, turn_back.frequency_D,
        CODES=words[0].shape[2], LARGEST=words[1].shape[2],
        MOST=triton.next_power_of_2(triton.cdiv(s.history_slots - num_keep, s.tile) + 2),
        APART=to.apart_NC is not None, TILE=s.tile, P=s.head_dim // 2, TURNED=min(_TURNED_AT_ONCE, s.tile),
        **of.k.form, num_warps=4, maxnreg=_MOVE_REGISTERS,
    )  # fmt: skip


def _in_words(x_NCB: Tensor) -> Tensor:
    """The same memory in fewer numbers: registers hold one each."""
    return x_NCB.view(torch.int16 if x_NCB.shape[2] * x_NCB.itemsize % 4 else torch.int32)

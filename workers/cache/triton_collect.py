"""Kernels that make room in a full packed history: what survives goes from the workspace straight into codes.

Which keys merge, and all sums, are those of `triton_merge.py`. What is read and what is written are different memory,
so keys and values need no buffer; records are read and written in the same tensors and go through one.
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
_COLLECTED_AT_ONCE = 16


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
    group = tl.load(number + slot, mask=is_key, other=1) - 1
    count = tl.load(tally + slot, mask=is_key, other=0)
    at_sum = group.to(tl.int64)[:, None, None] * D + channel
    own_first, own_second = _load_halves(v, slot.to(tl.int64)[:, None, None] * D + channel, is_key, HALF, HALVES)
    has_rest = is_key & (count > LISTED) & (group < num_groups)
    first, second = _load_halves(summed, at_sum, has_rest, HALF, HALVES)
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
def collect_codes(  # type: ignore[no-untyped-def]
    k, v, position, m, weight, partner, source, added, joined, tally, number, summed, member, share,
    root, head_of, rank, k_code, k_largest, v_code, v_largest, log_mass,
    new_position, new_m, new_weight, new_partner,
    first_head, start_k, table_slots, history_slots, num_slots, num_keep, num_groups, root_dim, no_key, limit, least,
    D: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
    M: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """One program: M slots of a head as they will be; records into buffers. Compiled to fuse only what says so."""
    place = tl.program_id(0) * M + tl.arange(0, M)
    local = tl.program_id(1).to(tl.int64)
    head = first_head + local
    inside = place < num_keep
    slot = tl.load(source + head * num_keep + place, mask=inside, other=-1)
    is_key = slot >= 0
    mine, held, row = head * num_slots, head * history_slots, head * table_slots + start_k
    own, total = total_weight(weight + held, added + mine, slot, is_key)
    at_out = held + place
    HALF: tl.constexpr = D // HALVES
    channel = tl.arange(0, HALF // RUN)[None, :, None] * RUN + tl.arange(0, RUN)[None, None, :]
    at_k = (row + slot)[:, None, None] * (D + EXTRA) + channel
    key_first, key_second = _load_halves(k, at_k, is_key, HALF, HALVES)
    first, second = _mean_values(
        v + row * D, tally + mine, number + mine, summed + local * num_groups * D, member + mine * LISTED, share + mine,
        own, total, slot, is_key, num_groups, channel, D, HALVES, LISTED,
    )  # fmt: skip
    store_codes(
        key_first.to(tl.float32), key_second.to(tl.float32), k_code, k_largest, at_out, inside, limit, least,
        D, GROUP, RUN, HALVES,
    )  # fmt: skip
    store_codes(first, second, v_code, v_largest, at_out, inside, limit, least, D, GROUP, RUN, HALVES)
    store_log_mass(log_mass + at_out * 2, total, is_key, inside, root_dim, no_key, 2)
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


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def write_records(  # type: ignore[no-untyped-def]
    k, position, m, weight, partner, log_mass, mean, source, new_position, new_m, new_weight, new_partner,
    axis, frequency, start_k, table_slots, history_slots, num_slots, num_keep, no_key, no_key_low,
    TILE: tl.constexpr, D: tl.constexpr, EXTRA: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program: records of a tile of the history, from the buffers, and its mean, from keys where they were."""
    head = tl.program_id(1).to(tl.int64)
    P: tl.constexpr = D // 2
    pair, part = tl.arange(0, P), tl.arange(0, 2)[None, :]
    sum_even, sum_odd = tl.zeros([P], tl.float32), tl.zeros([P], tl.float32)
    kind = k.dtype.element_ty
    row = head * table_slots + start_k
    for step in range(TILE // M):
        slot = tl.program_id(0) * TILE + step * M + tl.arange(0, M)
        kept, used = slot < num_keep, slot < num_slots
        here, there = head * num_keep + slot, head * history_slots + slot
        for which in tl.static_range(3):
            at = tl.load(new_position + here * 3 + which, mask=kept, other=0.0)
            tl.store(position + there * 3 + which, at, mask=kept)
        mass = tl.load(new_m + here, mask=kept, other=0)
        tl.store(m + there, mass, mask=used)
        tl.store(weight + there, tl.load(new_weight + here, mask=kept, other=0.0), mask=used)
        tl.store(partner + there, tl.load(new_partner + here, mask=kept, other=-1), mask=used)
        # Codes of free slots may stay: there is no key by their log m.
        nothing = tl.where(part == 0, no_key, no_key_low).to(kind)
        tl.store(log_mass + there[:, None] * 2 + part, nothing, mask=(used & (kept == 0))[:, None])
        live = mass > 0
        at_k = (row + tl.load(source + here, mask=live, other=0)) * (D + EXTRA)
        even, odd = unit_halves(k, at_k, new_position, here * 3, live, axis, frequency, P, M)
        sum_even += tl.sum(tl.where(live[:, None], even.to(kind).to(tl.float32), 0.0), 0)
        sum_odd += tl.sum(tl.where(live[:, None], odd.to(kind).to(tl.float32), 0.0), 0)
    at = mean + (head * (history_slots // TILE) + tl.program_id(0)) * D + 2 * pair
    tl.store(at, (sum_even / TILE).to(mean.dtype.element_ty))
    tl.store(at + 1, (sum_odd / TILE).to(mean.dtype.element_ty))


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
    v, m, weight, partner = records
    codes = to.k_code_NCB, to.k_largest_NCG, to.v_code_NCB, to.v_largest_NCG, to.mass_NC2
    written = to.position_NC3, to.m_NC, to.weight_NC, to.partner_NC
    assert all(x.is_contiguous() for x in (k, v, *codes, *written, to.mean_NJD))
    (heads, num), num_keep, listed = m.shape, room.num_keep, room.num_listed
    source, sums, families = found = find_sums(history, records, turn_back, room)
    likes = position, m, weight, partner
    buffers = tuple(torch.empty((heads, num_keep, *x.shape[2:]), dtype=x.dtype, device=x.device) for x in likes)
    num_groups = most_groups(room)
    at_once = min(heads, max(1, _SUMMED_BYTES // (num_groups * s.head_dim * 4)))
    summed = torch.empty((at_once, num_groups, s.head_dim), dtype=torch.int32, device=k.device)
    slots = history.start, k.shape[1], s.history_slots, num, num_keep
    for first in range(0, heads, at_once):
        some = min(at_once, heads - first)
        add_rest(history, records, found, summed[:some], first)
        collect_codes[(triton.cdiv(num_keep, _COLLECTED_AT_ONCE), some)](
            k, v, position, m, weight, partner, source, sums.added, sums.joined, sums.members.tally, sums.number,
            summed, sums.members.listed, sums.share, families.root, families.head_of, families.rank, *codes, *buffers,
            first, *slots, num_groups, s.head_dim**0.5, NO_KEY, float(LIMITS[s.storage]), LEAST,
            **vector_shape(s, s.storage), M=_COLLECTED_AT_ONCE, LISTED=listed, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    high = float(torch.tensor(NO_KEY).to(k.dtype))
    write_records[(s.history_slots // s.tile, heads)](
        k, *written, to.mass_NC2, to.mean_NJD, source, *buffers, turn_back.axis_int32_D, turn_back.frequency_D,
        *slots, high, NO_KEY - high, TILE=s.tile, D=s.head_dim, EXTRA=s.width - s.head_dim, M=min(ROWS, s.tile),
        num_warps=4,
    )  # fmt: skip

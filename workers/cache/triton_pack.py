"""Kernels that unpack a layer of a packed table into the workspace, and pack what changed there.

What `packed_history.PlainPacking` does, in one launch each. A program unpacks a tile of one head: codes are read and
channels written once, in pieces of 16 bytes, and sink, newest chunks and the chunk in hand are copied beside them.
Tiles that nobody sees are skipped; for the choice of tiles a few keys of each are unpacked by a kernel of its own.
`int4` holds a channel of the first half and one of the second in a byte, so both halves of a vector are written in
whole runs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.cache.packed_history import PackedLayer, Workspace
from workers.cache.table_codes import LEAST, LIMITS, CodedStorage, group_channels
from workers.cache.table_layout import TableSettings

_UNPACKED_AT_ONCE = 32
"""Slots: 16 bytes of `int4` codes for each of 128 threads, at 128 channels."""
_PACKED_AT_ONCE = 16


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _unpack_rows(  # type: ignore[no-untyped-def]
    code, largest, out, at_slot, at_row, stride_out, step_of_one,
    D: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Some vectors of a head: from slots of the history to rows of the workspace."""
    HALF: tl.constexpr = D // HALVES
    run, channel = tl.arange(0, HALF // RUN), tl.arange(0, RUN)[None, None, :]
    codes = tl.load(code + at_slot[:, None, None] * HALF + run[None, :, None] * RUN + channel)
    for half in tl.static_range(HALVES):
        if HALVES == 2:
            number = ((codes >> (4 * half)) & 15).to(tl.float32) - 8.0
        else:
            number = codes.to(tl.float32)
        at_largest = at_slot[:, None] * (D // GROUP) + ((half * HALF + run * RUN) // GROUP)[None, :]
        step = tl.load(largest + at_largest).to(tl.float32) * step_of_one
        at_out = at_row[:, None, None] * stride_out + half * HALF + run[None, :, None] * RUN + channel
        tl.store(out + at_out, (number * step[:, :, None]).to(out.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _unpack_keys(  # type: ignore[no-untyped-def]
    code, largest, mass, k, at_slot, at_row, step_of_one,
    D: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Some keys of a head, log m behind them: from slots of the history to rows of the workspace."""
    W: tl.constexpr = D + EXTRA
    extra = tl.arange(0, EXTRA)[None, :]
    _unpack_rows(code, largest, k, at_slot, at_row, W, step_of_one, D, GROUP, RUN, HALVES)
    parts = tl.load(mass + at_slot[:, None] * 2 + extra, mask=extra < 2, other=0.0)
    tl.store(k + at_row[:, None] * W + D + extra, parts)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _copy_keys(end_k, k, at_end, at_row, D: tl.constexpr, EXTRA: tl.constexpr):  # type: ignore[no-untyped-def]
    """Some keys of a head that lie beside the history as they are."""
    W: tl.constexpr = D + EXTRA
    extra, channel = tl.arange(0, EXTRA)[None, :], tl.arange(0, D)[None, :]
    at_end, at_row = at_end[:, None], at_row[:, None]
    tl.store(k + at_row * W + channel, tl.load(end_k + at_end * W + channel))
    tl.store(k + at_row * W + D + extra, tl.load(end_k + at_end * W + D + extra))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _unpack_tiles(  # type: ignore[no-untyped-def]
    k_code, k_largest, v_code, v_largest, mass, end_k, end_v, k, v, is_seen,
    num_tiles, first_tile, stop_tile, history_slots, end_slots, step_of_one,
    D: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
    TILE: tl.constexpr, M: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """One program: a tile of one head. The history is tiles from `first_tile` up to `stop_tile`."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_wanted = tile >= 0
    if SOME:
        is_wanted = tl.load(is_seen + head * num_tiles + tile) > 0
    is_history = (tile >= first_tile) & (tile < stop_tile)
    channel = tl.arange(0, D)[None, :]
    first_row = (head * num_tiles + tile) * TILE + tl.arange(0, M)
    if is_wanted & is_history:
        first_slot = head * history_slots + (tile - first_tile) * TILE + tl.arange(0, M)
        for step in range(TILE // M):
            at_slot, at_row = first_slot + step * M, first_row + step * M
            _unpack_keys(k_code, k_largest, mass, k, at_slot, at_row, step_of_one, D, EXTRA, GROUP, RUN, HALVES)
            _unpack_rows(v_code, v_largest, v, at_slot, at_row, D, step_of_one, D, GROUP, RUN, HALVES)
    if is_wanted & (is_history == 0):
        slot = tl.where(tile < first_tile, tile * TILE, tile * TILE - history_slots)
        first_end = head * end_slots + slot + tl.arange(0, M)
        for step in range(TILE // M):
            at_end, at_row = first_end + step * M, first_row + step * M
            _copy_keys(end_k, k, at_end, at_row, D, EXTRA)
            tl.store(v + at_row[:, None] * D + channel, tl.load(end_v + at_end[:, None] * D + channel))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def unpack_slots(  # type: ignore[no-untyped-def]
    k_code, k_largest, mass, end_k, k, sampled_slot, per_tile,
    num_tiles, first_tile, stop_tile, history_slots, end_slots, step_of_one,
    D: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
    TILE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """One program: the sampled keys of a tile of one head, at most M; its last one fills up what is less."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(sampled_slot + tile * per_tile + tl.minimum(tl.arange(0, M), per_tile - 1))
    at_row = head * num_tiles * TILE + slot
    if (tile >= first_tile) & (tile < stop_tile):
        at_slot = head * history_slots + slot - first_tile * TILE
        _unpack_keys(k_code, k_largest, mass, k, at_slot, at_row, step_of_one, D, EXTRA, GROUP, RUN, HALVES)
    else:
        at_end = head * end_slots + slot - tl.where(tile < first_tile, 0, history_slots)
        _copy_keys(end_k, k, at_end, at_row, D, EXTRA)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _to_bfloat16(x):  # type: ignore[no-untyped-def]
    """Float32 as near as bfloat16 comes, ties to even; of numbers that are not negative."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def pack_rows(  # type: ignore[no-untyped-def]
    x, code, largest, at_row, at_slot, inside, stride_x, limit, least,
    D: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Some vectors of a head: from rows of the workspace to slots of the history."""
    HALF: tl.constexpr = D // HALVES
    run, channel = tl.arange(0, HALF // RUN)[None, :, None], tl.arange(0, RUN)[None, None, :]
    there = inside[:, None, None]
    at_x = at_row[:, None, None] * stride_x + run * RUN + channel
    first = tl.load(x + at_x, mask=there, other=0.0).to(tl.float32)
    second = first
    if HALVES == 2:
        second = tl.load(x + at_x + HALF, mask=there, other=0.0).to(tl.float32)
    store_codes(first, second, code, largest, at_slot, inside, limit, least, D, GROUP, RUN, HALVES)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_codes(  # type: ignore[no-untyped-def]
    first, second, code, largest, at_slot, inside, limit, least,
    D: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Some vectors of a head, float32 [M, runs, RUN], to slots of the history; `second` counts if there are two halves.

    For kernels in which nothing is fused, as `_code` says.
    """
    HALF: tl.constexpr = D // HALVES
    RUNS: tl.constexpr = HALF // RUN
    GROUPS: tl.constexpr = D // GROUP
    run, channel = tl.arange(0, RUNS)[None, :, None], tl.arange(0, RUN)[None, None, :]
    there = inside[:, None, None]
    most_first = tl.max(tl.abs(first), 2)
    at_group = at_slot[:, None] * GROUPS + tl.arange(0, RUNS)[None, :]
    at_code = at_slot[:, None, None] * HALF + run * RUN + channel
    if HALVES == 2:
        most_second = tl.max(tl.abs(second), 2)
        if GROUPS == 1:  # one largest channel for both halves
            most_first = tl.maximum(most_first, most_second)
            most_second = most_first
        most_first, most_second = _to_bfloat16(most_first), _to_bfloat16(most_second)
        most_first = tl.where(most_first >= least, most_first, 0.0)
        most_second = tl.where(most_second >= least, most_second, 0.0)
        low = _code(first, most_first, limit, least) + 8
        high = _code(second, most_second, limit, least) + 8
        tl.store(code + at_code, (low | (high << 4)).to(tl.uint8), mask=there)
        kind = largest.dtype.element_ty
        tl.store(largest + at_group, most_first.to(kind), mask=inside[:, None])
        if GROUPS > 1:
            tl.store(largest + at_group + RUNS, most_second.to(kind), mask=inside[:, None])
    else:
        most = _to_bfloat16(most_first)
        most = tl.where(most >= least, most, 0.0)
        tl.store(code + at_code, _code(first, most, limit, least).to(tl.int8), mask=there)
        tl.store(largest + at_group, most.to(largest.dtype.element_ty), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _code(x, most, limit, least):  # type: ignore[no-untyped-def]
    """Whole numbers; `most` of each run of channels. Half a step rounds as in plain torch if nothing is fused here."""
    per_step = tl.div_rn(limit + tl.zeros_like(most), tl.maximum(most, least))
    code = tl.floor(x * per_step[:, :, None] + 0.5)
    return tl.minimum(tl.maximum(code, -limit), limit).to(tl.int32)


@triton.jit(do_not_specialize=["start", "stop", "first_slot"])  # type: ignore[untyped-decorator, unused-ignore]
def pack_slots(  # type: ignore[no-untyped-def]
    k, v, k_code, k_largest, v_code, v_largest, start, stop, first_slot, num_slots, history_slots, limit, least,
    D: tl.constexpr, EXTRA: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr, M: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """One program: some slots of one head, values alone or keys too."""
    slot = start + tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1).to(tl.int64)
    inside = slot < stop
    at_row, at_slot = head * num_slots + first_slot + slot, head * history_slots + slot
    if KEYS:
        pack_rows(k, k_code, k_largest, at_row, at_slot, inside, D + EXTRA, limit, least, D, GROUP, RUN, HALVES)
    pack_rows(v, v_code, v_largest, at_row, at_slot, inside, D, limit, least, D, GROUP, RUN, HALVES)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _flag_listed(index, is_seen, num_listed, num_tiles, J: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: the flags of one head, all lists of which lie side by side."""
    head, tile, at = tl.program_id(0).to(tl.int64), tl.arange(0, J), tl.arange(0, M)
    flag = is_seen + head * num_tiles
    tl.store(flag + tile, tl.zeros([J], tl.uint8), mask=tile < num_tiles)
    tl.debug_barrier()  # what one thread clears another sets
    for start in range(0, num_listed, M):
        there = start + at < num_listed
        listed = tl.load(index + head * num_listed + start + at, mask=there, other=0)
        tl.store(flag + listed, tl.full([M], 1, tl.uint8), mask=there)


def unpack(layer: PackedLayer, to: Workspace, s: TableSettings, is_seen_NJ: Tensor | None) -> None:
    """See `PlainPacking.unpack`; tiles whose flag is 0 are left as they are."""
    assert s.storage != "model"
    tensors = (layer.k_code_NCB, layer.k_largest_NCG, layer.v_code_NCB, layer.v_largest_NCG, layer.mass_NC2)
    ends = layer.k_NLW, layer.v_NLD
    assert all(x.is_contiguous() for x in (*tensors, *ends, to.k_NLW, to.v_NLD))
    _unpack_tiles[(s.num_slots // s.tile, s.num_heads)](
        *tensors, *ends, to.k_NLW, to.v_NLD, to.k_NLW if is_seen_NJ is None else is_seen_NJ,
        s.num_slots // s.tile, s.history_start // s.tile, s.recent_start // s.tile, s.history_slots,
        s.num_slots - s.history_slots, 1 / LIMITS[s.storage],
        **vector_shape(s, s.storage), TILE=s.tile, M=min(_UNPACKED_AT_ONCE, s.tile),
        SOME=is_seen_NJ is not None, num_warps=4,
    )  # fmt: skip


def unpack_sample(layer: PackedLayer, to: Workspace, s: TableSettings, slot_R: Tensor) -> None:
    """See `PlainPacking.unpack_sample`."""
    assert s.storage != "model"
    tensors = layer.k_code_NCB, layer.k_largest_NCG, layer.mass_NC2, layer.k_NLW, to.k_NLW, slot_R
    assert all(x.is_contiguous() for x in tensors)
    tiles = s.num_slots // s.tile
    per_tile = len(slot_R) // tiles
    unpack_slots[(tiles, s.num_heads)](
        *tensors, per_tile,
        tiles, s.history_start // s.tile, s.recent_start // s.tile, s.history_slots, s.num_slots - s.history_slots,
        1 / LIMITS[s.storage],
        **vector_shape(s, s.storage), TILE=s.tile, M=triton.next_power_of_2(per_tile), num_warps=2,
    )  # fmt: skip


def pack(layer: PackedLayer, of: Workspace, s: TableSettings, new: slice) -> None:
    """See `PlainPacking.pack`."""
    assert s.storage != "model"
    tensors = layer.k_code_NCB, layer.k_largest_NCG, layer.v_code_NCB, layer.v_largest_NCG
    assert all(x.is_contiguous() for x in (*tensors, of.k_NLW, of.v_NLD))
    pack_slots[(triton.cdiv(new.stop - new.start, _PACKED_AT_ONCE), s.num_heads)](
        of.k_NLW, of.v_NLD, *tensors, new.start, new.stop, s.history_start, s.num_slots, s.history_slots,
        float(LIMITS[s.storage]), LEAST,
        **vector_shape(s, s.storage), M=_PACKED_AT_ONCE, KEYS=True, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def pack_values(layer: PackedLayer, v_NTD: Tensor, s: TableSettings, new: slice) -> None:
    """Write these slots of the history from the values that come there; of as many heads as there are."""
    assert s.storage != "model"
    codes = layer.v_code_NCB, layer.v_largest_NCG
    assert all(x.is_contiguous() for x in codes)
    assert v_NTD.stride()[1:] == (s.head_dim, 1)
    assert v_NTD.stride(0) % s.head_dim == 0
    pack_slots[(triton.cdiv(new.stop - new.start, _PACKED_AT_ONCE), len(v_NTD))](
        v_NTD, v_NTD, *codes, *codes, new.start, new.stop, -new.start, v_NTD.stride(0) // s.head_dim, s.history_slots,
        float(LIMITS[s.storage]), LEAST,
        **vector_shape(s, s.storage), M=_PACKED_AT_ONCE, KEYS=False, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def flag_listed(index_NIJ: Tensor, is_seen_NJ: Tensor) -> None:
    """See `PlainPacking.flag_listed`."""
    assert index_NIJ.is_contiguous()
    assert is_seen_NJ.is_contiguous()
    heads, tiles = is_seen_NJ.shape
    _flag_listed[(heads,)](
        index_NIJ, is_seen_NJ, index_NIJ[0].numel(), tiles, J=triton.next_power_of_2(tiles), M=4096, num_warps=16
    )


def vector_shape(s: TableSettings, storage: CodedStorage) -> dict[str, int]:
    """How a vector is cut."""
    halves, group = 2 if storage == "int4" else 1, group_channels(s.head_dim, storage)
    run = min(group, s.head_dim // halves)
    return {"D": s.head_dim, "EXTRA": s.width - s.head_dim, "GROUP": group, "RUN": run, "HALVES": halves}

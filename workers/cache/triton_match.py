"""Kernels that find partners: what `partners.py` does, for all rows of keys of some layers at once.

A first kernel turns the new keys and the latent frame before them back to where they were before RoPE, at length 1,
makes the means of their tiles and, where the history lies in few bits, the codes and records of what is new, for some
sizes in CUDA (`turn_chunk.py`); a second compares each key with the latent frame before its own. The nearest tiles are
listed by a third; a fourth turns their keys back, from codes where they lie so, and compares. Of the products only the
largest is kept: it is looked for place by place while keys pass, and across places once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.cache import turn_chunk
from workers.cache.packed_history import PackedLayer
from workers.cache.partners import History, Look
from workers.cache.table_codes import LEAST, LIMITS
from workers.cache.table_layout import TableSettings
from workers.cache.triton_near import keep_higher, near_tiles
from workers.cache.triton_pack import pack_rows, pack_values, vector_shape
from workers.cache.triton_rows import (
    MOST_AVERAGED,
    Rows,
    coded_rows,
    in_mean_units,
    keys_of,
    store_mean,
    unit_pairs,
)
from workers.cache.unrotated import TurnBack

TURNED_AT_ONCE = 16
"""Keys that a program turns back at a time."""
OWN_AT_ONCE, OTHERS_AT_ONCE = 128, 64
"""New keys that a program compares, and keys of the latent frame before that it compares them with at a time."""
NEAR_AT_ONCE = 64
"""Keys of near tiles, the same way; they are turned back as they are compared."""
_NEAR_REGISTERS = 128
"""Of a thread that compares with those: so two programs of 8 warps share a multiprocessor."""
UNIT_BYTES = 120_000_000
"""Of keys that are turned back and lie so at a time; further heads wait."""


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


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _keep_records(  # type: ignore[no-untyped-def]
    log_mass, new_position, position, m, weight, mass, at_k, at_p, at_slot, wanted
):  # fmt: skip
    """Of new keys: where they are, that each is one, and log m as it lies behind them."""
    axis, part = tl.arange(0, 4)[None, :], tl.arange(0, 2)[None, :]
    here = wanted[:, None] & (axis < 3)
    places = tl.load(new_position + at_p[:, None] + axis, mask=here, other=0.0)
    tl.store(position + at_slot[:, None] * 3 + axis, places, mask=here)
    here = wanted[:, None] & (part >= 0)
    parts = tl.load(log_mass + at_k[:, None] + part, mask=here, other=0.0)
    tl.store(mass + at_slot[:, None] * 2 + part, parts, mask=here)
    one = tl.full(at_slot.shape, 1, tl.int32)
    tl.store(m + at_slot, one, mask=wanted)
    tl.store(weight + at_slot, one.to(tl.float32), mask=wanted)


@triton.jit(do_not_specialize=["first_tile", "before", "start", "stop"])  # type: ignore[untyped-decorator, unused-ignore]
def _turn_back(  # type: ignore[no-untyped-def]
    k, largest, position, m, new_k, new_position, unit, mean, weight, mass, axis, frequency,
    stride_kn, stride_kl, start_k, stride_pn, stride_mn, stride_jn, stride_new_n, stride_new_l, stride_new_p,
    first_tile, before, start, stop, limit, least,
    TILE: tl.constexpr, P: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
    PACKS: tl.constexpr, RUN: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the history, new from slot `start` on. A key that is not there is written as NaN.

    Where it packs, nothing new is in the history yet: codes, log m and records of new keys are written.
    """
    first = (first_tile + tl.program_id(0)) * TILE
    row = tl.program_id(1).to(tl.int64)
    even_a, odd_a = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
    even_b, odd_b = tl.zeros([M, P // 2], tl.int32), tl.zeros([M, P // 2], tl.int32)
    at_unit = row * (stop - before) - before
    # Slots that are taken at once may be old and new; those of the other kind are left out, and are 0 in a mean.
    for step in range(0, tl.cdiv(tl.minimum(tl.maximum(start - first, 0), TILE), M)):
        slot = first + step * M + tl.arange(0, M)
        is_old = slot < start
        live = is_old & (tl.load(m + row * stride_mn + slot, mask=is_old, other=0) > 0)
        at_k = row * stride_kn + (start_k + slot).to(tl.int64) * stride_kl
        at_p = row * stride_pn + slot * 3
        a, b, c, d = unit_pairs(k, largest, at_k, position, at_p, live, axis, frequency, P, M, BITS, GROUP, KIND)
        lacks = tl.where(live, 0.0, float("nan"))[:, None]
        wanted = is_old & (slot >= before)
        _store_unit(unit, at_unit + slot, a + lacks, b + lacks, c + lacks, d + lacks, wanted, P)
        even_a += in_mean_units(a)
        odd_a += in_mean_units(b)
        even_b += in_mean_units(c)
        odd_b += in_mean_units(d)
    for step in range(tl.minimum(tl.maximum(start - first, 0), TILE) // M, TILE // M):
        slot = first + step * M + tl.arange(0, M)
        is_new = (slot >= start) & (slot < stop)
        at_k = row * stride_new_n + (slot - start).to(tl.int64) * stride_new_l
        at_p = row * stride_new_p + (slot - start) * 3
        a, b, c, d = unit_pairs(
            new_k, new_k, at_k, new_position, at_p, is_new, axis, frequency, P, M, 0, 2 * P, new_k.dtype.element_ty
        )
        _store_unit(unit, at_unit + slot, a, b, c, d, is_new, P)
        even_a += in_mean_units(a)
        odd_a += in_mean_units(b)
        even_b += in_mean_units(c)
        odd_b += in_mean_units(d)
        if PACKS:
            at_slot = row * stride_mn + slot
            pack_rows(new_k, k, largest, at_k, at_slot, is_new, 1, limit, least, 2 * P, GROUP, RUN, HALVES)
            _keep_records(new_k + 2 * P, new_position, position, m, weight, mass, at_k, at_p, at_slot, is_new)
    store_mean(mean + row * stride_jn + first // TILE * (2 * P), even_a, odd_a, even_b, odd_b, P, TILE)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _keep_best(highest, place, keys, others, first, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The higher cosine at each place, and the first key of those that it was found among; NaN is never higher."""
    cosine = tl.dot(keys, tl.trans(others), input_precision=PRECISION)
    return keep_higher(highest, place, cosine, first, PRECISION)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _best_of_places(highest, place, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of [rows, N] places with the first of each key that was best there: the best key of each row, first of equals."""
    most = tl.max(highest, 1)
    key = tl.where(highest == most[:, None], place + tl.arange(0, N)[None, :], 2147483647)
    return tl.min(key, 1), most


@triton.jit(do_not_specialize=["before", "num_rows", "skip"])  # type: ignore[untyped-decorator, unused-ignore]
def _frame_before(  # type: ignore[no-untyped-def]
    unit, found, best, before, num_rows, skip, frame,
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
    base, first_key = base + first_other * (2 * P), before + first_other
    stop = tl.where(first_other >= 0, frame, 0)
    whole = stop // N * N
    for start in range(0, whole, N):
        others = tl.load(base + (start + tl.arange(0, N))[:, None] * (2 * P) + channel)
        highest, place = _keep_best(highest, place, keys, others, first_key + start, PRECISION)
    if whole < stop:
        other = whole + tl.arange(0, N)
        there = (other < stop)[:, None]
        others = tl.load(base + other[:, None] * (2 * P) + channel, mask=there, other=float("nan"))
        highest, place = _keep_best(highest, place, keys, others, first_key + whole, PRECISION)
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


class _Keys(NamedTuple):
    """Of some heads: a history, and the chunk that becomes its newest."""

    old: Rows
    position_NC3: Tensor
    m_NC: Tensor
    mean_NJD: Tensor
    partner_NC: Tensor
    new_NTW: Tensor
    new_position_NT3: Tensor
    packs: tuple[Tensor, Tensor] | None = None
    """Weights and log m, where they are written with codes and other records of the chunk."""

    def some(self, heads: slice) -> _Keys:
        """Of these heads alone."""
        kept: dict[str, Any] = {name: x[heads] for name, x in self._asdict().items() if isinstance(x, Tensor)}
        old = self.old._replace(x=self.old.x[heads], largest=self.old.largest[heads])
        packs = None if self.packs is None else (self.packs[0][heads], self.packs[1][heads])
        return self._replace(old=old, packs=packs, **kept)


def match(history: History, partner_NC: Tensor, turn_back: TurnBack, new: slice, look: Look) -> None:
    """Partners of the keys in the slots `new`, and the means of the tiles that they fill; both are written.

    Args:
        history: Of as many heads as one likes; the new keys and the latent frame before are there.
        partner_NC: Slot of the partner, -1 for none.
        turn_back: RoPE of the model.
        new: Slots, a whole number of latent frames in the order of time.
        look: Where to look; its tile divides the history, its number of tiles is given.
    """
    k_NTW, position_NT3 = history.k_NLW[:, history.start :][:, new], history.position_NC3[:, new]
    records = history.position_NC3, history.m_NC, history.mean_NJD, partner_NC
    of = _Keys(keys_of(history, turn_back.head_dim), *records, k_NTW, position_NT3)
    _find(of, turn_back, new, look, {"RUN": 1, "HALVES": 1, "limit": 1.0})


def take_in(
    layer: PackedLayer, chunk: Sequence[Tensor], new: slice, turn_back: TurnBack, look: Look, s: TableSettings
) -> None:
    """A chunk becomes history without a merge: its codes, log m, records, partners and means are written.

    Args:
        layer: Of as many heads as one likes.
        chunk: Keys as computed with log m behind them [N, T, W], values [N, T, D], positions float32 [T, 3].
        new: Slots of the history that it takes, a whole number of latent frames in the order of time.
        turn_back, look: As of `match`.
        s: Sizes.
    """
    assert s.storage != "model"
    k_NTW, v_NTD, position_T3 = chunk
    position_NT3 = position_T3.contiguous().expand(len(k_NTW), -1, -1)
    older = coded_rows(layer.k_code_NCB, layer.k_largest_NCG, s.head_dim, s.storage, k_NTW.dtype)
    records, packs = (layer.position_NC3, layer.m_NC), (layer.weight_NC, layer.mass_NC2)
    # Records of a slot lie at one place for all heads.
    assert all(x.is_contiguous() for x in (*records, *packs))
    of = _Keys(older, *records, layer.mean_NJD, layer.partner_NC, k_NTW, position_NT3, packs)
    vector = vector_shape(s, s.storage)
    form = {"RUN": vector["RUN"], "HALVES": vector["HALVES"], "limit": float(LIMITS[s.storage])}
    _find(of, turn_back, new, look, form)
    pack_values(layer, v_NTD, s, new)


def _find(of: _Keys, turn_back: TurnBack, new: slice, look: Look, form: dict[str, Any]) -> None:
    """Of as many heads at a time as `UNIT_BYTES` allows; `form` says how a vector that is packed is cut."""
    turned = new.stop - max(0, new.start - look.frame_tokens)
    at_once = max(1, UNIT_BYTES // (turned * turn_back.head_dim * of.mean_NJD.itemsize))
    for first in range(0, len(of.m_NC), at_once):
        _find_of_heads(of.some(slice(first, first + at_once)), turn_back, new, look, form)


def _find_of_heads(of: _Keys, turn_back: TurnBack, new: slice, look: Look, form: dict[str, Any]) -> None:
    assert look.num_tiles is not None
    assert look.tile <= MOST_AVERAGED
    tile, frame, k, m, position = look.tile, look.frame_tokens, of.old, of.m_NC, of.position_NC3
    heads, pairs, device, kind = m.shape[0], turn_back.head_dim // 2, m.device, of.mean_NJD.dtype
    before, first_tile, stop_tile = max(0, new.start - frame), new.start // tile, -(-new.stop // tile)
    skip, num_new = new.start - before, new.stop - new.start
    unit = torch.empty((heads, new.stop - before, 2 * pairs), dtype=kind, device=device)
    found = torch.empty((heads, num_new), dtype=torch.int32, device=device)
    best = torch.empty((heads, num_new), dtype=torch.float32, device=device)
    precision, packs = "ieee" if kind == torch.float32 else "tf32", of.packs is not None
    turn = turn_back.axis_int32_D, turn_back.frequency_D
    if of.packs is not None and turn_chunk.fits(k, turn_back, tile, of.new_NTW):
        chunk = of.new_NTW, of.new_position_NT3
        turn_chunk.turn_chunk(k, (position, m, *of.packs), chunk, turn_back, new, (unit, of.mean_NJD))
    else:
        _turn_back[(stop_tile - before // tile, heads)](
            k.x, k.largest, position, m, of.new_NTW, of.new_position_NT3, unit, of.mean_NJD, *(of.packs or (m, m)),
            *turn, *k.at, position.stride(0), m.stride(0), of.mean_NJD.stride(0), *of.new_NTW.stride()[:2],
            of.new_position_NT3.stride(0), before // tile, before, new.start, new.stop, least=LEAST,
            TILE=tile, P=pairs, M=min(TURNED_AT_ONCE, tile), PACKS=packs, **k.form, **form,
            num_warps=4, enable_fp_fusion=not packs,
        )  # fmt: skip
    _frame_before[(triton.cdiv(frame, OWN_AT_ONCE), num_new // frame, heads)](
        unit, found, best, before, new.stop - before, skip, frame,
        P=pairs, M=OWN_AT_ONCE, N=OTHERS_AT_ONCE, PRECISION=precision, num_warps=8, num_stages=3,
    )  # fmt: skip
    chosen = _choose_tiles(of.mean_NJD, first_tile, stop_tile, look.num_tiles)
    near_tiles[(stop_tile - first_tile, heads)](
        k.x, k.largest, position, m, unit, chosen, found, best, of.partner_NC, *turn, *k.at, position.stride(0),
        m.stride(0), of.partner_NC.stride(0), first_tile, before, new.start, new.stop, chosen.shape[-1],
        TILE=tile, P=pairs, N=min(NEAR_AT_ONCE, tile), PRECISION=precision, **k.form,
        num_warps=8, num_stages=1, maxnreg=_NEAR_REGISTERS,
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

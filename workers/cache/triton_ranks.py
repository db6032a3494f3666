"""The k-th smallest number of long rows, and sums that run along them: a library gives each row one block of a GPU.

A k-th number is found digit by digit: counts of all first digits, the digit in which the k-th lies, then the next
one among the numbers that begin so. Sums run along pieces of a row first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from workers.cache import count_digits
from workers.cache.row_distances import can_run
from workers.cache.table_pairs import EARLY, NO_LINK

_DIGIT_BITS = (8, 8, 8, 8)
"""Of a number, from the first on. Longer ones by CUDA alone: a histogram by Triton takes as many steps for each number
as there are groups of 32 digits, and their counts take registers."""
_AT_ONCE = 4096
_FEW = 128
"""Of a program; as many are counted one by one, for a histogram takes as long for none as for all."""
NEAR_AT_ONCE = 256
"""Listed numbers that are looked at together: mostly there are fewer."""
_PIECE = 1024


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _next_digit(counts, begin, wanted, FIRST: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How the wanted number of a row begins, one digit more than before, and which one it is among those.

    Args:
        counts: Of digits of numbers that begin so, of this row.
        begin: Of this row; nothing before the first digit.
        wanted: From 1.
    """
    count = tl.load(counts + tl.arange(0, 1 << BITS))
    is_before = tl.cumsum(count, 0) < wanted
    digit = tl.sum(is_before.to(tl.int32), 0)
    digit = digit - (1 << BITS) // 2 if FIRST else (begin << BITS) + digit
    return digit, wanted - tl.sum(tl.where(is_before, count, 0), 0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _early_first(x, jumps, num_odd, num_linked, row, at, inside, early, no_link):  # type: ignore[no-untyped-def]
    """Every other link comes first, and what loses nothing; written over the bits of what links lose."""
    loss = tl.load(x + at, mask=inside, other=0)
    most_are_odd = (2 * tl.load(num_odd + row) >= tl.load(num_linked + row)).to(tl.int32)
    is_early = (tl.load(jumps + at, mask=inside, other=0) & 1) == most_are_odd
    rank = tl.where(is_early | (loss == 0), loss | early, loss)
    rank = tl.where(loss == no_link, no_link, rank)
    tl.store(x + at, rank, mask=inside)
    return rank


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _count_digits(  # type: ignore[no-untyped-def]
    x, begin, wanted, counts, near, num_near, jumps, num_odd, num_linked, k, num, rows, most_digits, early, no_link,
    NTH: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BITS_BEFORE: tl.constexpr, LINKS: tl.constexpr,
    FEW: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """How often each digit comes in M numbers of a row, of those that begin as the digits before say.

    Each program looks at what was counted before by itself; what the row begins with is written once, for the next.
    With the last digit those numbers are listed, in any order.
    """
    at = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    is_asked = at < num
    own = counts + (NTH * rows + row) * most_digits
    if LINKS and NTH == 0:
        value = _early_first(x, jumps, num_odd, num_linked, row, row * num + at, is_asked, early, no_link)
    else:
        value = tl.load(x + row * num + at, mask=is_asked, other=0)
    digit = (value >> SHIFT) & ((1 << BITS) - 1)
    if NTH == 0:
        digit = digit ^ ((1 << BITS) // 2)  # negative numbers first
    else:
        before = (NTH - 1) * rows + row
        if NTH == 1:
            start, nth = _next_digit(own - rows * most_digits, 0, k, True, BITS_BEFORE)
        else:
            start, nth = _next_digit(
                own - rows * most_digits, tl.load(begin + before), tl.load(wanted + before), False, BITS_BEFORE
            )
        if tl.program_id(0) == 0:
            tl.store(begin + before + rows, start)
            tl.store(wanted + before + rows, nth)
        is_asked &= (value >> (SHIFT + BITS)) == start
    num_asked = tl.sum(is_asked.to(tl.int32), 0)
    if num_asked > FEW:
        found = tl.histogram(digit, 1 << BITS, mask=is_asked)
        tl.atomic_add(own + tl.arange(0, 1 << BITS), found, mask=found > 0, sem="relaxed")
    elif num_asked > 0:  # behind the second digit
        tl.atomic_add(own + digit, 1, mask=is_asked, sem="relaxed")
    if SHIFT == 0 and num_asked > 0:
        place = tl.cumsum(is_asked.to(tl.int32), 0)
        first = tl.atomic_add(num_near + row, num_asked, sem="relaxed")
        tl.store(near + row * num + first + place - 1, at, mask=is_asked)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def last_of_row(counts, begin, wanted, row, rows, most_digits, NTH: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number that `find_last` looks for, and which of equal ones it is, from 1. NTH is that of its last digit."""
    at = NTH * rows + row
    return _next_digit(counts + at * most_digits, tl.load(begin + at), tl.load(wanted + at), False, BITS)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def equal_before(x, near, num_near, row, first, last, num, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many numbers of a row ahead of its first-th are this one, by the list of those that begin like it."""
    count = 0
    num_listed = tl.load(num_near + row)
    for start in range(0, num_listed, M):
        there = start + tl.arange(0, M) < num_listed
        at = tl.load(near + row * num + start + tl.arange(0, M), mask=there, other=0)
        there &= at < first
        count += tl.sum((there & (tl.load(x + row * num + at, mask=there, other=0) == last)).to(tl.int32), 0)
    return count


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _write_last(  # type: ignore[no-untyped-def]
    counts, begin, wanted, value, nth, rows, most_digits, NTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    last, which = last_of_row(counts, begin, wanted, row, rows, most_digits, NTH, BITS)
    tl.store(value + row, last)
    tl.store(nth + row, which)


class Last(NamedTuple):
    """Where the last number that is taken of each row is found, for `last_of_row` and `equal_before`."""

    counts: Tensor
    """Of digits, [digits, N, most digits]."""
    begin: Tensor
    wanted: Tensor
    """[digits, N]."""
    near: Tensor
    """Slots of numbers that differ from it in the last digit at most, [N, C], in any order."""
    num_near: Tensor
    """[N]."""
    last_bits: int
    """Of the last digit."""


class Links(NamedTuple):
    """Numbers are bits of what links lose, of which every other link comes first; see `walk`."""

    jumps: Tensor
    """Where chains end and whether that is an odd number of links away."""
    num_odd: Tensor
    num_linked: Tensor
    """[N]."""


def _digit_bits(device: torch.device) -> tuple[int, ...]:
    return count_digits.DIGIT_BITS if can_run(device) else _DIGIT_BITS


def room_to_count(rows: int, device: torch.device) -> int:
    """Numbers of int32 that `find_last` wants for so many rows, all 0."""
    bits = _digit_bits(device)
    return rows * ((len(bits) << max(bits)) + 1)


def find_last(x_NC: Tensor, k: int, zeros: Tensor, near_NC: Tensor, links: Links | None = None) -> Last:
    """Find the k-th smallest number of rows.

    Args:
        x_NC: int32, contiguous; with links they are written: bits become ranks.
        k: From 1.
        zeros: As `room_to_count` says; written.
        near_NC: Written; may be the jumps, which are read before.
        links: If those are ranked.
    """
    rows, num = x_NC.shape
    assert x_NC.is_contiguous()
    assert near_NC.is_contiguous()
    assert 1 <= k <= num
    all_bits = _digit_bits(x_NC.device)
    assert sum(all_bits) == 32
    counts, num_near = zeros[rows:].view(len(all_bits), rows, -1), zeros[:rows]
    begin, wanted = torch.empty(2, len(all_bits), rows, dtype=torch.int32, device=x_NC.device)
    last = Last(counts, begin, wanted, near_NC, num_near, all_bits[-1])
    if can_run(x_NC.device):
        of_links = None if links is None else (links.jumps, links.num_odd, links.num_linked)
        count_digits.count_digits(x_NC, k, of_links, (begin, wanted, counts, near_NC, num_near))
        return last
    jumps, num_odd, num_linked = (x_NC, x_NC, x_NC) if links is None else links
    shift = 32
    for nth, bits in enumerate(all_bits):
        shift -= bits
        _count_digits[(triton.cdiv(num, _AT_ONCE), rows)](
            x_NC, begin, wanted, counts, near_NC, num_near, jumps, num_odd, num_linked, k, num, rows, counts.shape[2],
            EARLY, NO_LINK, NTH=nth, SHIFT=shift, BITS=bits, BITS_BEFORE=all_bits[max(0, nth - 1)],
            LINKS=links is not None, FEW=_FEW, M=_AT_ONCE, num_warps=8,
        )  # fmt: skip
    return last


def digits_of(last: Last) -> dict[str, int]:
    """Constants of `last_of_row`."""
    return {"NTH": len(last.counts) - 1, "BITS": last.last_bits}


def kth_smallest(x_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `torch.kthvalue` along rows, of int32, contiguous: [N, 1]; and which of equal ones it is, from 1."""
    rows = x_NC.shape[0]
    last = find_last(x_NC, k, x_NC.new_zeros(room_to_count(rows, x_NC.device)), torch.empty_like(x_NC))
    value, nth = x_NC.new_empty((2, rows, 1))
    _write_last[(rows,)](
        last.counts, last.begin, last.wanted, value, nth, rows, last.counts.shape[2], **digits_of(last), num_warps=4
    )
    return value, nth


def running_sum(x_NC: Tensor) -> Tensor:
    """As `cumsum` along rows, int32, contiguous."""
    num = x_NC.shape[1]
    pieces = F.pad(x_NC, (0, -num % _PIECE)).unflatten(1, (-1, _PIECE)).cumsum(-1, dtype=torch.int32)
    ends = pieces[..., -1]
    before = ends.cumsum(-1, dtype=torch.int32) - ends
    summed: Tensor = (pieces + before[..., None]).flatten(1)[:, :num]
    return summed.contiguous()

"""The k-th smallest number of long rows, and sums that run along them: a library gives each row one block of a GPU.

A k-th number is found digit by digit: counts of all digits of 8 bits, the digit in which the k-th lies, then the next
one among the numbers that begin so. Sums run along pieces of a row first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_DIGITS = 256
_AT_ONCE = 4096
_FEW = 128
"""Of a program; as many are counted one by one, for a histogram takes as long for none as for all."""
_PIECE = 1024


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _next_digit(counts, begin, wanted, FIRST: tl.constexpr, DIGITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """How the wanted number of a row begins, one digit more than before, and which one it is among those.

    Args:
        counts: Of digits of numbers that begin so, of this row.
        begin: Of this row; nothing before the first digit.
        wanted: From 1.
    """
    bin = tl.arange(0, DIGITS)
    count = tl.load(counts + bin)
    is_before = tl.cumsum(count, 0) < wanted
    digit = tl.sum(is_before.to(tl.int32), 0)
    digit = digit - DIGITS // 2 if FIRST else begin * DIGITS + digit
    return digit, wanted - tl.sum(tl.where(is_before, count, 0), 0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _count_digits(  # type: ignore[no-untyped-def]
    x, begin, wanted, counts, k, num, rows,
    NTH: tl.constexpr, DIGITS: tl.constexpr, FEW: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """How often each digit comes in M numbers of a row, of those that begin as the digits before say.

    Each program looks at what was counted before by itself; what the row begins with is written once, for the next.
    """
    SHIFT: tl.constexpr = 24 - 8 * NTH
    at = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    value = tl.load(x + row * num + at, mask=at < num, other=0)
    is_asked = at < num
    digit = (value >> SHIFT) & (DIGITS - 1)
    own = counts + (NTH * rows + row) * DIGITS
    if NTH == 0:
        digit = digit ^ (DIGITS // 2)  # negative numbers first
    else:
        before = (NTH - 1) * rows + row
        if NTH == 1:
            start, nth = _next_digit(own - rows * DIGITS, 0, k, True, DIGITS)
        else:
            start, nth = _next_digit(
                own - rows * DIGITS, tl.load(begin + before), tl.load(wanted + before), False, DIGITS
            )
        if tl.program_id(0) == 0:
            tl.store(begin + before + rows, start)
            tl.store(wanted + before + rows, nth)
        is_asked &= (value >> (SHIFT + 8)) == start
    num_asked = tl.sum(is_asked.to(tl.int32), 0)
    if num_asked > FEW:
        found = tl.histogram(digit, DIGITS, mask=is_asked)
        tl.atomic_add(own + tl.arange(0, DIGITS), found, mask=found > 0, sem="relaxed")
    elif num_asked > 0:  # behind the second digit
        tl.atomic_add(own + digit, 1, mask=is_asked, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _take_last_digit(counts, begin, wanted, rows, DIGITS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    at = 3 * rows + row
    start, nth = _next_digit(counts + at * DIGITS, tl.load(begin + at), tl.load(wanted + at), False, DIGITS)
    tl.store(begin + row, start)
    tl.store(wanted + row, nth)


def kth_smallest(x_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `torch.kthvalue` along rows, of int32, contiguous: [N, 1]; and which of equal ones it is, from 1."""
    rows, num = x_NC.shape
    assert x_NC.is_contiguous()
    assert 1 <= k <= num
    counts = torch.zeros(4, rows, _DIGITS, dtype=torch.int32, device=x_NC.device)
    begin, wanted = (torch.empty(4, rows, 1, dtype=torch.int32, device=x_NC.device) for _ in range(2))
    for nth in range(4):
        _count_digits[(triton.cdiv(num, _AT_ONCE), rows)](
            x_NC, begin, wanted, counts, k, num, rows, NTH=nth, DIGITS=_DIGITS, FEW=_FEW, M=_AT_ONCE, num_warps=8
        )
    _take_last_digit[(rows,)](counts, begin, wanted, rows, DIGITS=_DIGITS, num_warps=4)
    return begin[0], wanted[0]


def running_sum(x_NC: Tensor) -> Tensor:
    """As `cumsum` along rows, int32, contiguous."""
    num = x_NC.shape[1]
    pieces = F.pad(x_NC, (0, -num % _PIECE)).unflatten(1, (-1, _PIECE)).cumsum(-1, dtype=torch.int32)
    ends = pieces[..., -1]
    before = ends.cumsum(-1, dtype=torch.int32) - ends
    summed: Tensor = (pieces + before[..., None]).flatten(1)[:, :num]
    return summed.contiguous()

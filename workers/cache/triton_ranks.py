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
def _count_digits(  # type: ignore[no-untyped-def]
    x, begin, counts, num, SHIFT: tl.constexpr, DIGITS: tl.constexpr, FEW: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """How often each digit comes in M numbers of a row, of those that begin as those before found."""
    at = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1).to(tl.int64)
    value = tl.load(x + row * num + at, mask=at < num, other=0)
    is_asked = at < num
    digit = (value >> SHIFT) & (DIGITS - 1)
    if SHIFT == 24:
        digit = digit ^ (DIGITS // 2)  # negative numbers first
    else:
        is_asked &= (value >> (SHIFT + 8)) == tl.load(begin + row)
    num_asked = tl.sum(is_asked.to(tl.int32), 0)
    if num_asked > FEW:
        found = tl.histogram(digit, DIGITS, mask=is_asked)
        tl.atomic_add(counts + row * DIGITS + tl.arange(0, DIGITS), found, mask=found > 0, sem="relaxed")
    elif num_asked > 0:  # behind the second digit
        tl.atomic_add(counts + row * DIGITS + digit, 1, mask=is_asked, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _take_digit(counts, begin, wanted, FIRST: tl.constexpr, DIGITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The digit in which the wanted number lies; which one it is among those."""
    row = tl.program_id(0).to(tl.int64)
    bin = tl.arange(0, DIGITS)
    count = tl.load(counts + row * DIGITS + bin)
    tl.store(counts + row * DIGITS + bin, tl.zeros_like(count))
    k = tl.load(wanted + row)
    is_before = tl.cumsum(count, 0) < k
    digit = tl.sum(is_before.to(tl.int32), 0)
    tl.store(wanted + row, k - tl.sum(tl.where(is_before, count, 0), 0))
    if FIRST:
        tl.store(begin + row, digit - DIGITS // 2)
    else:
        tl.store(begin + row, tl.load(begin + row) * DIGITS + digit)


def kth_smallest(x_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `torch.kthvalue` along rows, of int32, contiguous: [N, 1]; and which of equal ones it is, from 1."""
    rows, num = x_NC.shape
    assert x_NC.is_contiguous()
    assert 1 <= k <= num
    counts = torch.zeros(rows, _DIGITS, dtype=torch.int32, device=x_NC.device)
    begin = torch.zeros(rows, 1, dtype=torch.int32, device=x_NC.device)
    wanted = torch.full_like(begin, k)
    for shift in (24, 16, 8, 0):
        _count_digits[(triton.cdiv(num, _AT_ONCE), rows)](
            x_NC, begin, counts, num, SHIFT=shift, DIGITS=_DIGITS, FEW=_FEW, M=_AT_ONCE, num_warps=8
        )
        _take_digit[(rows,)](counts, begin, wanted, FIRST=shift == 24, DIGITS=_DIGITS, num_warps=4)
    return begin, wanted


def running_sum(x_NC: Tensor) -> Tensor:
    """As `cumsum` along rows, int32, contiguous."""
    num = x_NC.shape[1]
    pieces = F.pad(x_NC, (0, -num % _PIECE)).unflatten(1, (-1, _PIECE)).cumsum(-1, dtype=torch.int32)
    ends = pieces[..., -1]
    before = ends.cumsum(-1, dtype=torch.int32) - ends
    summed: Tensor = (pieces + before[..., None]).flatten(1)[:, :num]
    return summed.contiguous()

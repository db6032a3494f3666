"""Memory used again: on a CPU, touching fresh memory costs several times what is then written into it.

On CUDA torch's own allocator does this, so nothing is kept for it here.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import torch
from torch import Tensor

_MAX_WASTE = 1.5
"""A buffer serves a request while it is at most this many times as long."""


class Buffers:
    """Flat buffers that were given back, up to a number of bytes; the longest unused go first."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        self._max_bytes, self._num_bytes, self._num_given = max_bytes, 0, 0
        self._free: dict[int, Tensor] = {}
        """By the number under which they were given, in that order."""
        self._lengths: dict[torch.dtype, list[tuple[int, int]]] = {}
        """(length, number) of each, shortest first."""

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory of the dtype and device of `like`; ordinary also in inference mode."""
        length = torch.Size(shape).numel()
        lengths = self._lengths.get(like.dtype, [])
        place = bisect_left(lengths, (length, 0))
        if place < len(lengths):
            found, number = lengths[place]
            if found <= _MAX_WASTE * length:
                return self._pop(number)[:length].view(shape)
        with torch.inference_mode(False):
            return torch.empty(length, dtype=like.dtype, device=like.device).view(shape)

    def give(self, tensor: Tensor) -> None:
        """Nobody reads this any more."""
        if tensor.device.type != "cpu" or tensor.is_inference() or tensor.requires_grad:
            return
        whole = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        buffer = self._free[self._num_given] = tensor.as_strided((whole,), (1,), 0)
        insort(self._lengths.setdefault(buffer.dtype, []), (whole, self._num_given))
        self._num_given += 1
        self._num_bytes += buffer.nbytes
        while self._num_bytes > self._max_bytes:
            self._pop(next(iter(self._free)))

    def _pop(self, number: int) -> Tensor:
        buffer = self._free.pop(number)
        lengths = self._lengths[buffer.dtype]
        del lengths[bisect_left(lengths, (buffer.numel(), number))]
        self._num_bytes -= buffer.nbytes
        return buffer

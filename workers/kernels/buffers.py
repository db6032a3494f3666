"""Memory used again: on a CPU, touching fresh memory costs several times what is then written into it.

On CUDA torch's own allocator does this, so nothing is kept for it here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_WASTE = 1.5
"""A buffer serves a request while it is at most this many times as long."""


class Buffers:
    """Flat buffers that were given back, up to a number of bytes; the longest unused go first."""

    def __init__(self, max_bytes: int = 2**30) -> None:
        self._max_bytes = max_bytes
        self._free: list[Tensor] = []

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory of the dtype and device of `like`; ordinary also in inference mode."""
        length = torch.Size(shape).numel()
        fitting = [
            (buffer.numel(), place)
            for place, buffer in enumerate(self._free)
            if buffer.dtype == like.dtype and length <= buffer.numel() <= _MAX_WASTE * length
        ]
        if fitting:
            return self._free.pop(min(fitting)[1])[:length].view(shape)
        with torch.inference_mode(False):
            return torch.empty(length, dtype=like.dtype, device=like.device).view(shape)

    def give(self, tensor: Tensor) -> None:
        """Nobody reads this any more."""
        if tensor.device.type != "cpu" or tensor.is_inference() or tensor.requires_grad:
            return
        whole = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        self._free.append(tensor.as_strided((whole,), (1,), 0))
        while sum(buffer.nbytes for buffer in self._free) > self._max_bytes:
            self._free.pop(0)

"""Keys and values in few bits: one bfloat16 scale per group of channels, as many codes to a byte as fit.

`model` keeps what it is given. `int8` has one scale per vector; `int4` and `int3` one per 32 channels, with levels half
a step off zero, so that all codes are used. Writing what was read changes nothing, so rounding does not add up over
copies. Keys have most of their length in common: stored as differences from the mean of the first ones (`centred`) they
need up to two bits less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Storage = Literal["model", "int8", "int4", "int3"]
_BITS = {"int8": 8, "int4": 4, "int3": 3}
_SCALE_CHANNELS = 32
"""Channels that share a scale in `int4` and `int3`: 0.5 bits more per channel."""


class VectorStore:
    """[B, N, C] vectors of D channels in one storage form; slots are written and read by index.

    Args:
        shape_BNCD: Batch, heads, slots, channels.
        storage: Form; `int4` needs an even number of channels, `int3` a multiple of 8.
        dtype: What reads return, and how `model` stores.
        device: Where the slots lie.
        centred: Store differences from the mean of what is written first. Only for vectors that are never written again
            after they were read: to add the mean rounds them in `dtype`.
    """

    def __init__(
        self,
        shape_BNCD: tuple[int, int, int, int],
        storage: Storage,
        dtype: torch.dtype,
        device: torch.device,
        *,
        centred: bool = False,
    ) -> None:
        *slots, dim = shape_BNCD
        self.storage, self.dtype, self._dim = storage, dtype, dim
        self._group = dim if storage == "int8" else math.gcd(dim, _SCALE_CHANNELS)
        self._is_centred = centred and storage != "model"
        code_dtype = {"model": dtype, "int8": torch.int8}.get(storage, torch.uint8)
        self._code = torch.zeros((*slots, _code_width(dim, storage)), dtype=code_dtype, device=device)
        groups = 0 if storage == "model" else dim // self._group
        self._scale = torch.zeros((*slots, groups), dtype=torch.bfloat16, device=device)
        self._centre_BN1D = torch.zeros((*slots[:2], 1, dim), device=device)
        self._has_centre = False

    @staticmethod
    def bytes_per_vector(dim: int, storage: Storage, dtype: torch.dtype) -> int:
        """Bytes of one stored vector with its scales."""
        if storage == "model":
            return dim * dtype.itemsize
        scales = 1 if storage == "int8" else dim // math.gcd(dim, _SCALE_CHANNELS)
        return _code_width(dim, storage) + 2 * scales

    @property
    def vector_bytes(self) -> int:
        """Of one slot."""
        return self.bytes_per_vector(self._dim, self.storage, self.dtype)

    def read(self, stop: int, out_BNCD: Tensor | None = None) -> Tensor:
        """The first `stop` slots, [B, N, stop, D]: a view of the store where it can be, or written to `out_BNCD`."""
        code, scale = self._code[:, :, :stop], self._scale[:, :, :stop]
        if out_BNCD is None:
            return self._decode(code, scale)
        return out_BNCD.copy_(self._decode(code, scale))

    def gather(self, slot_BNR: Tensor) -> Tensor:
        """The vectors of these slots, [B, N, R, D]."""
        code, scale = (x.gather(2, _widen(slot_BNR, x)) for x in (self._code, self._scale))
        return self._decode(code, scale)

    def write(self, slot_BNR: Tensor, x_BNRD: Tensor) -> None:
        """Replace these slots; where a slot is named twice, either vector may win."""
        if self._is_centred and not self._has_centre:
            self._centre_BN1D, self._has_centre = x_BNRD.float().mean(2, keepdim=True), True
        code, scale = self._encode(x_BNRD)
        self._code.scatter_(2, _widen(slot_BNR, code), code)
        self._scale.scatter_(2, _widen(slot_BNR, scale), scale)

    def move(self, source_BNR: Tensor, slot_BNR: Tensor) -> None:
        """Put what lies in one slot into another, bit for bit; all slots that are not named hold zero."""
        moved = [(x, x.gather(2, _widen(source_BNR, x))) for x in (self._code, self._scale)]
        self.clear()
        for x, content in moved:
            x.scatter_(2, _widen(slot_BNR, content), content)

    def clear(self) -> None:
        """All slots hold zero (or the centre)."""
        (self._code if self.storage == "model" else self._scale).zero_()

    def state(self) -> Mapping[str, Tensor]:
        """Codes and scales, as they lie."""
        return {"code": self._code, "scale": self._scale} | ({"centre": self._centre_BN1D} if self._has_centre else {})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over codes and scales (copied)."""
        self._code, self._scale = state["code"].clone(), state["scale"].clone()
        self._has_centre = "centre" in state
        if self._has_centre:
            self._centre_BN1D = state["centre"].clone()

    def _encode(self, x_BNRD: Tensor) -> tuple[Tensor, Tensor]:
        if self.storage == "model":
            return x_BNRD.to(self.dtype), self._scale.new_zeros((*x_BNRD.shape[:-1], 0))
        x = x_BNRD.float()
        if self._is_centred:
            x = x - self._centre_BN1D
        x = x.unflatten(-1, (-1, self._group))
        # The largest channel always gets the largest code: so encoding what was decoded finds the same scale again.
        half = 2 ** (_BITS[self.storage] - 1)
        largest = half - 1 if self.storage == "int8" else half - 0.5
        scale = (x.abs().amax(-1) / largest).to(torch.bfloat16)
        steps = x / scale.float().clamp(min=1e-30)[..., None]
        if self.storage == "int8":
            return steps.round().clamp(1 - half, half - 1).flatten(-2).to(torch.int8), scale
        code = (steps - 0.5).round().clamp(-half, half - 1).flatten(-2) + half
        return _pack(code.to(torch.uint8), self.storage), scale

    def _decode(self, code: Tensor, scale: Tensor) -> Tensor:
        if self.storage == "model":
            return code
        wide = code if self.storage == "int8" else _unpack(code, self.storage)
        x: Tensor = wide.to(self.dtype)
        if self.storage != "int8":
            x = x - (2 ** (_BITS[self.storage] - 1) - 0.5)
        x = (x.unflatten(-1, (-1, self._group)) * scale.to(self.dtype)[..., None]).flatten(-2)
        return x + self._centre_BN1D.to(self.dtype) if self._is_centred else x


def _code_width(dim: int, storage: Storage) -> int:
    """Elements of a vector's codes."""
    return dim if storage in ("model", "int8") else dim * _BITS[storage] // 8


def _pack(code: Tensor, storage: Storage) -> Tensor:
    """Codes of 4 or 3 bits, uint8, side by side in bytes."""
    if storage == "int4":
        return code[..., 0::2] | (code[..., 1::2] << 4)
    shift = 3 * torch.arange(8, device=code.device, dtype=torch.int32)
    word = (code.unflatten(-1, (-1, 8)).to(torch.int32) << shift).sum(-1, dtype=torch.int32)
    return torch.stack((word & 255, (word >> 8) & 255, word >> 16), -1).flatten(-2).to(torch.uint8)


def _unpack(code: Tensor, storage: Storage) -> Tensor:
    if storage == "int4":
        return torch.stack((code & 15, code >> 4), dim=-1).flatten(-2)
    low, middle, high = code.unflatten(-1, (-1, 3)).to(torch.int32).unbind(-1)
    word = low | (middle << 8) | (high << 16)
    shift = 3 * torch.arange(8, device=code.device, dtype=torch.int32)
    bits: Tensor = (word[..., None] >> shift) & 7
    return bits.flatten(-2).to(torch.uint8)


def _widen(slot_BNR: Tensor, like: Tensor) -> Tensor:
    return slot_BNR[..., None].expand(*slot_BNR.shape, like.shape[-1])

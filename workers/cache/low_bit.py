"""Keys and values in few bits: symmetric codes with one bfloat16 scale per group of channels.

`model` keeps what it is given. `int8` has one scale per vector, `int4` one per 32 channels and two codes in a byte.
In float32 writing what was read changes nothing (in bfloat16 some scales are rounded anew:
`table_codes.py` keeps what it is made of instead); slots that move do so as codes, so rounding does not add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from workers.rows import put_slots, take_slots

Storage = Literal["model", "int8", "int4"]
_INT4_CHANNELS = 32
"""Channels that share a scale in `int4`: 0.5 bits more per channel."""
_RUN_BYTES = {"cpu": 2**19, "cuda": 2**26}
"""Unpacked at once, where many vectors are gone through: on a CPU they stay in its cache, a GPU wants few calls."""


class VectorStore:
    """[B, N, C] vectors of D channels in one storage form; slots are written and read by index.

    Args:
        shape_BNCD: Batch, heads, slots, channels.
        storage: Form; `int4` needs an even number of channels.
        dtype: What reads return, and how `model` stores.
        device: Where the slots lie.
    """

    def __init__(
        self, shape_BNCD: tuple[int, int, int, int], storage: Storage, dtype: torch.dtype, device: torch.device
    ) -> None:
        *slots, dim = shape_BNCD
        self.storage, self.dtype, self.dim = storage, dtype, dim
        self._group = dim if storage == "int8" else math.gcd(dim, _INT4_CHANNELS)
        self._limit = 7 if storage == "int4" else 127
        width, code_dtype = {"model": (dim, dtype), "int8": (dim, torch.int8), "int4": (dim // 2, torch.uint8)}[storage]
        self._code = torch.zeros((*slots, width), dtype=code_dtype, device=device)
        groups = 0 if storage == "model" else dim // self._group
        self._scale = torch.zeros((*slots, groups), dtype=torch.bfloat16, device=device)

    @staticmethod
    def bytes_per_vector(dim: int, storage: Storage, dtype: torch.dtype) -> int:
        """Bytes of one stored vector with its scales."""
        if storage == "model":
            return dim * dtype.itemsize
        return dim + 2 if storage == "int8" else dim // 2 + 2 * (dim // math.gcd(dim, _INT4_CHANNELS))

    @property
    def slots_at_once(self) -> int:
        """How many slots of all heads to go through at a time."""
        batch, heads = self._code.shape[:2]
        most = _RUN_BYTES.get(self._code.device.type, _RUN_BYTES["cpu"])
        return max(1, most // (batch * heads * self.dim * self.dtype.itemsize))

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return self._code.nbytes + self._scale.nbytes

    def read(self, stop: int, out_BNCD: Tensor | None = None) -> Tensor:
        """The first `stop` slots, [B, N, stop, D]: a view of the store where it can be, or written to `out_BNCD`."""
        code, scale = self._code[:, :, :stop], self._scale[:, :, :stop]
        if out_BNCD is None:
            return self._decode(code, scale)
        return self._decode_into(code, scale, out_BNCD)

    def take(self, slot_RL: Tensor, row_R: Tensor, out_RLD: Tensor | None = None) -> Tensor:
        """The vectors of these slots of some rows (batch times heads), [R, L, D]; written to `out_RLD` if given."""
        line = (slot_RL + (row_R * self._code.shape[2])[:, None]).flatten()
        code, scale = (
            x.view(-1, x.shape[-1]).index_select(0, line).view(*slot_RL.shape, -1) if x.shape[-1] else x[0, 0, :1]
            for x in (self._code, self._scale)
        )
        return self._decode(code, scale) if out_RLD is None else self._decode_into(code, scale, out_RLD)

    def read_run(self, start: int, stop: int, out_BNKD: Tensor | None = None) -> Tensor:
        """Slots from `start` up to `stop`, [B, N, K, D]; written to `out_BNKD` if given."""
        code, scale = self._code[:, :, start:stop], self._scale[:, :, start:stop]
        return self._decode(code, scale) if out_BNKD is None else self._decode_into(code, scale, out_BNKD)

    def gather(self, slot_BNR: Tensor, out_BNRD: Tensor | None = None) -> Tensor:
        """The vectors of these slots, [B, N, R, D]; written to `out_BNRD` if given."""
        code, scale = (take_slots(x, slot_BNR) for x in (self._code, self._scale))
        return self._decode(code, scale) if out_BNRD is None else self._decode_into(code, scale, out_BNRD)

    def write(self, slot_BNR: Tensor, x_BNRD: Tensor) -> None:
        """Replace these slots; where a slot is named twice, either vector may win."""
        for x, new in zip((self._code, self._scale), self._encode(x_BNRD), strict=True):
            put_slots(x, slot_BNR, new)

    def rearrange(self, source_BNR: Tensor) -> None:
        """The first slots get what lies in these, bit for bit; -1 and all slots behind them get zero."""
        is_any = (source_BNR >= 0)[..., None]
        for x in (self._code, self._scale):
            x[:, :, : source_BNR.shape[2]] = take_slots(x, source_BNR.clamp(min=0)) * is_any
            x[:, :, source_BNR.shape[2] :] = 0

    def state(self) -> Mapping[str, Tensor]:
        """Codes and scales, as they lie."""
        return {"code": self._code, "scale": self._scale}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over codes and scales, copied to where the own ones lie."""
        self._code.copy_(state["code"])
        self._scale.copy_(state["scale"])

    def _encode(self, x_BNRD: Tensor) -> tuple[Tensor, Tensor]:
        if self.storage == "model":
            return x_BNRD.to(self.dtype), self._scale.new_zeros((*x_BNRD.shape[:-1], 0))
        x = x_BNRD.float().unflatten(-1, (-1, self._group))
        # The largest channel always gets the largest code: so encoding what was decoded finds the same scale again.
        scale = (x.abs().amax(-1) / self._limit).to(torch.bfloat16)
        code = (x / scale.float().clamp(min=1e-30)[..., None]).round().clamp(-self._limit, self._limit).flatten(-2)
        if self.storage == "int8":
            return code.to(torch.int8), scale
        return pack_halves(code), scale

    def _decode(self, code: Tensor, scale: Tensor) -> Tensor:
        if self.storage == "model":
            return code
        if self.storage == "int4":
            out = torch.empty((*code.shape[:-1], self.dim), dtype=self.dtype, device=code.device)
            return self._scale_halves(code, scale, out)
        wide = code.to(self.dtype) if code.is_cpu else code
        x: Tensor = wide.unflatten(-1, (-1, self._group)) * scale.to(self.dtype)[..., None]
        return x.flatten(-2)

    def _decode_into(self, code: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        if self.storage == "int8" and out.is_cpu:  # there a product of two dtypes is four times slower than this
            return out.copy_(code).mul_(scale.to(self.dtype))
        if self.storage == "int8":
            return torch.mul(code, scale.to(self.dtype), out=out)
        if self.storage == "int4":
            return self._scale_halves(code, scale, out)
        return out.copy_(code)

    def _scale_halves(self, code: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """`int4`, in place."""
        unpack_halves(code, out).unflatten(-1, (-1, self._group)).mul_(scale.to(self.dtype)[..., None])
        return out


def pack_halves(code_RD: Tensor) -> Tensor:
    """Whole numbers in [-8, 7], two in a byte: the first half of the channels in the low bits."""
    low, high = (code_RD + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def unpack_halves(code_RB: Tensor, out_RD: Tensor) -> Tensor:
    """The whole numbers again, written to `out_RD`, which may be a view."""
    low, high = out_RD.chunk(2, dim=-1)
    low.copy_(code_RB & 15)
    high.copy_(code_RB >> 4)
    return out_RD.sub_(8)

"""What each attention kernel can compute on any hardware at all: dtypes, head dimensions, keys that stand for several.

Loads without torch, so that a job whose kernel cannot do its model is refused before anything is started. What a GPU
must be for it is in `kernels/select.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.config import KernelName

_HALF = ("bfloat16", "float16")
_PLAIN = ("float32", *_HALF)
_ANY_HEAD_DIM = range(1, 4097)


@dataclass(frozen=True)
class KernelLimits:
    """Of one kernel."""

    dtypes: tuple[str, ...]
    head_dims: range | tuple[int, ...]
    adds_log_mass: bool = True

    def why_not(self, dtype: str, head_dim: int, *, merges: bool) -> str | None:
        """The first thing that it cannot do, with the value asked for and those allowed."""
        if dtype not in self.dtypes:
            return f"backbone.dtype is {dtype}, it computes in {', '.join(self.dtypes)}"
        if head_dim not in self.head_dims:
            return f"the head dimension of backbone.name is {head_dim}, it takes {_dims(self.head_dims)}"
        if merges and not self.adds_log_mass:
            return "cache.kind merges keys, and it cannot add log m"
        return None


KERNEL_LIMITS: Mapping[KernelName, KernelLimits] = {
    "flash-attn-4": KernelLimits(_HALF, range(8, 129, 8)),
    "flashinfer": KernelLimits(_HALF, (64, 128, 256), adds_log_mass=False),
    "flash-attn-3": KernelLimits(_HALF, range(8, 241, 8)),
    "sdpa": KernelLimits(_PLAIN, _ANY_HEAD_DIM),
    "flash-attn-2": KernelLimits(_HALF, range(8, 241, 8)),
    "triton": KernelLimits(_PLAIN, range(16, 257, 8)),
    "flex": KernelLimits(_PLAIN, range(16, 257, 16)),
    "reference": KernelLimits((*_PLAIN, "float64"), _ANY_HEAD_DIM),
}


def _dims(dims: range | tuple[int, ...]) -> str:
    if isinstance(dims, tuple):
        return ", ".join(map(str, dims))
    return f"{dims[0]} to {dims[-1]}" + (f" in steps of {dims.step}" if dims.step > 1 else "")

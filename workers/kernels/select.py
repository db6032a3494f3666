"""Which kernel computes attention here: resolved once, at load, or refused with the reason."""

from __future__ import annotations

from typing import Literal

import torch

from workers.contracts import Kernel
from workers.errors import KernelUnavailable
from workers.kernels.reference import ReferenceKernel
from workers.kernels.sdpa import SdpaKernel

SDPA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select_kernel(name: Literal["auto", "reference", "sdpa"], device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel of that name; `auto` is the fastest that can run here.

    Raises:
        KernelUnavailable: It cannot compute on this device or in this dtype; the message says why.
    """
    if name == "reference":
        return ReferenceKernel()
    why_not = _why_not_sdpa(device, dtype)
    if why_not is None:
        return SdpaKernel()
    if name == "auto":
        return ReferenceKernel()
    raise KernelUnavailable(f"kernel.name: {name!r} cannot run here: {why_not}")


def _why_not_sdpa(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"it computes on cpu and cuda, not on {device.type}"
    if dtype not in SDPA_DTYPES:
        return f"it computes in {', '.join(map(str, SDPA_DTYPES))}, not in {dtype}"
    return None

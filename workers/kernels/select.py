"""Which kernel computes attention here: resolved once, at load, or refused with the reason.

What a kernel can do is data (`CAPABILITIES`, `kernel_limits.py`); `choose` is a function of plain values and of a way
to load a kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from workers.config import KernelName
from workers.contracts import Kernel
from workers.errors import KernelUnavailable
from workers.kernel_limits import KERNEL_LIMITS

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)
_CUDNN_FROM = (9, 0)


@dataclass(frozen=True)
class Hardware:
    """Where attention is to run."""

    device_type: str
    compute: tuple[int, int] | None = None
    """CUDA compute capability."""

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        return cls(device.type, torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


@dataclass(frozen=True)
class KernelNeed:
    """What a render asks of its kernel."""

    dtype: torch.dtype
    head_dim: int
    log_mass: bool = False
    """Some keys stand for several."""
    tiles: bool = False
    """Queries see some tiles of the keys."""


ComputeRange = tuple[tuple[int, int], tuple[int, int]]
"""Lowest and highest CUDA compute capability."""


class Capability(NamedTuple):
    """What one kernel can do."""

    name: KernelName
    devices: tuple[str, ...]
    compute: ComputeRange
    log_mass: ComputeRange
    """On which of those GPUs it can add log m, if it can (`kernel_limits.py`)."""
    tiles: ComputeRange


_ALL: ComputeRange = ((0, 0), (99, 9))
_FROM_AMPERE: ComputeRange = ((8, 0), (99, 9))
_TO_HOPPER: ComputeRange = ((8, 0), (9, 0))
_HOPPER: ComputeRange = ((9, 0), (9, 0))
# Best first for a render without tiles, as measured on an H100. FlashAttention-4 knows 128 + 16 channels on Hopper
# alone, and what gathers tiles needs log m for the padding.
CAPABILITIES: tuple[Capability, ...] = (
    Capability("flash-attn-4", ("cuda",), ((9, 0), (11, 9)), _HOPPER, _HOPPER),
    Capability("flashinfer", ("cuda",), _TO_HOPPER, _ALL, _TO_HOPPER),
    Capability("flash-attn-3", ("cuda",), _HOPPER, _HOPPER, _HOPPER),
    Capability("sdpa", ("cpu", "cuda"), _FROM_AMPERE, _ALL, _ALL),
    Capability("flash-attn-2", ("cuda",), _TO_HOPPER, _ALL, _ALL),
    Capability("triton", ("cuda",), _FROM_AMPERE, _ALL, _ALL),
    Capability("flex", ("cpu", "cuda"), _FROM_AMPERE, _ALL, _ALL),
    Capability("reference", ("cpu", "cuda", "mps"), _ALL, _ALL, _ALL),
)
_WITH_TILES: tuple[KernelName, ...] = ("flash-attn-4", "flashinfer", "triton", "flash-attn-3", "sdpa")
"""Those that skip tiles before those that gather."""


class Choice(NamedTuple):
    """The kernel, and why those that would have come before it are not it."""

    kernel: Kernel
    refused: tuple[tuple[str, str], ...]


Load = Callable[[KernelName, Hardware, KernelNeed], Kernel]
"""Raises ImportError where the package is missing."""


def select_kernel(name: KernelName, device: torch.device, need: KernelNeed) -> Kernel:
    """The kernel of that name; `auto` is the fastest that can do all that is needed. Logs the choice in one line.

    Raises:
        KernelUnavailable: It cannot run here or cannot do what is needed; the message says why.
    """
    choice = choose(name, Hardware.of(device), need, load_kernel)
    because = "".join(f"; not {other}: {reason}" for other, reason in choice.refused)
    logger.info("attention kernel %s%s", choice.kernel.version, because)
    return choice.kernel


def choose(name: KernelName, hardware: Hardware, need: KernelNeed, load: Load) -> Choice:
    """`select_kernel` for any hardware."""
    refused: list[tuple[str, str]] = []
    for capability in _order(name, need):
        reason = why_not(capability, hardware, need)
        if reason is None:
            try:
                return Choice(load(capability.name, hardware, need), tuple(refused))
            except ImportError as error:
                reason = f"its package cannot be imported ({error})"
        refused.append((capability.name, reason))
    if name != "auto":
        raise KernelUnavailable(f"kernel.name: {name!r} cannot run here: {refused[0][1]}")
    listed = "; ".join(f"{other}: {reason}" for other, reason in refused)
    raise KernelUnavailable(f"kernel.name: 'auto' found no kernel that can run here: {listed}")


def why_not(capability: Capability, hardware: Hardware, need: KernelNeed) -> str | None:
    """The first thing that it cannot do, with the value asked for and those allowed."""
    if hardware.device_type not in capability.devices:
        return f"it computes on {' and '.join(capability.devices)}, not on {hardware.device_type}"
    if not _covers(capability.compute, hardware):
        return f"it needs compute capability {_span(capability.compute)}, {_this(hardware)}"
    dtype = str(need.dtype).removeprefix("torch.")
    beyond = KERNEL_LIMITS[capability.name].why_not(dtype, need.head_dim, merges=need.log_mass)
    if beyond is not None:
        return beyond
    if need.log_mass and not _covers(capability.log_mass, hardware):
        return f"cache.kind merges keys, and it adds log m on {_span(capability.log_mass)} alone, {_this(hardware)}"
    if need.tiles and not _covers(capability.tiles, hardware):
        return f"attention.kind is sparse, and it takes tiles on {_span(capability.tiles)} alone, {_this(hardware)}"
    return None


def load_kernel(name: KernelName, hardware: Hardware, need: KernelNeed) -> Kernel:
    """Import and make a kernel; packages are imported here and nowhere earlier."""
    is_hopper = hardware.compute is not None and hardware.compute[0] == 9
    match name:
        case "reference":
            from workers.kernels.reference import ReferenceKernel

            return ReferenceKernel()
        case "flash-attn-4" | "flash-attn-3" | "flash-attn-2":
            from workers.kernels.flash_attn import GENERATIONS, FlashAttnKernel

            return FlashAttnKernel(GENERATIONS[name], skips_tiles=is_hopper)
        case "flashinfer":
            from workers.kernels.flashinfer import FlashInferKernel

            return FlashInferKernel("fa3" if is_hopper else "fa2")
        case "triton":
            from workers.kernels.triton_bias import TritonKernel

            return TritonKernel()
        case "flex":
            from workers.kernels.flex import FlexKernel

            return FlexKernel(compiled=hardware.device_type == "cuda")
    from workers.kernels.sdpa import SdpaKernel

    has_cudnn = hardware.compute is not None and hardware.compute >= _CUDNN_FROM
    return SdpaKernel("cudnn" if has_cudnn and need.dtype in _HALF else "flash")


def _order(name: KernelName, need: KernelNeed) -> Iterator[Capability]:
    """Those to be tried, best first."""
    by_name = {capability.name: capability for capability in CAPABILITIES}
    if name != "auto":
        yield by_name[name]
        return
    first = _WITH_TILES if need.tiles else ()
    yield from (by_name[other] for other in first)
    yield from (capability for capability in CAPABILITIES if capability.name not in first)


def _covers(span: ComputeRange, hardware: Hardware) -> bool:
    return hardware.compute is None or span[0] <= hardware.compute <= span[1]


def _span(span: ComputeRange) -> str:
    (low, minor), (high, top_minor) = span
    return f"{low}.{minor} and later" if high == _ALL[1][0] else f"{low}.{minor} to {high}.{top_minor}"


def _this(hardware: Hardware) -> str:
    assert hardware.compute is not None, "asked only for CUDA"
    return "this GPU has {}.{}".format(*hardware.compute)

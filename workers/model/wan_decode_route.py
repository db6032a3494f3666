"""Which kernels decode Wan's pictures when nobody asks for others: the fastest that the GPU and the packages here have.

It follows from what there is and never from timing, so that all cards of one kind make the same pixels.
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor

from workers import nvrtc
from workers.model.wan_decode_weights import Route

TRITON_FROM = (8, 0)
"""Compute capability."""


class RouteChoice(NamedTuple):
    """What convolves."""

    route: Route
    line: str
    """With the reasons against faster ones."""


def find_route(weight: Tensor) -> RouteChoice:
    """For a decoder with such weights, where they are."""
    compute = torch.cuda.get_device_capability(weight.device) if weight.is_cuda else None
    return choose_route(compute, weight.dtype, has_triton=importlib.util.find_spec("triton") is not None)


def choose_route(compute: tuple[int, int] | None, dtype: torch.dtype, *, has_triton: bool) -> RouteChoice:
    """See `DecoderWeights` for the routes; "tma", "halo", "pairs" and "cudnn-tried" are for who asks for them.

    Args:
        compute: Capability of the CUDA device; None: another device.
        dtype: Of the weights.
        has_triton: Whether it is installed.
    """
    missing = "" if has_triton else "Triton is not installed"
    not_fours = _why_no_fours(compute, dtype) or missing or nvrtc.lacks_compiler()
    if not not_fours:
        return RouteChoice("fours", "VAE decodes by fours")
    not_triton = _why_no_triton(compute, dtype) or missing
    if not not_triton:
        return RouteChoice("triton", f"VAE decodes by triton; not fours: {not_fours}")
    return RouteChoice("cudnn", f"VAE decodes by cudnn; not fours: {not_fours}; not triton: {not_triton}")


def _why_no_fours(compute: tuple[int, int] | None, dtype: torch.dtype) -> str:
    if compute is None or compute[0] != 9:
        return f"it is made for compute capability 9.0, {_this(compute)}"
    return "" if dtype == torch.bfloat16 else f"it takes bfloat16, not {_name(dtype)}"


def _why_no_triton(compute: tuple[int, int] | None, dtype: torch.dtype) -> str:
    if compute is None or compute < TRITON_FROM:
        return "it needs compute capability {}.{}, {}".format(*TRITON_FROM, _this(compute))
    return "" if dtype in (torch.bfloat16, torch.float16) else f"it is faster in 16 bits alone, not in {_name(dtype)}"


def _this(compute: tuple[int, int] | None) -> str:
    return "this is no CUDA device" if compute is None else "this is {}.{}".format(*compute)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Who multiplies 8-bit floats in attention over a table: the kernel made for it, or plain torch that rounds alike."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from workers.coded_tiles import CODED_TILE
from workers.config_tiles import Fp8Attention
from workers.kernels.listed_parts import PartedAttention, make_coded, make_rounded
from workers.kernels.select import Hardware, KernelNeed
from workers.nvrtc import lacks_compiler

logger = logging.getLogger(__name__)

KERNEL_ON = (9, 0)
"""Compute capability: its instructions are in no other."""


class Fp8Choice(NamedTuple):
    """How a table's calls attend in 8-bit floats."""

    which: Fp8Attention = "none"
    why_plain: str = ""
    """Empty where the kernel runs."""

    @property
    def version(self) -> str:
        """As it stands in the manifest, after what attends in 16 bits; empty for "none"."""
        if self.which == "none":
            return ""
        calls = {"steps": "denoising steps", "all": "all calls"}[self.which]
        return f", attention in 8-bit floats in {calls}" + (" (rounded by plain torch)" if self.why_plain else "")


NO_FP8 = Fp8Choice()


def choose_fp8(
    which: Fp8Attention,
    hardware: Hardware,
    need: KernelNeed,
    tile: int,
    why_no_kernels: str,
    lacks: Callable[[], str] = lacks_compiler,
) -> Fp8Choice:
    """The kernel where it can run; says so in one line, a warning where it cannot.

    Args:
        which: As configured.
        hardware: Where.
        need: Its dtype and head dimension.
        tile: Slots of a tile.
        why_no_kernels: Why the table's own kernels do not run, which code its tiles; empty if they do.
        lacks: Asked last.
    """
    if which == "none":
        return NO_FP8
    choice = Fp8Choice(which, _why_plain(hardware, need, tile, why_no_kernels) or lacks())
    if choice.why_plain:
        logger.warning(
            "attention.fp8: %s: rounded by plain torch, which is slower here than attention.fp8: none: %s",
            *choice,
        )
    else:
        logger.info("attention.fp8: %s: by a kernel that multiplies 8-bit floats", which)
    return choice


def with_fp8(ways: PartedAttention, choice: Fp8Choice, tile: int) -> tuple[PartedAttention, PartedAttention]:
    """Of denoising steps and of clean passes, from how both attend in 16 bits."""
    if choice.which == "none":
        return ways, ways
    fp8 = make_rounded(ways, tile) if choice.why_plain else make_coded(ways)
    return fp8, fp8 if choice.which == "all" else ways


def _why_plain(hardware: Hardware, need: KernelNeed, tile: int, why_no_kernels: str) -> str:
    if hardware.device_type != "cuda":
        return f"its kernel is for cuda, not for {hardware.device_type}"
    if hardware.compute != KERNEL_ON:
        here = "unknown" if hardware.compute is None else "{}.{}".format(*hardware.compute)
        return "its kernel needs compute capability {}.{}, this GPU has {}".format(*KERNEL_ON, here)
    if need.dtype != torch.bfloat16:
        return f"its kernel takes bfloat16, not {need.dtype}".replace("torch.", "")
    if (need.head_dim, tile) != (CODED_TILE, CODED_TILE):
        return f"its kernel takes a head dimension and a tile of {CODED_TILE}, not {need.head_dim} and {tile}"
    return why_no_kernels and f"tiles are coded by kernels of the table: {why_no_kernels}"

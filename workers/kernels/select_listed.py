"""Which way of attending over listed tiles runs here: resolved once, at load, as `select.py` does it for other kernels.

`auto` falls back by capability (FlashAttention-4 on Hopper, Triton, plain torch); a name that cannot run is an error.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from workers.config import KernelName
from workers.errors import KernelUnavailable
from workers.kernels.listed_gather import attend_gathered
from workers.kernels.listed_parts import PartedAttention, make_parted
from workers.kernels.listed_tiles import AttendTable, make_attend
from workers.kernels.select import CAPABILITIES, Hardware, KernelNeed, why_not

FLASH_TILE = 128
"""FlashAttention-4 takes tiles of 128 by 128 alone."""
_ORDER: tuple[KernelName, ...] = ("flash-attn-4", "triton", "reference")


class ListedChoice(NamedTuple):
    """The way that was chosen, and why those before it were not."""

    name: KernelName
    attend: AttendTable
    refused: tuple[tuple[str, str], ...]

    @property
    def version(self) -> str:
        """As it stands in the manifest."""
        package = {"flash-attn-4": "flash-attn-4", "triton": "triton"}.get(self.name)
        try:
            number = "" if package is None else f"{package} {importlib.metadata.version(package)}, "
        except importlib.metadata.PackageNotFoundError:
            number = ""
        plain = "plain torch" if self.name == "reference" else self.name
        return f"listed tiles by {plain} ({number}torch {torch.__version__})"

    @property
    def line(self) -> str:
        """The choice in one line."""
        return self.version + "".join(f"; not {other}: {reason}" for other, reason in self.refused)


Load = Callable[[KernelName, int], AttendTable]
"""Raises ImportError where the package is missing."""


def load_attend(name: KernelName, tile: int) -> AttendTable:
    """Import and make one."""
    if name == "reference":
        return lambda q, k, v, index: attend_gathered(q, k, v, index, tile)
    assert name in ("flash-attn-4", "triton")
    return make_attend(name, tile)


def load_parted(name: KernelName, tile: int) -> PartedAttention:
    """The same way with the history apart from the rest."""
    assert name in ("flash-attn-4", "triton", "reference")
    return make_parted(name, tile)


def choose_listed(
    name: KernelName, hardware: Hardware, need: KernelNeed, tile: int, load: Load = load_attend
) -> ListedChoice:
    """The fastest way that can do what is needed, or the one that is named.

    Args:
        name: One of `config_tiles.TABLE_KERNELS`.
        hardware: Where.
        need: Its dtype and head dimension; tiles and log m are needed always.
        tile: Slots of a tile.
        load: Makes one.
    Raises:
        KernelUnavailable: The one that is named cannot run here; the message says why.
    """
    by_name = {capability.name: capability for capability in CAPABILITIES}
    needed = replace(need, log_mass=True, tiles=True)
    refused: list[tuple[str, str]] = []
    for other in _ORDER if name == "auto" else (name,):
        reason = why_not(by_name[other], hardware, needed)
        if reason is None and other == "flash-attn-4" and tile != FLASH_TILE:
            reason = f"its tiles hold {FLASH_TILE} keys, those of cache.tile {tile}"
        if reason is None:
            try:
                return ListedChoice(other, load(other, tile), tuple(refused))
            except ImportError as error:
                reason = f"its package cannot be imported ({error})"
        refused.append((other, reason))
    listed = "; ".join(f"{other}: {reason}" for other, reason in refused)
    raise KernelUnavailable(f"kernel.name: {name!r} cannot read a tile table here: {listed}")

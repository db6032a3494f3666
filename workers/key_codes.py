"""Keys of one layer of a packed tile table where they lie: what a choice of tiles reads that unpacks nothing.

The record in which `cache/packed_table.py` gives them and `attention/triton_coded_choice.py` takes them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KeyCodes(NamedTuple):
    """Views that keep their addresses; a layer is sink | history | newest chunks | chunk in hand, in whole tiles."""

    code_NCB: Tensor
    """Of the history: codes as `cache/table_codes.py` has them, uint8 if they have 4 bits."""
    largest_NCG: Tensor
    """Largest channels of their groups, bfloat16."""
    mass_NC2: Tensor
    """The channels of log m of the history."""
    end_NLW: Tensor
    """Keys beside the history as they were computed, channels of log m behind them: one run without a gap."""
    history_start: int
    """First slot of the history in the layer."""

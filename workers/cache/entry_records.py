"""Where the entries of one layer are and how much each stands for, as a reader sees them: sink, slots in use, newest.

One buffer of the table's full size, reserved once: what changes is written where it lies, and a reader gets the part
that is in use. So what a chunk needs of memory does not grow with the history.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.rows import put_slots, take_slots

CELL_UNITS = 8
"""Rows and columns are stored in eighths of a token."""
RECORD_BYTES = 3 * 4 + 4
"""Of an entry: position and log m."""


class EntryRecords:
    """The records of one layer.

    Args:
        shape_BNC: Batch, heads, slots; one more slot takes writes that are meant for nobody.
        before, behind: Entries before the slots, and the most that follow those in use.
        dtype: Of log m.
        device: Where they lie.
    """

    def __init__(
        self, shape_BNC: tuple[int, int, int], before: int, behind: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        batch, heads, slots = shape_BNC
        assert behind >= 1, "the slot for nobody lies where the newest entries of a full table begin"
        shape = (batch, heads, before + slots + behind)
        self._before, self._behind = before, behind
        self._position_BNL3 = torch.zeros((*shape, 3), device=device)
        self._log_mass_BNL = torch.full(shape, -torch.inf, dtype=dtype, device=device)
        self._slots = slice(before, before + slots + 1)

    @property
    def position_BNC3(self) -> Tensor:  # noqa: N802, letters of its axes
        """Of all slots; a view."""
        return self._position_BNL3[:, :, self._slots]

    @property
    def log_mass_BNC(self) -> Tensor:  # noqa: N802
        """Of all slots; a view."""
        return self._log_mass_BNL[:, :, self._slots]

    @property
    def num_bytes(self) -> int:
        """Reserved."""
        return self._position_BNL3.nbytes + self._log_mass_BNL.nbytes

    def write(self, slot_BNR: Tensor, position_BNR3: Tensor, m_BNR: Tensor) -> None:
        """Replace these slots."""
        time, cell = position_BNR3[..., :1].trunc(), position_BNR3[..., 1:]
        place = slot_BNR + self._before
        put_slots(self._position_BNL3, place, torch.cat((time, (cell * CELL_UNITS).round() / CELL_UNITS), -1).float())
        self._log_mass_BNL.scatter_(2, place, m_BNR.to(self._log_mass_BNL.dtype).log())

    def rearrange(self, source_BNR: Tensor, m_BNC: Tensor) -> None:
        """The first slots get the positions of these, -1 and all behind them none; all get the log of m."""
        moved = take_slots(self._position_BNL3, source_BNR.clamp(min=0) + self._before) * (source_BNR >= 0)[..., None]
        self.position_BNC3[:, :, : moved.shape[2]] = moved
        self.position_BNC3[:, :, moved.shape[2] :] = 0
        self.log_mass_BNC.copy_(m_BNC.to(self._log_mass_BNL.dtype).log())

    def begin_change(self, num_used: int) -> None:
        """Slots behind those in use hold nothing again: the newest entries stood there."""
        run = slice(self._before + num_used, self._before + num_used + self._behind)
        self._position_BNL3[:, :, run] = 0
        self._log_mass_BNL[:, :, run] = -torch.inf

    def show(self, num_used: int, first_K3: Tensor, last_K3: Tensor) -> None:
        """Put the uncompressed entries before and behind the slots in use."""
        for position_K3, start in ((first_K3, 0), (last_K3, self._before + num_used)):
            run = slice(start, start + len(position_K3))
            self._position_BNL3[:, :, run] = position_K3
            self._log_mass_BNL[:, :, run] = 0

    def read(self, num: int) -> tuple[Tensor, Tensor]:
        """position_BKN3 and log_mass_BNK of the first entries, as views; log m is -inf where a head has none."""
        return self._position_BNL3[:, :, :num].transpose(1, 2), self._log_mass_BNL[:, :, :num]

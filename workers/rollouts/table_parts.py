"""What the loop over a tile table asks of the table, and of who chooses its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from workers.key_codes import KeyCodes
from workers.rollouts.kept_history import Keys


class Table(Protocol):
    """See `workers/cache/tile_table.py`."""

    @property
    def is_packed(self) -> bool: ...

    @property
    def layers(self) -> Sequence[Keys]: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def has_merged(self) -> bool: ...

    def own(self, layer_index: int) -> tuple[Tensor, Tensor]: ...

    def note_seen(self, layer_index: int, index_NIJ: Tensor) -> None: ...

    def lay_out(self, layer_index: int, *, seen_only: bool = False) -> Keys: ...

    def lay_out_sample(self, layer_index: int, slot_R: Tensor) -> Keys: ...

    def key_codes(self, layer_index: int) -> KeyCodes | None: ...

    def remember_chunk(self, position_T3: Tensor) -> None: ...


class Chooser(Protocol):
    """See `workers/attention/tile_choice.py`."""

    sampled_slot_R: Tensor

    @property
    def num_tiles(self) -> int: ...

    @property
    def has_clean_list(self) -> bool: ...

    @property
    def has_early_list(self) -> bool: ...

    def num_slots_seen(self, *, early: bool = False) -> int: ...

    def new_list(self, num_heads: int, *, for_clean_pass: bool = False, early: bool = False) -> Tensor: ...

    def takes_codes(self, keys: KeyCodes | None) -> bool: ...

    def choose(
        self, q_QNW: Tensor, keys: Tensor | KeyCodes, index_NIJ: Tensor, clean_NIJ: Tensor | None = None
    ) -> None: ...

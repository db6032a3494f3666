"""What all sparse policies share: which run of the cache they thin out, and where tokens are.

The first keys of the cache (sink), its newest ones and the chunk's own are seen by every query; tiles apply to the
history between. So a policy is asked only what it is good at, and none is handicapped where the others are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import AttentionPlan, KeyValues, Moment, PartResult, PlanPart, Tiles


@dataclass(frozen=True)
class DenseRegion:
    """Keys that every query sees, besides those of its own chunk."""

    sink_tokens: int
    """First keys of the cache."""
    recent_tokens: int
    """Newest keys of the cache."""

    def history(self, num_cached: int) -> tuple[int, int]:
        """First and one past the last of the cached keys between sink and newest; equal where there are none."""
        start = min(self.sink_tokens, num_cached)
        return start, max(start, num_cached - self.recent_tokens)


def result_of_history(history_at: Sequence[int] | None, moment: Moment, *, has_looked: bool) -> PartResult:
    """What a call does where some denoising steps look at the history and the others take what they saw.

    Args:
        history_at: The steps that look; None: every call does. A clean pass always does, for what it writes is read
            ever after.
        moment: Of the call.
        has_looked: Whether its layer and branch have in this chunk; else there is nothing to take.
    """
    if history_at is None or moment.is_clean_pass:
        return "fresh"
    return "taken" if has_looked and moment.step_index not in history_at else "kept"


def plan_history(
    cached: KeyValues | None,
    own: KeyValues,
    span: tuple[int, int] | None,
    tiles: Tiles | None,
    result: PartResult = "fresh",
    *,
    is_whole: bool = False,
) -> AttentionPlan:
    """Everything outside of the span dense, the span by its tiles; without a span everything is dense.

    Args:
        span: The history, as `DenseRegion.history` gives it.
        tiles: What is seen of it; None leaves it out.
        result: Of the history.
        is_whole: All of it is seen, as a run of its own.
    """
    parts = [PlanPart("own", 0, own.num_tokens)]
    if cached is not None and span is None:
        parts.insert(0, PlanPart("cached", 0, cached.num_tokens))
    elif cached is not None and span is not None:
        start, stop = span
        between = [PlanPart("cached", start, stop, tiles, result)] if is_whole or tiles is not None else []
        parts = [PlanPart("cached", 0, start), *between, PlanPart("cached", stop, cached.num_tokens), *parts]
    return AttentionPlan(tuple(part for part in parts if part.stop > part.start))


@dataclass(frozen=True, eq=False)
class Places:
    """Where tokens are: time in latent frames and place within the frame, counted row by row, both float32.

    Shape [1, 1, K], or [B, N, K] where each head keeps other tokens. Entries that stand for no token are at infinity.
    """

    time: Tensor
    place: Tensor

    def order(self, by: str) -> Tensor:
        """int64: tokens sorted by time, then place ("time"), or by place, then time ("place")."""
        major, minor = (self.time, self.place) if by == "time" else (self.place, self.time)
        first = torch.argsort(minor, dim=-1, stable=True)
        return first.gather(-1, torch.argsort(major.gather(-1, first), dim=-1, stable=True))

    def sorted(self, order: Tensor) -> Places:
        return Places(self.time.gather(-1, order), self.place.gather(-1, order))


def count_columns(position_Q3: Tensor) -> int:
    """Columns of the token grid of a chunk: tokens of its first row."""
    return int((position_Q3[:, :2] == position_Q3[0, :2]).all(-1).sum())


def find_places(keys_position: Tensor, columns: int, log_mass_BNK: Tensor | None = None) -> Places:
    """Places of positions [K, 3] or [B, K, N, 3]."""
    per_head = keys_position[None, :, None] if keys_position.dim() == 2 else keys_position
    time, row, column = per_head.float().transpose(1, 2).unbind(-1)
    place = row * columns + column
    if log_mass_BNK is not None:
        empty = log_mass_BNK.isneginf()
        time, place = time.masked_fill(empty, torch.inf), place.masked_fill(empty, torch.inf)
    return Places(time, place)


def cut_tiles(x: Tensor, tile: int, fill: float) -> Tensor:
    """[..., K] as [..., J, tile]; a short last tile is filled up."""
    missing = -x.shape[-1] % tile
    tiles: Tensor = F.pad(x, (0, missing), value=fill).unflatten(-1, (-1, tile))
    return tiles

"""What a packed layer that does not merge does to take over a chunk, kernel by kernel: a part of `merge_parts.py`.

Matching is the largest part; beside it lie what is laid out before and packed after it. Partners are compared with
those that plain torch finds from the same keys.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from tests.bench.full_table import FullTable, Variants, launches, ms_of, numbers, time_rows, variant_rows
from tests.bench.history_parts import kernel_times
from tests.bench.least_work import milliseconds_of
from tests.bench.record import RESULTS
from workers.cache import triton_match
from workers.cache.partners import History, Look, find_partners
from workers.cache.table_codes import coded_bytes

_TERAFLOP_PER_S = 600
MATCH_NOTES = (
    "One layer takes over a chunk just after a merge: 4,680 keys of 12 heads, 201,240 older ones in int4. least_ms: "
    f"what bytes take, or operations at {_TERAFLOP_PER_S} TFLOP/s; before_ms: of a kernel of this name in a chunk of "
    "the rollout, a layer."
)
VARIANTS: Variants = (
    *numbers(triton_match, "TURNED_AT_ONCE", "_turn_back", (8, 32, 64)),
    *numbers(triton_match, "TURNED_AT_ONCE", "_turn_near", (8, 32, 64)),
    *launches(triton_match, "_turn_back", {"M": 32, "num_warps": 8}, {"maxnreg": 64}),
    *launches(triton_match, "_turn_near", {"num_warps": 2}),
    *numbers(triton_match, "OTHERS_AT_ONCE", "_frame_before", (32, 128)),
    *launches(triton_match, "_frame_before", {"num_stages": 2}, {"num_stages": 4}, {"num_warps": 4}),
    *(
        (
            f"_frame_before: {own} keys and {others} others at once, {warps} warps, {stages} stages",
            "_frame_before",
            {
                (triton_match, "OWN_AT_ONCE"): own,
                (triton_match, "OTHERS_AT_ONCE"): others,
                (triton_match, "_frame_before"): {"num_warps": warps, "num_stages": stages},
            },
        )
        for own, others, warps, stages in ((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (256, 32, 8, 3))
    ),
    *numbers(triton_match, "NEAR_AT_ONCE", "_near_tiles", (32, 128)),
    *launches(triton_match, "_near_tiles", {"num_stages": 2}, {"num_stages": 4}, {"num_warps": 4}),
    *launches(triton_match, "_list_nearest", {"num_warps": 1}, {"num_warps": 2}, {"num_warps": 8}),
)


class _Growing:
    """The layer after its merge, which takes over one chunk as often as one likes."""

    def __init__(self, full: FullTable) -> None:
        self._full = full
        full.merge_again()

    def absorb(self) -> None:
        full = self._full
        full.layer.pointer = full.sizes.kept_tokens
        full.table._absorb(full.layer, full.sizes.recent_start)

    @property
    def partner(self) -> Tensor:
        """Of the new keys."""
        kept = self._full.sizes.kept_tokens
        return self._full.layer.partner_NC[:, kept : kept + self._full.sizes.chunk_tokens].clone()

    def compare(self) -> tuple[float, float]:
        """Share of partners that are others than by plain torch, and how much less near all are on average."""
        full, s = self._full, self._full.sizes
        self.absorb()
        found, new = self.partner.long(), slice(s.kept_tokens, s.kept_tokens + s.chunk_tokens)
        of = full.table.lay_out(0)
        chunk = slice(s.history_start + new.start, s.history_start + new.stop)
        # What was laid out has been through codes since: compare with keys as they were.
        of.k_NLW[:, chunk] = of.k_NLW[:, s.recent_start : s.recent_start + s.chunk_tokens]
        history = History(of.k_NLW, s.history_start, of.position_NC3, of.m_NC, of.mean_NJD)
        expected, _ = find_partners(history, full.turn_back, new, Look(s.frame_tokens, s.candidate_tiles, s.tile))
        unit = full.turn_back.unit(history.keys, history.position_NC3).float()
        head = torch.arange(s.num_heads, device=found.device)[:, None]
        near, far = ((unit[:, new] * unit[head, partner]).sum(-1) for partner in (expected, found.clamp(min=0)))
        return float((found != expected).float().mean()), float((near - far).mean())


def measured_before() -> dict[str, float]:
    """Milliseconds of one layer by kernel, from the kept profile of chunks that were taken over."""
    kept = json.loads((RESULTS / "rollout-history-24gb-parts-fastar-tiles.json").read_text())["rows"]
    rows = [row for row in kept if row.get("kernel", "").startswith("chunk taken over: ")]
    return {row["kernel"].split(": ", 1)[1]: round(row["ms"] / 30, 3) for row in rows}


def _least_ms(full: FullTable) -> dict[str, float]:
    s = full.sizes
    codes, size = coded_bytes(s.head_dim, "int4"), 2
    key, unit = s.width * size, s.head_dim * size + 4
    tiles = -(-s.chunk_tokens // s.tile) + 1
    listed = tiles * (s.candidate_tiles or 0) * s.tile
    by_bytes = {
        "_turn_back": (s.chunk_tokens + s.frame_tokens) * (key + 16 + unit),
        "_turn_near": listed * (codes + 16 + unit),
        "_list_nearest": tiles * s.history_slots // s.tile * size,
        "_unpack_tiles": s.chunk_tokens * 2 * (key + unit) + s.frame_tokens * (codes + key),
        "pack_slots": s.chunk_tokens * (key + unit + 2 * codes),
    }
    by_operations = {
        "_frame_before": s.chunk_tokens * s.frame_tokens * 2 * s.head_dim,
        "_near_tiles": tiles * s.tile * listed // tiles * 2 * s.head_dim,
    }
    least = {name: milliseconds_of(s.num_heads * moved / 1e9) for name, moved in by_bytes.items()}
    return least | {name: s.num_heads * done / _TERAFLOP_PER_S / 1e9 for name, done in by_operations.items()}


def match_rows(full: FullTable) -> list[dict[str, Any]]:
    """Kernels of taking over one chunk without a merge."""
    growing = _Growing(full)
    others, loss = growing.compare()
    # Keys that are about as near differ by what bfloat16 rounds.
    is_good = others < 0.2 and abs(loss) < 1e-3
    print(f"{'good' if is_good else 'BAD'}: {others:.2%} of partners others than by plain torch, {loss:.1e} less near")
    return time_rows(kernel_times(growing.absorb, 10), _least_ms(full), measured_before())


def match_variant_rows(full: FullTable, only: str) -> list[dict[str, Any]]:
    """Of taking over a chunk, and of the kernel that is another."""
    growing = _Growing(full)
    growing.absorb()
    expected = growing.partner

    def measure(kernel: str) -> dict[str, Any]:
        growing.absorb()
        times = kernel_times(growing.absorb, 5)
        whole, same = sum(ms for ms, _ in times.values()), torch.equal(growing.partner, expected)
        return {"all_ms": round(whole, 3), "ms": ms_of(kernel, times), "same_partners": same}

    return variant_rows(VARIANTS, only, measure)

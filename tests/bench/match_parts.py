"""What packed layers that do not merge do to take over a chunk, kernel by kernel: a part of `merge_parts.py`.

As many layers at once as become full together. Partners are compared with those that plain torch finds from the same
keys, and with those of one layer by itself.
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
from workers.cache import triton_match, triton_pack, turn_chunk
from workers.cache.packed_history import PackedLayer
from workers.cache.partners import History, Look, find_partners
from workers.cache.table_codes import coded_bytes

_TERAFLOP_PER_S = 600
_LAYERS = 6
"""That become full together: of thirty a fifth, where the history has room for five chunks between merges."""
MATCH_NOTES = (
    f"{_LAYERS} layers take over a chunk just after a merge: 4,680 keys of 12 heads a layer, 201,240 older in int4; "
    "ms of a layer, calls of all together. least_ms: what bytes take, or operations at "
    f"{_TERAFLOP_PER_S} TFLOP/s; before_ms: as the kept results have it."
)
VARIANTS: Variants = (
    *numbers(triton_match, "UNIT_BYTES", ".", (20_000_000, 60_000_000)),
    ("turn_chunk: by Triton", "_turn_back", {(turn_chunk, "fits"): lambda *_: False}),
    *launches(triton_match, "_frame_before", {"num_stages": 2}, {"num_stages": 4}),
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
        for own, others, warps, stages in ((64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (256, 64, 16, 3))
    ),
    *launches(triton_match, "_list_nearest", {"num_warps": 2}, {"num_warps": 8}),
    *numbers(triton_pack, "_PACKED_AT_ONCE", "pack_slots", (8, 32)),
)


class _Growing:
    """The layer after its merge, and copies of it beside one another, which take over a chunk as often as one likes."""

    def __init__(self, full: FullTable) -> None:
        self._full = full
        full.merge_again()
        held = {name: getattr(full.layer, name) for name in (*full.table.tensors, "apart_NC")}
        copies = {name: x.repeat(_LAYERS, *(1 for _ in x.shape[1:])) for name, x in held.items()}
        position_of = dict(full.layer.position_of)
        self._layers = PackedLayer(**copies, pointer=0, num_chunks=full.layer.num_chunks, position_of=position_of)

    def absorb(self, layer: PackedLayer | None = None) -> None:
        layer = layer or self._layers
        layer.pointer = self._full.sizes.kept_tokens
        self._full.table._absorb(layer, self._full.sizes.recent_start)

    def times(self, num: int) -> dict[str, tuple[float, float]]:
        """By kernel: milliseconds of a layer, calls of all."""
        return {name: (ms / _LAYERS, calls) for name, (ms, calls) in kernel_times(self.absorb, num).items()}

    @property
    def partner(self) -> Tensor:
        """Of the new keys of all."""
        return self._partner(self._layers)

    def _partner(self, layer: PackedLayer) -> Tensor:
        kept = self._full.sizes.kept_tokens
        return layer.partner_NC[:, kept : kept + self._full.sizes.chunk_tokens].clone()

    def differ(self) -> float:
        """Share of partners that are others than those of the layer by itself."""
        self.absorb()
        self.absorb(self._full.layer)
        return float((self.partner != self._partner(self._full.layer).repeat(_LAYERS, 1)).float().mean())

    def compare(self) -> tuple[float, float]:
        """Share of partners that are others than by plain torch, and how much less near all are on average."""
        full, s = self._full, self._full.sizes
        self.absorb(full.layer)
        found, new = self._partner(full.layer).long(), slice(s.kept_tokens, s.kept_tokens + s.chunk_tokens)
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
    """Milliseconds of one layer by kernel, as the kept results have them."""
    rows = json.loads((RESULTS / "match_parts-h200.json").read_text())["rows"]
    return {row["kernel"]: row["ms"] for row in rows if "kernel" in row}


def _least_ms(full: FullTable) -> dict[str, float]:
    s = full.sizes
    codes, size, record = coded_bytes(s.head_dim, "int4"), 2, 24
    key, unit = s.width * size, s.head_dim * size
    tiles = -(-s.chunk_tokens // s.tile) + 1
    listed = tiles * (s.candidate_tiles or 0) * s.tile
    by_bytes = {
        "turn_chunk": s.chunk_tokens * (key + codes + record + unit) + s.frame_tokens * (codes + 16 + unit),
        "_list_nearest": tiles * s.history_slots // s.tile * size,
        "near_tiles": listed * (codes + 16) + s.chunk_tokens * unit,
        "pack_slots": s.chunk_tokens * (unit + codes),
    }
    by_operations = {
        "_frame_before": s.chunk_tokens * s.frame_tokens * 2 * s.head_dim,
        "near_tiles": tiles * s.tile * listed // tiles * 2 * s.head_dim,
    }
    least = {name: milliseconds_of(s.num_heads * moved / 1e9) for name, moved in by_bytes.items()}
    done = {name: s.num_heads * num / _TERAFLOP_PER_S / 1e9 for name, num in by_operations.items()}
    return {name: max(least.get(name, 0.0), done.get(name, 0.0)) for name in least | done}


def match_rows(full: FullTable) -> list[dict[str, Any]]:
    """Kernels of taking over one chunk without a merge."""
    growing = _Growing(full)
    apart = growing.differ()
    print(f"{'BAD' if apart else 'good'}: {apart:.2%} of partners others than those of a layer by itself")
    others, loss = growing.compare()
    # Keys that are about as near differ by what bfloat16 rounds.
    is_good = others < 0.2 and abs(loss) < 1e-3
    print(f"{'good' if is_good else 'BAD'}: {others:.2%} of partners others than by plain torch, {loss:.1e} less near")
    return time_rows(growing.times(5), _least_ms(full), measured_before())


def match_variant_rows(full: FullTable, only: str) -> list[dict[str, Any]]:
    """Of taking over a chunk, and of the kernel that is another."""
    growing = _Growing(full)
    growing.absorb()
    expected = growing.partner

    def measure(kernel: str) -> dict[str, Any]:
        growing.absorb()
        times = growing.times(3)
        whole, same = sum(ms for ms, _ in times.values()), torch.equal(growing.partner, expected)
        return {"all_ms": round(whole, 3), "ms": ms_of(kernel, times), "same_partners": same}

    return variant_rows(VARIANTS, only, measure)

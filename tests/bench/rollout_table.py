"""Rows that run through the loop over a table of tiles: the whole method, TempCache alone, AnnSA alone.

TempCache alone is the table with every tile seen. AnnSA alone is a table that merges nothing: all keys that were ever
made, beyond a few hundred frames those of one layer at full length, which every layer reads (a replayed table).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor

from tests.bench.history_engine import PROMPT_ROWS, Engine, Variant, make_engine, make_model, make_plan, warm_up
from tests.bench.rollout_growing import Curve
from tests.bench.rollout_history import (
    VARIANTS,
    choices,
    compression_share,
    engine_for,
    fps_with_pictures,
    make_row,
    peak_gb,
    roll,
)
from tests.bench.rollout_models import make_vae, seconds_with_pictures
from tests.bench.rollout_rows import RowResult, Settings, release_memory, row
from workers.attention.tile_choice import ChoiceSettings, Estimate, TileChoice, TileRuns
from workers.cache.table_layout import EXTRA_CHANNELS, write_log_mass
from workers.kernels.select import Hardware
from workers.model.static_layers import StaticLayers
from workers.rollout import CleanChunk
from workers.rollouts.captured import CapturedRollout, CapturedSettings

_LAST_CHUNKS, _WARM_CHUNKS, _PICTURE_CHUNKS = 9, 2, 4
ANNSA_DENSITY = 0.28
"""The paper's, of all tiles ever made."""


def chosen_parts(settings: Settings) -> str:
    """Which kernel attends, what is compiled, and that part of AnnCA is in it: padding of the prompt costs one row."""
    chosen = choices(settings)
    return (
        f"{chosen.attend_name}; compiled: {', '.join(chosen.compiled) or 'nothing'}; cross-attention over "
        f"{PROMPT_ROWS + 1} prompt rows, padding folded into one"
    )


def whole_row(variant: Variant, settings: Settings, hardware: Hardware) -> RowResult:
    """Over all frames."""
    return make_row(variant, settings)


def short_row(variant: Variant, settings: Settings, hardware: Hardware) -> RowResult:
    """Over 600 frames, and over the last 100 of all: the table has one size, so what is between costs what they do."""
    engine = engine_for(variant, settings)
    warm_up(engine, settings)
    backbone, frames = settings.backbone, settings.chunk_frames
    num = min(backbone.num_chunks(600) + 1, settings.num_chunks)
    seconds, peaks, _ = roll(engine, settings, num)
    last = last_seconds(engine, settings)
    peak = peak_gb(settings.device)
    around = seconds[backbone.chunk_of_frame(300) : backbone.chunk_of_frame(400)]
    total = sum(seconds) + sum(last) / len(last) * (settings.num_chunks - num)
    share = compression_share(engine, settings)
    with_vae = fps_with_pictures(engine, settings)
    num_seen = engine.chooser.num_slots_seen()
    notes = (
        f"{engine.chooser.num_chosen} cached tiles chosen, {num_seen} slots seen, by {variant.estimate}; "
        f"{chosen_parts(settings)}; tiles chosen at steps {variant.choose_at}; rolled out over the first {num} chunks "
        f"and, with the table that they left, over the last {len(last)}; those between at the pace of the last"
    )
    return RowResult(
        "",
        fps_300_400=frames * len(around) / sum(around) if around else None,
        fps_last_100=frames * len(last) / sum(last),
        fps_with_vae=with_vae,
        peak_gb_600=peaks.get(backbone.num_chunks(600)),
        peak_gb_3000=peak,
        seconds_3000_frames=total,
        cache_keys=engine.sizes.num_keys_cached,
        density=num_seen / (settings.num_chunks * engine.sizes.chunk_tokens),
        compression_share=share,
        notes=notes,
    )


def last_seconds(engine: Engine, settings: Settings) -> list[float]:
    """Of the last chunks of the video, with the table as it is."""
    first = max(0, settings.num_chunks - _LAST_CHUNKS - _WARM_CHUNKS)
    plan = make_plan(engine, settings, settings.num_chunks + 1)
    return chunk_seconds(engine.rollout.run(plan, first), settings.num_chunks - first, settings.device)[-_LAST_CHUNKS:]


def chunk_seconds(chunks: Iterator[CleanChunk], num: int, device: torch.device) -> list[float]:
    """Of each of so many chunks, which are not the last of their plan."""
    ticks = [_tick(device)]
    for _ in islice(chunks, num):
        ticks.append(_tick(device))
    closing = getattr(chunks, "close", None)
    if closing is not None:
        closing()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [between(a, b) for a, b in pairwise(ticks)]


def _tick(device: torch.device) -> Any:
    """A mark on the stream, so that nothing waits; the clock where there is none."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a: Any, b: Any) -> float:
    """Seconds."""
    return float(b - a) if isinstance(a, float) else float(a.elapsed_time(b)) / 1e3


@dataclass(eq=False)
class ReplayedLayer:
    """Keys and values that every layer reads: the own chunk first, then the history, in whole tiles."""

    k_NLW: Tensor
    v_NLD: Tensor


class ReplayedTable:
    """A `Table` of one layer in the place of all; made for the longest history, shorter ones are a run of it."""

    is_packed = False
    has_merged = False

    def __init__(self, settings: Settings, most_chunks: int) -> None:
        backbone = settings.backbone
        tile = self.tile = 128 if settings.frame_tokens >= 128 else 16
        self.chunk_tokens = backbone.chunk_latent_frames * settings.frame_tokens
        self.chunk_slots = -(-self.chunk_tokens // tile) * tile
        self._num_layers, self._head_dim = backbone.num_layers, backbone.head_dim
        shape = (backbone.num_heads, (1 + most_chunks) * self.chunk_slots)
        k, v = (
            torch.empty(*shape, width, dtype=settings.dtype, device=settings.device).normal_()
            for width in (backbone.head_dim + EXTRA_CHANNELS, backbone.head_dim)
        )
        k[..., backbone.head_dim :] = 0
        # A chunk does not fill its last tile.
        slots_NCS = k.unflatten(1, (1 + most_chunks, self.chunk_slots))[:, :, self.chunk_tokens :]
        write_log_mass(slots_NCS, backbone.head_dim, -torch.inf)
        self.layers = [ReplayedLayer(k, v)] * backbone.num_layers

    @property
    def num_bytes(self) -> int:
        """As if every layer had its own."""
        layer = self.layers[0]
        return self._num_layers * (layer.k_NLW.nbytes + layer.v_NLD.nbytes)

    def own(self, layer_index: int) -> tuple[Tensor, Tensor]:
        layer, run = self.layers[0], slice(0, self.chunk_tokens)
        return layer.k_NLW[:, run, : self._head_dim], layer.v_NLD[:, run]

    def note_seen(self, layer_index: int, index_NIJ: Tensor) -> None:
        """All lies as it is read."""

    def lay_out(self, layer_index: int, *, seen_only: bool = False) -> ReplayedLayer:
        return self.layers[layer_index]

    def key_codes(self, layer_index: int) -> None:
        """Nothing lies as codes."""

    def lay_out_sample(self, layer_index: int, slot_R: Tensor) -> ReplayedLayer:
        return self.layers[layer_index]

    def remember_chunk(self, position_T3: Tensor) -> None:
        """A chunk becomes history in every layer."""
        for index in range(self._num_layers):
            self.remember(index, position_T3)

    def remember(self, layer_index: int, position_T3: Tensor) -> None:
        """A chunk is laid down, as often as it would be; always at the same place."""
        num = self.chunk_tokens
        for x in (self.layers[0].k_NLW, self.layers[0].v_NLD):
            x[:, self.chunk_slots : self.chunk_slots + num] = x[:, :num]


def annsa_row(estimate: Estimate, settings: Settings, hardware: Hardware) -> RowResult:
    """A share of all tiles ever made, chosen once per chunk; nothing is merged, nothing forgotten."""
    lengths = (max(1, settings.replayed_chunks[0] // 4), *settings.replayed_chunks)
    table, backbone = ReplayedTable(settings, lengths[-1]), settings.backbone
    lent, layers = _lend_engine(settings)
    taken, share, seen, with_vae = dict[int, float](), 0.0, 0, None
    for num in lengths:
        rollout = _replayed_rollout(estimate, settings, table, layers, num)
        chunks = rollout.run(make_plan(lent, settings, num + 3), num)
        taken[num] = chunk_seconds(chunks, 2, settings.device)[-1]
        if num == lengths[0]:
            vae, _ = make_vae(settings)
            chunks = rollout.run(make_plan(lent, settings, num + _PICTURE_CHUNKS + 8), num)
            with_vae = settings.chunk_frames / seconds_with_pictures(chunks, vae, settings, _PICTURE_CHUNKS)
        seen = rollout.chooser.num_slots_seen()
        rollout.begin(make_plan(lent, settings, num + 1), num)
        rollout.load(lent.latents, 500.0)
        share = _selection_seconds(rollout, settings.device) / taken[num]
        release_memory(settings.device)
    curve, frames = Curve(tuple(taken), tuple(taken.values())), settings.chunk_frames
    around = range(backbone.chunk_of_frame(300), backbone.chunk_of_frame(400))
    each = ", ".join(f"{num} chunks {seconds:.3g} s" for num, seconds in taken.items())
    notes = (
        f"{ANNSA_DENSITY:.0%} of all tiles, chosen by {estimate} at a chunk's first step; {chosen_parts(settings)}; "
        "replayed throughout: one layer's keys, after RoPE, which every layer reads; "
        f"pictures after {lengths[0]} chunks; a chunk after {each}; all layers' keys would take "
        f"{table.num_bytes / 1e9:.0f} GB"
    )
    return RowResult(
        "",
        fps_300_400=frames / curve.mean(around),
        fps_last_100=frames / curve.mean(range(settings.num_chunks - _LAST_CHUNKS, settings.num_chunks)),
        fps_with_vae=with_vae,
        seconds_3000_frames=curve.total(settings.num_chunks),
        cache_keys=lengths[-1] * table.chunk_tokens,
        density=seen / ((lengths[-1] + 1) * table.chunk_slots),
        compression_share=share,
        notes=notes,
    )


def _lend_engine(settings: Settings) -> tuple[Engine, StaticLayers]:
    """Model, prompt and schedule of an engine whose own table is as small as can be; and the layers of that model."""
    chosen = choices(settings)
    small = replace(Variant("lent"), kept_chunks=1, spare_chunks=1)
    lent = make_engine(small, settings, chosen.attend, None, graphs=False)
    layers = StaticLayers(make_model(settings.backbone, settings.device, settings.dtype))
    if "layers" in chosen.compiled:
        layers.compile()
    return lent, layers


def _replayed_rollout(
    estimate: Estimate, settings: Settings, table: ReplayedTable, layers: StaticLayers, num: int
) -> CapturedRollout:
    """The product's loop over that table, its calls not captured: a call takes far longer than to launch it."""
    backbone, device = settings.backbone, settings.device
    own_tiles = table.chunk_slots // table.tile
    runs = TileRuns(((own_tiles, (1 + num) * own_tiles),), ((0, own_tiles),), (1 + num) * own_tiles)
    sizes = ChoiceSettings(
        max(1, round(ANNSA_DENSITY * num * own_tiles)),
        min(table.tile, Variant.keys_per_tile),
        min(table.tile, Variant.queries_per_tile),
        estimate,
        tile=table.tile,
    )
    chooser = TileChoice(sizes, runs, table.chunk_tokens, backbone.head_dim, device)
    attend = choices(settings).attend
    assert attend is not None
    model = make_model(backbone, device, settings.dtype)
    once = CapturedSettings((0,), graphs=False)
    return CapturedRollout(model, layers, table, (chooser, attend), settings.latent_size, once)


def _selection_seconds(rollout: CapturedRollout, device: torch.device) -> float:
    """What choosing takes of one call, launches included."""
    for _ in range(2):
        marks = [("", _tick(device))]
        with torch.no_grad():
            rollout.compute(True, lambda name, marks=marks: marks.append((name, _tick(device))))  # type: ignore[misc]
        if device.type == "cuda":
            torch.cuda.synchronize()
    return sum(between(a, b) for (_, a), (name, b) in pairwise(marks) if name == "selection")


_TILES = ("fp8", "fp8-all", "fp8-attention", "fp8-all-attention", "recall", "recall-fp8")
for _name in ("fastar-quant", "fastar-tiles", *(f"fastar-tiles-{way}" for way in _TILES)):
    row(_name)(partial(whole_row, VARIANTS[_name]))
for _name in ("fastar-lsh", "tempcache", "fastar-fp8", "fastar-exact", "fastar-dense-regions", "fastar-20%"):
    row(_name)(partial(short_row, VARIANTS[_name]))
row("annsa-quant")(partial(annsa_row, "quant"))
row("annsa-lsh")(partial(annsa_row, "lsh"))

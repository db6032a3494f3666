"""Rollouts over a tile table for tests and benches, from plain numbers: `assemble_tiles` goes by a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workers.attention.tile_choice import ChoiceSettings, Estimate, TileChoice, TileRuns
from workers.cache.table_layout import TableSettings
from workers.cache.tile_table import TableWork, TileTable
from workers.kernels.listed_tiles import AttendTable, make_attend
from workers.model.backbones import Backbone
from workers.model.dit import CausalDiT
from workers.model.static_layers import Fp8Linears, StaticLayers
from workers.rollouts.captured import CapturedRollout, CapturedSettings
from workers.search.nearest_rows import NearestRows, nearest_rows


def table_settings(backbone: Backbone, latent_size: tuple[int, int], **sizes: Any) -> TableSettings:
    rows, columns = backbone.token_grid(latent_size)
    return TableSettings(
        num_layers=backbone.num_layers,
        num_heads=backbone.num_heads,
        head_dim=backbone.head_dim,
        chunk_tokens=backbone.chunk_latent_frames * rows * columns,
        frame_tokens=rows * columns,
        theta=backbone.rope_theta,
        **sizes,
    )


def tile_runs(s: TableSettings, *, always_sink: bool = False, always_recent: bool = False) -> TileRuns:
    """Sink and newest chunks compete with the history, or are always seen; the chunk in hand always is."""
    sink, history, recent, own, stop = (
        slot // s.tile for slot in (0, s.history_start, s.recent_start, s.own_start, s.num_slots)
    )
    always, candidates = [], []
    for run, is_always in (((sink, history), always_sink), ((history, recent), False), ((recent, own), always_recent)):
        (always if is_always else candidates).append(run)
    return TileRuns(tuple(candidates), (*always, (own, stop)), stop)


def make_captured(
    model: CausalDiT,
    sizes: TableSettings,
    latent_size: tuple[int, int],
    *,
    num_chosen: int,
    always_sink: bool = False,
    always_recent: bool = False,
    estimate: Estimate = "exact",
    attend: AttendTable | None = None,
    nearest: NearestRows = nearest_rows,
    fp8: Fp8Linears = "none",
    backend: str | Callable[..., Any] | None = None,
    compiled: tuple[str, ...] = ("layers", "chooser", "table"),
    work: TableWork = "groups",
    settings: CapturedSettings | None = None,
    **choice: Any,
) -> CapturedRollout:
    """Everything of one rollout; None compiles nothing."""
    device = model.head.modulation.device
    table = TileTable(sizes, model.dtype, device, nearest, work)
    layers = StaticLayers(model, fp8)
    runs = tile_runs(sizes, always_sink=always_sink, always_recent=always_recent)
    chosen = ChoiceSettings(num_chosen, estimate=estimate, tile=sizes.tile, **choice)
    if "keys_per_tile" not in choice and sizes.tile < chosen.keys_per_tile:
        chosen = ChoiceSettings(
            num_chosen, keys_per_tile=sizes.tile, queries_per_tile=sizes.tile, estimate=estimate, tile=sizes.tile
        )
    chooser = TileChoice(chosen, runs, sizes.chunk_tokens, sizes.head_dim, device)
    if backend is not None:
        parts = {"table": table, "layers": layers, "chooser": chooser}
        for name in compiled:
            parts[name].compile(backend)
    attend = attend or make_attend("torch", sizes.tile)
    settings = settings or CapturedSettings(graphs=device.type == "cuda")
    return CapturedRollout(model, layers, table, (chooser, attend), latent_size, settings)

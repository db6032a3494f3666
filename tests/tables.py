"""Rollouts over a tile table for tests and benches, from plain numbers: `assemble_tiles` goes by a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers.assemble_tiles import keep_history, tile_runs
from workers.attention.tile_choice import ChoiceSettings, Estimate, TileChoice
from workers.cache.packed_table import make_table
from workers.cache.table_layout import EXTRA_CHANNELS, TableSettings
from workers.cache.table_snapshot import encode
from workers.cache.tile_table import TableWork, TileTable
from workers.kernels.listed_codes import CodedKeys
from workers.kernels.listed_parts import PartedAttention, make_parted
from workers.kernels.listed_tiles import AttendTable, make_attend
from workers.model.dit import CausalDiT
from workers.model.fp8_linears import Fp8Linears
from workers.model.rope import grid_positions
from workers.model.static_layers import StaticLayers
from workers.rollouts.captured import CapturedRollout, CapturedSettings
from workers.rollouts.kept_history import KeptHistory
from workers.search.nearest_rows import NearestRows, nearest_rows


class ListedProblem(NamedTuple):
    """Random input of attention over listed tiles, float32; see `listed_tiles.AttendTable`."""

    q_QNW: Tensor
    k_NLW: Tensor
    v_NLD: Tensor
    index_NIJ: Tensor


GRID = 2, 3
"""Rows and columns of tokens in a latent frame of `SMALL_TABLE`, which has three in a chunk."""
SMALL_TABLE = TableSettings(
    num_layers=3,
    num_heads=2,
    head_dim=12,
    chunk_tokens=3 * math.prod(GRID),
    frame_tokens=math.prod(GRID),
    kept_chunks=2,
    spare_chunks=2,
    candidate_tiles=2,
    tile=8,
)


def go_on(table: TileTable, first: int, stop: int) -> None:
    """Chunks of random keys at the sizes of `SMALL_TABLE`, those of a chunk near those of the one before."""
    s = table.settings
    shape = 2, s.num_heads, s.chunk_tokens, s.head_dim
    for index in range(first, stop):
        for layer in range(s.num_layers):
            track = torch.randn(shape, generator=torch.Generator().manual_seed(layer))
            kv = track + 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(100 * index + layer))
            for own, new in zip(table.own(layer), kv, strict=True):
                own.copy_(new)
        table.remember_chunk(grid_positions(torch.arange(3) + 3 * index, *GRID))


def draw_listed(
    sizes: tuple[int, int, int], tile: int, num_tiles: int, num_listed: int, *, most_mass: float, empty: slice
) -> ListedProblem:
    """Queries, keys and lists.

    Args:
        sizes: Queries, heads, channels.
        tile: Keys of a tile.
        num_tiles, num_listed: Tiles of the table and of a list.
        most_mass: Up to so much stands in the channel of log m.
        empty: Slots without a key.
    """
    num_queries, heads, dim = sizes
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(num_queries, heads, dim + EXTRA_CHANNELS, generator=generator)
    k = torch.randn(heads, num_tiles * tile, dim + EXTRA_CHANNELS, generator=generator)
    v = torch.randn(heads, num_tiles * tile, dim, generator=generator)
    q[..., dim:], k[..., dim:] = 0, 0
    q[..., dim : dim + 2] = 1
    k[..., dim] = torch.rand(heads, num_tiles * tile, generator=generator) * most_mass
    k[:, empty, dim] = -1e5
    index = torch.rand(heads, -(-num_queries // tile), num_tiles, generator=generator).argsort(-1)[..., :num_listed]
    return ListedProblem(q, k, v, index.to(torch.int32).contiguous())


def code_table(k_NLW: Tensor, v_NLD: Tensor) -> CodedKeys:
    """A table as 8-bit codes."""
    dim = v_NLD.shape[-1]
    # A finite number stands where there is no key.
    return CodedKeys(
        *encode(k_NLW[..., :dim]), *encode(v_NLD), k_NLW[..., dim : dim + 2].float().sum(-1) / math.sqrt(dim)
    )


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
    parted: PartedAttention | None = None,
    clean_parted: PartedAttention | None = None,
    nearest: NearestRows = nearest_rows,
    fp8: Fp8Linears = "none",
    backend: str | Callable[..., Any] | None = None,
    compiled: tuple[str, ...] = ("layers", "chooser", "table"),
    work: TableWork = "groups",
    settings: CapturedSettings | None = None,
    **choice: Any,
) -> CapturedRollout:
    """Everything of one rollout; None compiles nothing. Where not all calls look at the history, `parted` attends, in
    clean passes `clean_parted` if that is given."""
    device = model.head.modulation.device
    layers = StaticLayers(model, fp8)
    table = make_table(sizes, model.dtype, device, nearest, work)
    runs = tile_runs(sizes, always_sink=always_sink, always_recent=always_recent)
    settings = settings or CapturedSettings(graphs=device.type == "cuda")
    attention: AttendTable | KeptHistory = attend or make_attend("torch", sizes.tile)
    if settings.history_at is not None:
        runs, attention = keep_history(table, runs, parted or make_parted("torch", sizes.tile), clean_parted)
    chosen = ChoiceSettings(num_chosen, estimate=estimate, tile=sizes.tile, **choice)
    if "keys_per_tile" not in choice and sizes.tile < chosen.keys_per_tile:
        chosen = replace(chosen, keys_per_tile=sizes.tile, queries_per_tile=sizes.tile)
    chooser = TileChoice(chosen, runs, sizes.chunk_tokens, sizes.head_dim, device)
    if backend is not None:
        parts = {"table": table, "layers": layers, "chooser": chooser}
        for name in compiled:
            parts[name].compile(backend)
    return CapturedRollout(model, layers, table, (chooser, attention), latent_size, settings)

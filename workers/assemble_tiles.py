"""RenderConfig -> the rollout over a tile table: sizes, the kernel that reads it, and the one table of an actor.

What a device lacks is made up for by what it has: the calls are captured as CUDA graphs on a GPU and run one by one
elsewhere, attention and the search for nearest keys come from the fastest package that can run, and plain torch can
always. What was chosen is said in one line. The numbers are those of the same device and packages every time.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch

from workers.attention.tile_choice import ChoiceSettings, TileChoice, TileRuns
from workers.cache.packed_table import PackedTable, make_table
from workers.cache.table_layout import TableSettings
from workers.cache.tile_table import TableWork, TileTable
from workers.config import RenderConfig
from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.errors import ConfigUnsupported
from workers.kernels.listed_parts import PartedAttention
from workers.kernels.listed_tiles import AttendTable
from workers.kernels.select import Hardware, KernelNeed
from workers.kernels.select_fp8 import NO_FP8, Fp8Choice, choose_fp8, with_fp8
from workers.kernels.select_listed import ListedChoice, choose_listed, load_parted
from workers.model.backbones import Backbone
from workers.model.dit import CausalDiT
from workers.model.fp8_linears import PRODUCTS_FROM, Fp8Linears
from workers.model.rope import grid_positions
from workers.model.static_layers import StaticLayers
from workers.rollouts.captured import CapturedRollout, CapturedSettings
from workers.rollouts.kept_history import FreshSlots, KeptHistory
from workers.search.nearest_rows import NearestRows, make_triton_nearest_rows, nearest_rows

logger = logging.getLogger(__name__)

KERNELS_FROM = (8, 0)
"""Compute capability from which a table's own kernels (Triton) take over chunks and choose tiles."""
PROMPT_ROWS = 128
"""Prompts are filled up to a multiple of so many rows, so that nearly all share what is compiled and captured."""


@dataclass(frozen=True)
class TileWays:
    """How a table is computed with on one device."""

    listed: ListedChoice
    nearest: NearestRows
    kernels: bool
    """Chunks are taken over and tiles chosen by kernels of our own, in place of torch."""
    graphs: bool
    compiled: bool
    fp8: Fp8Linears = "none"
    """Linear layers in 8-bit floats."""
    fp8_attention: Fp8Choice = NO_FP8

    @property
    def rounds(self) -> bool:
        """Whether anything is computed in 8-bit floats."""
        return self.fp8 != "none" or self.fp8_attention.which != "none"

    @property
    def version(self) -> str:
        """As it stands in the manifest."""
        fp8 = "" if self.fp8 == "none" else f", linear layers in 8-bit floats: {self.fp8}"
        graphs = "CUDA graphs" if self.graphs else "call by call"
        return f"{self.listed.version}, {graphs}{fp8}{self.fp8_attention.version}"


def table_settings(config: TileCacheConfig, backbone: Backbone, latent_size: tuple[int, int]) -> TableSettings:
    """Sizes of the table.

    Raises:
        ConfigUnsupported: A length is no whole number of this model's chunks.
    """
    rows, columns = backbone.token_grid(latent_size)
    try:
        chunks = config.chunks(backbone.chunk_latent_frames)
    except ValueError as error:
        raise ConfigUnsupported(str(error)) from error
    return size_table(
        backbone,
        latent_size,
        rule=config.merging,
        decay=config.mass_decay,
        candidate_tiles=config.candidate_tiles,
        tile=config.tile_for(rows * columns),
        storage=config.storage,
        **chunks,
    )


def size_table(backbone: Backbone, latent_size: tuple[int, int], **sizes: Any) -> TableSettings:
    """The model's part of the sizes beside those that are given."""
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
    runs = (((sink, history), always_sink), ((history, recent), False), ((recent, own), always_recent))
    candidates = tuple(run for run, is_always in runs if not is_always)
    return TileRuns(candidates, (*(run for run, is_always in runs if is_always), (own, stop)), stop)


def runs_of(config: TileAttentionConfig, s: TableSettings) -> TileRuns:
    """`tile_runs` as configured."""
    return tile_runs(s, always_sink=config.always_sink, always_recent=config.always_recent)


def choice_settings(
    config: TileAttentionConfig, s: TableSettings, runs: TileRuns, *, fused: bool = False
) -> ChoiceSettings:
    """How many tiles are chosen, and by how close a look; `fused` by kernels of our own."""
    num_candidates = sum(stop - first for first, stop in runs.candidates)
    early = config.density_until_full
    return ChoiceSettings(
        num_chosen=max(1, round(config.density * num_candidates)),
        num_early=0 if early is None else max(1, round(early * num_candidates)),
        clean_share=config.clean_pass_share,
        keys_per_tile=min(config.keys_per_tile, s.tile),
        queries_per_tile=min(config.queries_per_tile, s.tile),
        estimate=config.estimate,
        tile=s.tile,
        fused=fused,
    )


def choose_ways(
    config: RenderConfig, hardware: Hardware, need: KernelNeed, tile: int, *, exact: bool = False
) -> TileWays:
    """What computes on this device; logged in one line, and in one more for what is computed in 8-bit floats.

    Args:
        config: Of the render.
        hardware: Where.
        need: Dtype and head dimension.
        tile: Slots of a tile.
        exact: Nothing in 8-bit floats, whatever the configuration says.
    Raises:
        KernelUnavailable: The kernel that is named cannot run here.
    """
    is_cuda = hardware.device_type == "cuda"
    listed = choose_listed(config.kernel.name, hardware, need, tile)
    why_plain = _why_no_kernels(config, hardware, (need.head_dim, tile), listed)
    nearest: NearestRows = nearest_rows if why_plain else make_triton_nearest_rows()
    assert isinstance(config.attention, TileAttentionConfig)
    ways = TileWays(listed, nearest, not why_plain, graphs=is_cuda, compiled=config.backbone.compiled)
    logger.info(
        "tile table: %s; chunks taken over by %s; %s",
        listed.line,
        f"plain torch: {why_plain}" if why_plain else "kernels of its own",
        "captured as CUDA graphs" if is_cuda else f"call by call: {hardware.device_type} has no CUDA graphs",
    )
    if exact:
        return ways
    say_fp8(config.backbone.fp8, hardware)
    attention = choose_fp8(config.attention.fp8, hardware, need, tile, why_plain)
    return replace(ways, fp8=config.backbone.fp8, fp8_attention=attention)


def say_fp8(fp8: Fp8Linears, hardware: Hardware) -> None:
    """One line on linear layers in 8-bit floats, if there are any: whether they are faster here."""
    if fp8 == "none":
        return
    compute = hardware.compute
    if compute is not None and compute >= PRODUCTS_FROM:
        logger.info("backbone.fp8: %s: these linear layers are products of 8-bit floats in denoising steps", fp8)
        return
    here = hardware.device_type if compute is None else "compute capability {}.{}".format(*compute)
    logger.warning(
        "backbone.fp8: %s: %s has no products of 8-bit floats (they need compute capability %d.%d); inputs and weights "
        "are rounded the same and multiplied in backbone.dtype, which is slower here than backbone.fp8: none",
        *(fp8, here, *PRODUCTS_FROM),
    )


def _why_no_kernels(config: RenderConfig, hardware: Hardware, sizes: tuple[int, int], listed: ListedChoice) -> str:
    """Empty where a table's own kernels can run; `sizes` are those of a head and of a tile."""
    cache, attention = config.cache, config.attention
    assert isinstance(cache, TileCacheConfig)
    assert isinstance(attention, TileAttentionConfig)
    if hardware.device_type != "cuda":
        return f"its kernels are for cuda, not for {hardware.device_type}"
    if listed.name == "reference":
        return "as attention is"
    if hardware.compute is not None and hardware.compute < KERNELS_FROM:
        return "its kernels need compute capability {}.{}".format(*KERNELS_FROM)
    if any(size & (size - 1) or size < 16 for size in sizes):
        return "its kernels take a head dimension and a tile of 16, 32, 64 or 128, not {} and {}".format(*sizes)
    samples = min(attention.keys_per_tile, sizes[1]), min(attention.queries_per_tile, sizes[1])
    if any(size & (size - 1) for size in samples):
        return "its kernels take powers of two of keys and queries of a tile, not {} and {}".format(*samples)
    if cache.candidate_tiles is None:
        return "its kernels look for the nearest key in some tiles only (cache.candidate_tiles)"
    return "" if importlib.util.find_spec("triton") else "Triton is not installed"


def keep_history(
    table: TileTable, runs: TileRuns, ways: PartedAttention, clean_ways: PartedAttention | None = None
) -> tuple[TileRuns, KeptHistory]:
    """For calls that do not all look at the history: the tiles that those which look choose among, and the rest."""
    s = table.settings
    fresh = FreshSlots.of(runs, s.chunk_tokens, s.tile)
    lay_out_coded = table.lay_out_coded if isinstance(table, PackedTable) else None
    return replace(runs, always=()), KeptHistory(ways, fresh, table.layers, clean_ways, lay_out_coded)


class TableSeat:
    """The one table of an actor, used by one take at a time; made when it is first asked for.

    Args:
        dit: Model.
        config: Of the render.
        latent_size: Height and width.
        ways: How it is computed with.
    """

    def __init__(self, dit: CausalDiT, config: RenderConfig, latent_size: tuple[int, int], ways: TileWays) -> None:
        cache, attention = config.cache, config.attention
        assert isinstance(cache, TileCacheConfig)
        assert isinstance(attention, TileAttentionConfig)
        self.ways, self._attention = ways, attention
        self._dit, self._latent_size = dit, latent_size
        self.settings = table_settings(cache, dit.backbone, latent_size)
        self._rollout: CapturedRollout | None = None

    def begin_take(self) -> CapturedRollout:
        """The rollout, its table empty; in inference mode, as all that uses it."""
        if self._rollout is None:
            self._rollout = self._make()
        else:
            self.table.clear()
        return self._rollout

    def release(self) -> None:
        """Give the memory back; the next take makes a new one."""
        self._rollout = None
        if self._dit.head.modulation.is_cuda:  # in pieces of a table a window might find no room
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run what a take runs until every layer has merged: compiles and captures it."""
        s, device = self.settings, self._dit.head.modulation.device
        rollout = self.begin_take()
        rows, columns = self._dit.backbone.token_grid(self._latent_size)
        num = self._dit.backbone.chunk_latent_frames
        for index in range(s.sink_chunks + s.recent_chunks + s.kept_chunks + s.spare_chunks + 1):
            time = torch.arange(index * num, (index + 1) * num, device=device)
            rollout.remember(grid_positions(time, rows, columns, None))
        rollout.rehearse()
        self.table.clear()

    @property
    def table(self) -> TileTable:
        """What a take has filled so far: what a snapshot is made of, and what one fills after `begin_take`."""
        assert self._rollout is not None, "begin_take comes first"
        table = self._rollout.table
        assert isinstance(table, TileTable)
        return table

    def _make(self) -> CapturedRollout:
        s, dit, ways = self.settings, self._dit, self.ways
        device = dit.head.modulation.device
        work: TableWork = "kernels" if ways.kernels else "groups"
        layers = StaticLayers(dit, ways.fp8)
        table = make_table(s, dit.dtype, device, ways.nearest, work)
        runs = runs_of(self._attention, s)
        choice = choice_settings(self._attention, s, runs, fused=ways.kernels)
        attend: AttendTable | KeptHistory = ways.listed.attend
        if self._attention.history_at is not None:
            parted = with_fp8(load_parted(ways.listed.name, s.tile), ways.fp8_attention, s.tile)
            runs, attend = keep_history(table, runs, *parted)
        chooser = TileChoice(choice, runs, s.chunk_tokens, s.head_dim, device)
        if ways.compiled:
            _prepare_compiler()
            for part in (table, layers, chooser):
                part.compile()
        settings = CapturedSettings(self._attention.choose_at, ways.graphs, PROMPT_ROWS, self._attention.history_at)
        return CapturedRollout(dit, layers, table, (chooser, attend), self._latent_size, settings)


def _prepare_compiler() -> None:
    """It may not choose by timing where its choice shows in the numbers; see `model/compiled.py`."""
    if "deterministic" in torch._inductor.list_options():
        torch._inductor.config.deterministic = True
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one piece, many strides

"""What the rows of `rollout_history` run: a model with random weights and everything of a rollout over a tile table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.bench.rollout_rows import Settings
from tests.tables import make_captured
from workers.assemble_tiles import size_table, tile_runs
from workers.attention.tile_choice import Estimate, TileChoice
from workers.cache.low_bit import Storage
from workers.cache.table_layout import MergeRule, TableSettings
from workers.cache.tile_table import TileTable
from workers.config_tiles import Fp8Attention
from workers.contracts import PromptKeys
from workers.denoise import Schedule, draw_noise, make_schedule, step_renoise
from workers.kernels.listed_parts import make_parted
from workers.kernels.listed_tiles import AttendTable, ListedName
from workers.kernels.select import Hardware, KernelNeed
from workers.kernels.select_fp8 import Fp8Choice, choose_fp8, with_fp8
from workers.model.backbones import Backbone
from workers.model.dit import CausalDiT
from workers.model.fp8_linears import Fp8Linears
from workers.rollout import RolloutPlan
from workers.rollouts.captured import CapturedRollout, CapturedSettings
from workers.search.nearest_rows import NearestRows, nearest_rows

PROMPT_ROWS = 112
"""Of 512; the others are padding, folded into one row with log m."""


Compiled = tuple[str, ...]
ALL: Compiled = ("layers", "chooser", "table")
"""Parts that can be compiled."""


@dataclass(frozen=True)
class Variant:
    """One policy with its budget."""

    name: str
    kept_chunks: int = 9
    spare_chunks: int = 5
    recent_chunks: int = 1
    candidate_tiles: int = 4
    """Tiles of the history in which a key looks for its partner."""
    rule: MergeRule = "chains"
    """Which pairs of a full history merge."""
    storage: Storage = "model"
    """Of the history."""
    density: float = 0.1
    """Share of the cached tiles that are chosen among: sink, history and newest chunks, unless always seen."""
    always_sink: bool = False
    always_recent: bool = False
    estimate: Estimate = "exact"
    fp8: Fp8Linears = "none"
    fp8_attention: Fp8Attention = "none"
    """Where not all steps look."""
    choose_at: tuple[int, ...] = (0,)
    history_at: tuple[int, ...] | None = None
    """Denoising steps that look at the history; None: all. The clean pass always does."""
    clean_share: float = 1.0
    """Of the chosen tiles, the heaviest that the clean pass sees."""
    density_until_full: float | None = None
    """As `density`, until the history merges for the first time."""
    dense_own: bool = True
    """Where not all look: what all see is attended to by a dense kernel, if there is one; else by lists."""
    keys_per_tile: int = 16
    queries_per_tile: int = 8
    kernels: bool = True
    """Chunks are taken over and tiles chosen by kernels of our own; else by plain torch, layer by layer."""
    whole: bool = True
    """Rolled out over all frames."""
    with_pictures: bool = False
    """Measured once more with the VAE and H.264 beside it."""


@dataclass(eq=False)
class Engine:
    """A rollout and what belongs to it."""

    variant: Variant
    rollout: CapturedRollout
    sizes: TableSettings
    schedule: Schedule
    prompt: list[PromptKeys]
    latents: Tensor
    position: Tensor
    """Of the chunk that `hold` began."""

    @property
    def table(self) -> TileTable:
        table = self.rollout.table
        assert isinstance(table, TileTable)
        return table

    @property
    def chooser(self) -> TileChoice:
        chooser = self.rollout.chooser
        assert isinstance(chooser, TileChoice)
        return chooser

    @property
    def choose_at(self) -> tuple[int, ...]:
        return self.variant.choose_at

    @property
    def num_calls(self) -> int:
        """Of a chunk, the clean pass included."""
        return len(self.schedule.sigmas) + 1

    @property
    def num_looking(self) -> int:
        """Calls of a chunk that look at the history, the clean pass always."""
        at = self.variant.history_at
        return self.num_calls if at is None else len(at) + 1

    @property
    def slots_seen(self) -> float:
        """By a query, mean of the denoising steps."""
        return self.rollout.slots_seen(len(self.schedule.sigmas))

    @property
    def chunks_to_fill(self) -> int:
        """After so many chunks every layer has merged."""
        s = self.sizes
        return s.sink_chunks + s.recent_chunks + s.kept_chunks + s.spare_chunks + 1

    def hold(self, settings: Settings) -> None:
        """Fill the buffers of the rollout with a chunk at its end."""
        index = self.table.layers[0].num_chunks
        self.position = self.rollout.begin(make_plan(self, settings, index + 1), index)
        self.rollout.load(self.latents, 500.0)

    def sample(self, mark: Callable[[str], None]) -> None:
        """One denoising step without its call."""
        flow = torch.ones_like(self.latents)
        step_renoise(self.latents, flow, 0.9, 0.5, self.latents)
        mark("sampler")


_MODELS: dict[Any, CausalDiT] = {}


def make_model(backbone: Backbone, device: torch.device, dtype: torch.dtype) -> CausalDiT:
    """Random weights that neither vanish nor grow; the last one made is kept."""
    key = backbone, device, dtype
    if key not in _MODELS:
        _MODELS.clear()
        torch.manual_seed(0)
        with torch.device(device):
            model = CausalDiT(backbone)
        model.reset_parameters(zero_output=False)
        _MODELS[key] = model.to(dtype).eval().requires_grad_(False)
    return _MODELS[key]


def choose_fp8_of(variant: Variant, settings: Settings, kernels: Compiled) -> Fp8Choice:
    """Who attends in 8-bit floats, if anyone; `kernels` are those of the table that run."""
    need = KernelNeed(settings.dtype, settings.backbone.head_dim)
    tile = 128 if settings.frame_tokens >= 128 else 16
    why_no_kernels = "" if variant.kernels and "packing" in kernels else "history packed by plain torch"
    return choose_fp8(variant.fp8_attention, Hardware.of(settings.device), need, tile, why_no_kernels)


def read_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Fields of a variant; values as JSON where they are, lists as tuples."""
    changes: dict[str, Any] = {}
    for text in texts:
        field, value = text.split("=", 1)
        try:
            read = json.loads(value)
        except json.JSONDecodeError:
            read = value
        changes[field] = tuple(read) if isinstance(read, list) else read
    return changes


@torch.no_grad()
def make_engine(
    variant: Variant,
    settings: Settings,
    attend: AttendTable | None,
    backend: str | None,
    nearest: NearestRows = nearest_rows,
    compiled: Compiled = ALL,
    *,
    kernels: Compiled = ("table", "pairs", "packing", "choice"),
    graphs: bool = True,
    attend_name: ListedName = "torch",
) -> Engine:
    backbone, device = settings.backbone, settings.device
    model = make_model(backbone, device, settings.dtype)
    sizes = size_table(
        backbone,
        settings.latent_size,
        kept_chunks=variant.kept_chunks,
        spare_chunks=variant.spare_chunks,
        recent_chunks=variant.recent_chunks,
        candidate_tiles=variant.candidate_tiles,
        rule=variant.rule,
        storage=variant.storage,
        tile=128 if settings.frame_tokens >= 128 else 16,
    )
    kernels = kernels if variant.kernels and device.type == "cuda" else ()
    needed = {"pairs" if variant.rule == "pairs" else "table"} | ({"packing"} if sizes.storage != "model" else set())
    runs = tile_runs(sizes, always_sink=variant.always_sink, always_recent=variant.always_recent)
    num_candidates = sum(stop - first for first, stop in runs.candidates)
    parted = make_parted(attend_name, sizes.tile, dense=variant.dense_own)
    parted, clean_parted = with_fp8(parted, choose_fp8_of(variant, settings, kernels), sizes.tile)
    rollout = make_captured(
        model,
        sizes,
        settings.latent_size,
        num_chosen=max(1, round(variant.density * num_candidates)),
        always_sink=variant.always_sink,
        always_recent=variant.always_recent,
        estimate=variant.estimate,
        attend=attend,
        parted=parted,
        clean_parted=clean_parted,
        nearest=nearest,
        fp8=variant.fp8,
        backend=backend,
        compiled=compiled,
        work="kernels" if needed <= set(kernels) else "layers",
        fused="choice" in kernels,
        settings=CapturedSettings(
            variant.choose_at, graphs=graphs and device.type == "cuda", history_at=variant.history_at
        ),
        clean_share=variant.clean_share,
        num_early=round((variant.density_until_full or 0) * num_candidates),
        keys_per_tile=min(sizes.tile, variant.keys_per_tile),
        queries_per_tile=min(sizes.tile, variant.queries_per_tile),
    )
    generator = torch.Generator().manual_seed(1)
    rows = min(PROMPT_ROWS, backbone.text_tokens - 1)
    text = torch.randn(1, rows + 1, backbone.text_dim, generator=generator).to(device, settings.dtype)
    text[:, rows:] = 0
    mass = torch.zeros(1, rows + 1, device=device)
    mass[:, rows] = float(torch.tensor(float(backbone.text_tokens - rows)).log())
    latents = torch.randn(
        1, backbone.chunk_latent_frames, backbone.in_channels, *settings.latent_size, generator=generator
    ).to(device)
    native = backbone.native
    schedule = make_schedule(4 if native is None else native.num_steps, 5.0 if native is None else native.shift)
    prompt = model.project_prompt(text, mass)
    return Engine(variant, rollout, sizes, schedule, prompt, latents, torch.zeros(0, device=device))


def make_plan(engine: Engine, settings: Settings, num_chunks: int) -> RolloutPlan:
    backbone = settings.backbone
    shape = (1, backbone.chunk_latent_frames, backbone.latent_channels, *settings.latent_size)
    return RolloutPlan(
        num_chunks=num_chunks,
        latent_size=settings.latent_size,
        schedule=engine.schedule,
        guidance=1.0,
        noise=lambda chunk, step: draw_noise(7, chunk, step, shape),
        prompt=lambda index: [engine.prompt],
        control=lambda index: None,
    )


@torch.no_grad()
def warm_up(engine: Engine, settings: Settings) -> float:
    """Compile and capture all that a rollout runs, merging included; seconds."""
    began = time.perf_counter()
    engine.table.clear()
    plan = replace(make_plan(engine, settings, 3))
    for _ in engine.rollout.run(plan):
        pass
    for _ in range(engine.chunks_to_fill):
        engine.rollout.remember(engine.rollout.begin(plan, 2))
    engine.rollout.rehearse()
    if settings.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began

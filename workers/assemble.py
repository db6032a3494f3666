"""RenderConfig -> weights, model, cache, policy, kernel: the one place where a name becomes a class.

The out-of-memory ladder lives here too, because it is a choice of parts. Each rung includes those before it:

1. `decode-single`: the VAE decodes one latent frame at a time and cached memory goes back to the device between stages;
2. `cache-bfloat16`: keys and values are stored in bfloat16 (halves them where the model computes in float32; a tile
   table stays as it is);
3. `cache-window`: only the first chunk and the newest 21 latent frames are remembered.

Rung 1 changes pixels by rounding at most, 2 slightly, 3 takes the memory of far history away: all stand in the result.
So does `float32`, which is no rung: what an attempt computes in after one whose latents were not finite.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace

import torch

from workers.assemble_cache import make_temporal_cache, temporal_settings
from workers.assemble_policies import make_policy, make_prompt_attention, make_reindex, make_reuse, resolve_calibration
from workers.assemble_tiles import TableSeat, choose_ways, table_settings
from workers.cache.dense import DenseCache
from workers.cache.flow import FlowCache, FlowSettings
from workers.cache.temporal_merge import MergeSettings
from workers.cache.window import WindowCache
from workers.checkpoints.modules import load_modules
from workers.config import (
    AnnPromptConfig,
    AnnSelfAttentionConfig,
    CacheConfig,
    DenseCacheConfig,
    FlowCacheConfig,
    NativeCacheConfig,
    RenderConfig,
    TemporalCacheConfig,
    WindowCacheConfig,
)
from workers.config_tiles import TileCacheConfig
from workers.contracts import AttentionPolicy, Kernel, KVCache, PromptAttention, StepReuse
from workers.denoise import Schedule, make_schedule
from workers.kernels.select import Hardware, KernelNeed, select_kernel
from workers.model.attend import Reindex
from workers.model.backbones import Backbone, find_backbone
from workers.model.compiled import compile_around_attention
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT
from workers.model.image_encoder import ImageEncoder
from workers.model.text_encoder import PromptEncoder
from workers.model.vae import PictureDecoder
from workers.rollouts.native import native_parts
from workers.rollouts.select import check_rollout
from workers.search.select import check_search

logger = logging.getLogger(__name__)

LADDER = ("decode-single", "cache-bfloat16", "cache-window")
_LAST_RESORT = WindowCacheConfig()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """Everything that is loaded once and shared by all takes of an actor."""

    config: RenderConfig
    backbone: Backbone
    device: torch.device
    dit: CausalDiT
    text_encoder: PromptEncoder
    vae: PictureDecoder
    kernel: Kernel
    schedule: Schedule
    revision: str
    image_encoder: ImageEncoder | None = None
    control_branch: ControlBranch | None = None
    seat: TableSeat | None = None
    """Of a render over a tile table: shared by all takes, as it is large and its calls are captured once."""

    @property
    def backend(self) -> str:
        """See `backend_of`; over the tile table if there is one."""
        return self.backend_of(on_table=self.seat is not None)

    def backend_of(self, *, on_table: bool) -> str:
        """What computes attention, with its version, and what decodes, as it stands in the manifest."""
        attention = self.seat.ways.version if on_table and self.seat is not None else self.kernel.version
        return f"{attention}, {self.vae.version}" if self.vae.version else attention

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.backbone.latent_size(self.config.video.width, self.config.video.height)


@dataclass(frozen=True)
class TakeParts:
    """What one take has for itself, after the rungs it stands on."""

    cache: KVCache
    cache_name: str
    policy: AttentionPolicy
    attend_prompt: PromptAttention
    reindex: Reindex | None
    """Times of cached keys; None keeps them as they were made."""
    reuse: StepReuse | None
    decode_latent_frames: int | None
    """Latent frames decoded at once; None means a whole chunk."""
    ladder: tuple[str, ...]
    on_table: bool = False
    """Rolled out over the model's tile table: its loop asks neither cache nor policy, which stay empty."""


def load_model(config: RenderConfig) -> LoadedModel:
    """Load weights onto the GPU if there is one, else prepare them for the CPU.

    Raises:
        ConfigUnsupported: The model, its size or its weights cannot be rendered with.
        CheckpointMismatch: Weights are missing, damaged, or of another model.
        KernelUnavailable: The kernel or a search asked for cannot run here.
    """
    backbone = find_backbone(config.backbone.name)
    backbone.latent_size(config.video.width, config.video.height)
    check_rollout(backbone, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_to_one_choice_of_kernels()
    dtype = _DTYPES[config.backbone.dtype]
    kernel = select_kernel(config.kernel.name, device, _kernel_need(config, backbone, dtype))
    for part in (config.cache, config.attention, config.prompt_attention):
        if isinstance(part, TemporalCacheConfig | AnnSelfAttentionConfig | AnnPromptConfig):
            check_search(part.search, device)
    modules = load_modules(backbone, config.backbone, device, dtype)
    if config.backbone.compiled and config.cache.kind != "tiles":  # a table's loop has its own pieces
        compile_around_attention(modules.dit)
    model = LoadedModel(
        config=config,
        backbone=backbone,
        device=device,
        dit=modules.dit,
        text_encoder=modules.text_encoder,
        vae=modules.vae,
        kernel=kernel,
        schedule=make_schedule(config.sampling.num_steps, config.sampling.shift),
        revision=modules.revision,
        image_encoder=modules.image_encoder,
        control_branch=modules.control_branch,
    )
    if config.cache.kind == "tiles":
        model = replace(model, seat=make_seat(model))
    prepare_take(model, 0)  # what cannot be built is refused before the first take
    logger.info("loaded %s revision %s on %s, kernel %s", backbone.name, modules.revision[:12], device, model.backend)
    return model


def keep_to_one_choice_of_kernels() -> None:
    """Frames must not depend on which GPU of a kind makes them: no process may choose kernels by timing them."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def prepare_take(model: LoadedModel, ladder_rung: int) -> TakeParts:
    """A fresh cache and the savings of the first `ladder_rung` rungs."""
    ladder = LADDER[:ladder_rung]
    dtype = torch.bfloat16 if "cache-bfloat16" in ladder else None
    config = _last_resort(model.config.cache) if "cache-window" in ladder else model.config.cache
    reindex = make_reindex(model.config.positions)
    on_table = isinstance(config, TileCacheConfig)
    if isinstance(config, NativeCacheConfig):
        native = native_parts(model.backbone, model.latent_size, dtype)
        cache, name, policy, reindex = native.cache, "native", native.policy, native.reindex
    else:
        cache, name = _make_cache(model, config, dtype)
        attention = resolve_calibration(model.config.attention, model.backbone, model.revision)
        policy = make_policy(attention, _frame_tokens(model), num_layers=model.backbone.num_layers)
    return TakeParts(
        cache,
        name,
        policy,
        make_prompt_attention(model.config.prompt_attention),
        reindex,
        make_reuse(model.config.reuse),
        1 if "decode-single" in ladder else None,
        ladder,
        on_table,
    )


def _kernel_need(config: RenderConfig, backbone: Backbone, dtype: torch.dtype) -> KernelNeed:
    return KernelNeed(
        dtype,
        backbone.head_dim,
        log_mass=config.cache.kind == "temporal",
        tiles=config.attention.kind not in ("dense", "tiles"),  # a table is read by a kernel of its own
    )


def _frame_tokens(model: LoadedModel) -> int:
    return model.backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)


def in_full_precision(model: LoadedModel) -> LoadedModel:
    """The same model, its transformer (and control module) computing in float32, all of it; itself if it does.

    Raises:
        KernelUnavailable: The kernel that was asked for cannot compute so.
    """
    rounds = model.seat is not None and model.seat.ways.rounds
    if model.dit.dtype == torch.float32 and not rounds:
        return model
    kernel = select_kernel(
        model.config.kernel.name, model.device, _kernel_need(model.config, model.backbone, torch.float32)
    )
    branch = None if model.control_branch is None else copy.deepcopy(model.control_branch).float()
    if model.seat is not None:
        model.seat.release()  # there may be no room for two tables
    wide = replace(model, dit=copy.deepcopy(model.dit).float(), control_branch=branch, kernel=kernel, seat=None)
    return wide if model.seat is None else replace(wide, seat=make_seat(wide, exact=True))


def make_seat(model: LoadedModel, *, exact: bool = False) -> TableSeat:
    """The place of a model's tile table; the table itself is made when a take needs it.

    Args:
        model: Loaded.
        exact: Nothing is computed in 8-bit floats, whatever the configuration says.
    Raises:
        ConfigUnsupported: The sizes of the table do not go with this model's chunks.
        KernelUnavailable: The kernel that was asked for cannot run here.
    """
    config = model.config.cache
    assert isinstance(config, TileCacheConfig)
    settings = table_settings(config, model.backbone, model.latent_size)
    need = KernelNeed(model.dit.dtype, model.backbone.head_dim)
    hardware = Hardware.of(model.device)
    ways = choose_ways(model.config, hardware, need, settings.tile, exact=exact)
    return TableSeat(model.dit, model.config, model.latent_size, ways)


def _last_resort(config: CacheConfig) -> CacheConfig:
    """A small window in place of anything larger; a model's native window is one already."""
    if isinstance(config, NativeCacheConfig):
        return config
    if isinstance(config, DenseCacheConfig | TileCacheConfig):
        return _LAST_RESORT
    is_larger = config.recent_latent_frames > _LAST_RESORT.recent_latent_frames
    return _LAST_RESORT if is_larger else config


def _make_cache(model: LoadedModel, config: CacheConfig, dtype: torch.dtype | None) -> tuple[KVCache, str]:
    """The cache and its name in the manifest."""
    num_layers = model.backbone.num_layers
    frame_tokens = _frame_tokens(model)
    if isinstance(config, DenseCacheConfig):
        return DenseCache(num_layers, dtype), "dense"
    if isinstance(config, TileCacheConfig):
        tile = config.tile_for(frame_tokens)
        rule = "" if config.merging == "chains" else f"-{config.merging}"
        storage = "" if config.storage == "model" else f"-{config.storage}"
        return DenseCache(num_layers, dtype), f"tiles-{config.budget_latent_frames}-{tile}{rule}{storage}"
    if isinstance(config, TemporalCacheConfig):
        settings = _temporal_settings(model, config, dtype)
        cache_name = f"temporal-{config.budget_latent_frames}-{config.storage}"
        return make_temporal_cache(config, settings, num_layers, dtype), cache_name
    if isinstance(config, FlowCacheConfig):
        cache = FlowCache(num_layers, _flow_settings(config, frame_tokens), dtype)
        return cache, f"flow-{config.budget_latent_frames}"
    assert not isinstance(config, NativeCacheConfig)
    window = WindowCache(
        num_layers,
        sink_tokens=config.sink_latent_frames * frame_tokens,
        recent_tokens=config.recent_latent_frames * frame_tokens,
        dtype=dtype,
    )
    return window, f"window-{config.sink_latent_frames}+{config.recent_latent_frames}"


def _temporal_settings(model: LoadedModel, config: TemporalCacheConfig, dtype: torch.dtype | None) -> MergeSettings:
    frame_tokens = _frame_tokens(model)
    is_guarded = model.config.guard.enabled
    return temporal_settings(config, model.backbone, dtype or model.dit.dtype, frame_tokens, is_guarded=is_guarded)


def _flow_settings(config: FlowCacheConfig, frame_tokens: int) -> FlowSettings:
    history = config.budget_latent_frames - config.sink_latent_frames - config.recent_latent_frames
    return FlowSettings(
        sink_tokens=config.sink_latent_frames * frame_tokens,
        recent_tokens=config.recent_latent_frames * frame_tokens,
        history_tokens=history * frame_tokens,
        frame_tokens=frame_tokens,
        importance=config.importance,
    )

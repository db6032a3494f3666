"""RenderConfig -> weights, model, cache, policy, kernel: the one place where a name becomes a class.

The out-of-memory ladder lives here too, because it is a choice of parts. Each rung includes those before it:

1. `decode-single`: the VAE decodes one latent frame at a time and cached memory goes back to the device between stages;
2. `cache-bfloat16`: keys and values are stored in bfloat16 (halves them where the model computes in float32);
3. `cache-window`: only the first chunk and the newest 21 latent frames are remembered.

Rung 1 changes pixels by rounding at most, 2 slightly, 3 takes the memory of far history away: all stand in the result.
So does `float32`, which is no rung: what an attempt computes in after one whose latents were not finite.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.cache.window import WindowCache
from workers.checkpoints.files import Weights, open_weights
from workers.config import DenseCacheConfig, RenderConfig, WindowCacheConfig
from workers.contracts import AttentionPolicy, Kernel, KVCache
from workers.denoise import Schedule, make_schedule
from workers.errors import ConfigUnsupported
from workers.kernels.select import select_kernel
from workers.model.backbones import Backbone, find_backbone
from workers.model.dit import CausalDiT
from workers.model.text_encoder import TextEncoder
from workers.model.vae import VideoVAE

logger = logging.getLogger(__name__)

LADDER = ("decode-single", "cache-bfloat16", "cache-window")
BUNDLED_WEIGHTS = Path(__file__).parent / "training" / "weights"
BUNDLED_BACKBONE = "longtake-world"
TEST_BACKBONE = "tiny-test"
"""Has no weights: it starts from numbers drawn with a fixed seed, for tests of everything but the picture."""
_TEST_SEED = 20
_LAST_RESORT = WindowCacheConfig()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """Everything that is loaded once and shared by all takes of an actor."""

    config: RenderConfig
    backbone: Backbone
    device: torch.device
    dit: CausalDiT
    text_encoder: TextEncoder
    vae: VideoVAE
    kernel: Kernel
    policy: AttentionPolicy
    schedule: Schedule
    revision: str

    @property
    def latent_size(self) -> tuple[int, int]:
        return self.backbone.latent_size(self.config.video.width, self.config.video.height)


@dataclass(frozen=True)
class TakeParts:
    """What one take has for itself, after the rungs it stands on."""

    cache: KVCache
    cache_name: str
    decode_latent_frames: int | None
    """Latent frames decoded at once; None means a whole chunk."""
    ladder: tuple[str, ...]


def load_model(config: RenderConfig) -> LoadedModel:
    """Load weights onto the GPU if there is one, else prepare them for the CPU.

    Raises:
        ConfigUnsupported: The model, its size or its weights cannot be rendered with.
        CheckpointMismatch: Weights are missing, damaged, or of another model.
        KernelUnavailable: The kernel asked for cannot run here.
    """
    backbone = find_backbone(config.backbone.name)
    backbone.latent_size(config.video.width, config.video.height)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _DTYPES[config.backbone.dtype]
    kernel = select_kernel(config.kernel.name, device, dtype)
    dit, text_encoder, vae, revision = _build_modules(backbone, config.backbone.checkpoint)
    model = LoadedModel(
        config=config,
        backbone=backbone,
        device=device,
        dit=dit.to(device, dtype).eval().requires_grad_(False),
        text_encoder=text_encoder.to(device).eval().requires_grad_(False),
        vae=_to_channels_last(vae.to(device)).eval().requires_grad_(False),
        kernel=kernel,
        policy=DenseAttention(),
        schedule=make_schedule(config.sampling.num_steps, config.sampling.shift),
        revision=revision,
    )
    logger.info("loaded %s revision %s on %s, kernel %s", backbone.name, revision[:12], device, kernel.version)
    return model


def prepare_take(model: LoadedModel, ladder_rung: int) -> TakeParts:
    """A fresh cache and the savings of the first `ladder_rung` rungs."""
    ladder = LADDER[:ladder_rung]
    config = model.config.cache
    if "cache-window" in ladder and (
        isinstance(config, DenseCacheConfig) or config.recent_latent_frames > _LAST_RESORT.recent_latent_frames
    ):
        config = _LAST_RESORT
    dtype = torch.bfloat16 if "cache-bfloat16" in ladder else None
    num_layers = model.backbone.num_layers
    cache: KVCache
    if isinstance(config, DenseCacheConfig):
        cache, name = DenseCache(num_layers, dtype), "dense"
    else:
        frame_tokens = model.backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)
        cache = WindowCache(
            num_layers,
            sink_tokens=config.sink_latent_frames * frame_tokens,
            recent_tokens=config.recent_latent_frames * frame_tokens,
            dtype=dtype,
        )
        name = f"window-{config.sink_latent_frames}+{config.recent_latent_frames}"
    return TakeParts(cache, name, 1 if "decode-single" in ladder else None, ladder)


def in_full_precision(model: LoadedModel) -> LoadedModel:
    """The same model, its transformer computing in float32; itself if it does already.

    Raises:
        KernelUnavailable: The kernel that was asked for cannot compute so.
    """
    if model.dit.dtype == torch.float32:
        return model
    kernel = select_kernel(model.config.kernel.name, model.device, torch.float32)
    return replace(model, dit=copy.deepcopy(model.dit).float(), kernel=kernel)


def _build_modules(backbone: Backbone, checkpoint: str | None) -> tuple[CausalDiT, TextEncoder, VideoVAE, str]:
    """The networks with their weights, float32 on the CPU, and the revision of the weights."""
    if backbone.text is None:
        raise ConfigUnsupported(
            f"backbone.name: {backbone.name} is known by its sizes only; this version renders with {BUNDLED_BACKBONE}"
        )
    if backbone.name == TEST_BACKBONE and checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_TEST_SEED)
            dit, text_encoder, vae = CausalDiT(backbone), TextEncoder(backbone), VideoVAE()
            dit.reset_parameters(zero_output=False)
        return dit, text_encoder, vae, f"seed-{_TEST_SEED}"
    weights: Weights = open_weights(checkpoint or BUNDLED_WEIGHTS)
    dit, text_encoder, vae = CausalDiT(backbone), TextEncoder(backbone), VideoVAE()
    weights.fill("dit", dit)
    weights.fill("text", text_encoder)
    weights.fill("vae", vae)
    return dit, text_encoder, vae, weights.revision


def _to_channels_last(vae: VideoVAE) -> VideoVAE:
    """Convolutions run faster on pictures whose channels lie together."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return vae

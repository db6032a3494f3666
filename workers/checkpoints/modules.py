"""BackboneConfig -> networks with their weights, on their device: bundled, of the tests, or of the Wan family."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workers.checkpoints.companions import CLIP, UMT5, VAE, clip_shapes, find_tokenizer, read_companion
from workers.checkpoints.fetch import WeightFolder, open_folder
from workers.checkpoints.files import open_weights
from workers.checkpoints.longvie2 import CONTROL_FILE, DIT_FILE, fill_control, replace_tensors
from workers.checkpoints.place import build_empty, fill
from workers.checkpoints.rolling_forcing import read_generator
from workers.checkpoints.tensor_files import Stored
from workers.checkpoints.wan import build_dit, read_dit
from workers.config import BUNDLED_WEIGHTS, SEEDED_BACKBONE, BackboneConfig
from workers.errors import CheckpointMismatch, ConfigUnsupported
from workers.model.backbones import Backbone
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT
from workers.model.image_encoder import ImageEncoder, make_image_encoder
from workers.model.text_encoder import PromptEncoder, TextEncoder
from workers.model.umt5 import Umt5Encoder, make_umt5, open_tokenizer
from workers.model.vae import PictureDecoder, VideoVAE
from workers.model.wan_vae import WanVae, make_wan_vae
from workers.releases import RELEASES, Release

logger = logging.getLogger(__name__)

_TEST_SEED = 20


@dataclass(frozen=True)
class Modules:
    """Networks of one model, in evaluation mode, ready to compute on the device."""

    dit: CausalDiT
    text_encoder: PromptEncoder
    vae: PictureDecoder
    revision: str
    """Names the bytes of all weights."""
    image_encoder: ImageEncoder | None = None
    control_branch: ControlBranch | None = None


def load_modules(backbone: Backbone, config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> Modules:
    """All networks of a model.

    Args:
        backbone: Its sizes.
        config: Where its weights are.
        device, dtype: Where the transformer computes, and as what.
    Raises:
        ConfigUnsupported: The model has no weights here and none were named, or a package is missing.
        CheckpointMismatch: Weights are missing, damaged, or of another model.
    """
    if backbone.text is None:
        return _load_wan(backbone, config, device, dtype)
    if backbone.name == SEEDED_BACKBONE and config.checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_TEST_SEED)
            dit, text_encoder, vae = CausalDiT(backbone), TextEncoder(backbone), VideoVAE()
            dit.reset_parameters(zero_output=False)
        revision = f"seed-{_TEST_SEED}"
    else:
        weights = open_weights(config.checkpoint or BUNDLED_WEIGHTS)
        dit, text_encoder, vae = CausalDiT(backbone), TextEncoder(backbone), VideoVAE()
        weights.fill("dit", dit)
        weights.fill("text", text_encoder)
        weights.fill("vae", vae)
        revision = weights.revision
    for module in (dit.to(device, dtype), text_encoder.to(device), _to_channels_last(vae.to(device))):
        module.eval().requires_grad_(False)
    return Modules(dit, text_encoder, vae, revision)


def _to_channels_last(vae: VideoVAE) -> VideoVAE:
    """Convolutions run faster on pictures whose channels lie together."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return vae


def _load_wan(backbone: Backbone, config: BackboneConfig, device: torch.device, dtype: torch.dtype) -> Modules:
    """Text encoder and VAE first: when one is missing nobody waits for the transformer."""
    if config.checkpoint is None:
        raise ConfigUnsupported(
            f"backbone.checkpoint: {backbone.name} needs published weights; `longtake models show {backbone.name}` "
            "says where they are and how to get them"
        )
    base = open_folder(config.checkpoint)
    overlays = find_finetune(backbone, config, base)
    text_encoder = _load_text_encoder(backbone, base, device, dtype)
    vae = build_empty(lambda: make_wan_vae(backbone))
    fill(vae, read_companion(base, VAE), what="the VAE of Wan2.1", device=device, dtype=dtype)
    image_encoder = _load_image_encoder(backbone, base, device, dtype) if backbone.image_encoder else None
    branch: ControlBranch | None = None
    if backbone.control_branch is not None:
        branch = build_empty(lambda: ControlBranch(backbone))
        fill_control(branch, overlays[CONTROL_FILE], device, dtype)
        branch.eval()
    dit = build_dit(backbone, _read_transformer(base, overlays, config), device, dtype).eval()
    dit.fuse_projections()
    return Modules(dit, text_encoder, WanVae(vae.eval()), _revision(base, *overlays.values()), image_encoder, branch)


def find_finetune(backbone: Backbone, config: BackboneConfig, base: WeightFolder) -> dict[str, WeightFolder]:
    """Files that were trained on top of the base, by their published names; each opened alone.

    They are where `backbone.finetune` says, a file or a folder, else anywhere in the folder of the base.

    Raises:
        CheckpointMismatch: One that the model needs is not there.
    """
    release: Release | None = RELEASES.get(backbone.name)
    wanted = release.finetune_names if release else ()
    where = base if config.finetune is None else open_folder(config.finetune, base.cache)
    if where.only is not None and where is not base and len(wanted) <= 1:
        return {wanted[0] if wanted else where.only: where}  # the user's own file, whatever its name
    found = {}
    for name in wanted:
        path = next((key for key in sorted(where.sizes) if key.rpartition("/")[2] == name), None)
        if path is None:
            raise CheckpointMismatch(
                f"{where.url}: no {name}; {backbone.name} needs it beside the base model. Copy it there, or name it "
                f"with backbone.finetune; `longtake models show {backbone.name}` says where it is published"
            )
        found[name] = open_folder(f"{where.store.url}/{path}", base.cache)
    return found


def _read_transformer(
    base: WeightFolder, overlays: dict[str, WeightFolder], config: BackboneConfig
) -> dict[str, Stored]:
    if DIT_FILE in overlays:
        return replace_tensors(read_dit(base), overlays[DIT_FILE])
    if overlays:
        return read_generator(next(iter(overlays.values())), use_ema=config.use_ema)
    return read_dit(base)


def _load_text_encoder(backbone: Backbone, base: WeightFolder, device: torch.device, dtype: torch.dtype) -> Umt5Encoder:
    """Beside a GPU the weights rest on the CPU and visit it layer by layer.

    They are published in bfloat16 and in float32; float32 is kept where the transformer has it too.
    """
    name = find_tokenizer(base)
    if name is None:
        raise CheckpointMismatch(
            f"{base.url}: no tokenizer: expected google/umt5-xxl/tokenizer.json (original layout) or "
            "tokenizer/tokenizer.json (diffusers layout); copy the folder there, it is published with the base model"
        )
    tokenizer = fetch_tokenizer(base, name)
    module = build_empty(lambda: make_umt5(backbone))
    kept = None if dtype == torch.float32 else dtype
    fill(module, read_companion(base, UMT5), what="the text encoder umT5", device=torch.device("cpu"), dtype=kept)
    is_resting = device.type != "cpu"
    return Umt5Encoder(module.eval(), tokenizer, backbone.text_tokens, device, is_resting=is_resting)


def fetch_tokenizer(base: WeightFolder, name: str) -> Any:
    """The tokenizer in a folder of the base.

    Raises:
        CheckpointMismatch: A file of it is damaged.
    """
    files = [base.fetch(key) for key in base.sizes if key.rpartition("/")[0] == name]
    return open_tokenizer(files[0].parent)


def _load_image_encoder(
    backbone: Backbone, base: WeightFolder, device: torch.device, dtype: torch.dtype
) -> ImageEncoder:
    module = build_empty(lambda: make_image_encoder(backbone))
    found = clip_shapes(read_companion(base, CLIP))
    fill(module, found, what="the image encoder CLIP ViT-H/14", device=device, dtype=dtype)
    return ImageEncoder(module.eval(), backbone)


def _revision(*folders: WeightFolder) -> str:
    text = "".join(folder.revision for folder in folders)
    return folders[0].revision if len(folders) == 1 else hashlib.sha256(text.encode()).hexdigest()

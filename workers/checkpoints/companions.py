"""What stands beside a Wan transformer: names of its text encoder, VAE and image encoder, in both layouts.

Original files (`models_t5_umt5-xxl-enc-bf16.pth`, `Wan2.1_VAE.pth`, `models_clip_...pth`) are renamed to the parameter
names of transformers and diffusers; those that diffusers wrote have these names already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from workers.checkpoints.fetch import WeightFolder
from workers.checkpoints.tensor_files import INDEX_SUFFIX, Stored, as_stored, open_torch_file
from workers.checkpoints.wan import fetch_tensors
from workers.errors import CheckpointMismatch


@dataclass(frozen=True)
class Companion:
    """One of them: where it is published, and what its tensors are called there."""

    what: str
    published: str
    """Name under which it is published in the original layout."""
    original: re.Pattern[str]
    """That name with the freedom that is given, anywhere in the folder."""
    folder: str
    """Its folder in the diffusers layout."""
    rename: Callable[[str], str | None]
    """From original names; None for tensors that are not used."""


def find_companion(folder: WeightFolder, companion: Companion) -> str | None:
    """Name of its file or index; None if it is not there."""
    names = sorted(folder.sizes)
    for ending in (INDEX_SUFFIX, ".safetensors"):
        for name in names:
            if name.startswith(f"{companion.folder}/") and name.endswith(ending):
                return name
    return next((name for name in names if companion.original.fullmatch(name.rpartition("/")[2])), None)


def read_companion(folder: WeightFolder, companion: Companion) -> dict[str, Stored]:
    """Its tensors by the names of the library that runs it.

    Raises:
        CheckpointMismatch: It is not there, or damaged.
    """
    name = find_companion(folder, companion)
    if name is None:
        raise CheckpointMismatch(
            f"{folder.url}: no {companion.what}: expected {companion.published} (original layout) or "
            f"safetensors in {companion.folder}/ (diffusers layout); copy it there, it is published with the base model"
        )
    if name.endswith((INDEX_SUFFIX, ".safetensors")) and name.startswith(f"{companion.folder}/"):
        return {_unprefixed(key): stored for key, stored in fetch_tensors(folder, name).items()}
    if name.endswith(".safetensors"):
        found = fetch_tensors(folder, name)
    else:
        path = folder.fetch(name)
        found = as_stored(open_torch_file(path), path)
    renamed = {companion.rename(key): stored for key, stored in found.items()}
    return {key: stored for key, stored in renamed.items() if key is not None}


def _unprefixed(key: str) -> str:
    return key.removeprefix("vision_model.")


_UMT5_LAYER = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def umt5_name(key: str) -> str:
    """Name in transformers' UMT5EncoderModel of a tensor of the original file."""
    if key == "token_embedding.weight":
        return "shared.weight"
    if key == "norm.weight":
        return "encoder.final_layer_norm.weight"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", key)
    if match and match[2] in _UMT5_LAYER:
        return f"encoder.block.{match[1]}.{_UMT5_LAYER[match[2]]}.weight"
    return key


_VAE_UNIT = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_VAE_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def vae_name(key: str, units: int = 3) -> str:
    """Name in diffusers' AutoencoderKLWan of a tensor of the original file.

    Args:
        key: Original name.
        units: Residual units in a stage of the decoder; behind them stands its upsampler.
    """
    for theirs, ours in (("conv1", "quant_conv"), ("conv2", "post_quant_conv")):
        if key.startswith(f"{theirs}."):
            return f"{ours}.{key.removeprefix(f'{theirs}.')}"
    side, _, rest = key.partition(".")
    if side not in ("encoder", "decoder"):
        return key
    place, _, rest = rest.partition(".")
    if place == "conv1":
        return f"{side}.conv_in.{rest}"
    if place == "head":
        return f"{side}." + rest.replace("0.", "norm_out.", 1) if rest[0] == "0" else f"{side}.conv_out.{rest[2:]}"
    number, _, rest = rest.partition(".")
    if place == "middle":
        where = f"mid_block.{_VAE_MIDDLE[number]}" if number in _VAE_MIDDLE else f"middle.{number}"
    elif place == "downsamples":
        where = f"down_blocks.{number}"
    elif place == "upsamples" and number.isdecimal():
        stage, unit = divmod(int(number), units + 1)
        where = f"up_blocks.{stage}." + (f"resnets.{unit}" if unit < units else "upsamplers.0")
    else:
        return key
    for theirs, ours in _VAE_UNIT.items():
        rest = re.sub(rf"^{re.escape(theirs)}\.", f"{ours}.", rest)
    return f"{side}.{where}.{rest.replace('shortcut.', 'conv_shortcut.', 1)}"


_CLIP_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_CLIP_TOP = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    "pre_norm.weight": "pre_layrnorm.weight",
    "pre_norm.bias": "pre_layrnorm.bias",
    "post_norm.weight": "post_layernorm.weight",
    "post_norm.bias": "post_layernorm.bias",
}


def clip_name(key: str) -> str | None:
    """Name in transformers' CLIPVisionModel of a tensor of the original file; the textual tower is not used."""
    if not key.startswith("visual.") or key == "visual.head":
        return None
    name = key.removeprefix("visual.")
    match = re.fullmatch(r"transformer\.(\d+)\.(.+)\.(weight|bias)", name)
    if match and match[2] in _CLIP_LAYER:
        return f"encoder.layers.{match[1]}.{_CLIP_LAYER[match[2]]}.{match[3]}"
    if match and match[2] == "attn.to_qkv":
        return f"encoder.layers.{match[1]}.self_attn.to_qkv.{match[3]}"
    return _CLIP_TOP.get(name, key)


UMT5 = Companion(
    what="text encoder",
    published="models_t5_umt5-xxl-enc-bf16.pth",
    original=re.compile(r"models_t5_.*\.(pth|safetensors)"),
    folder="text_encoder",
    rename=umt5_name,
)
VAE = Companion(
    what="VAE",
    published="Wan2.1_VAE.pth",
    original=re.compile(r"Wan2\.1_VAE\.(pth|safetensors)"),
    folder="vae",
    rename=vae_name,
)
CLIP = Companion(
    what="image encoder",
    published="models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    original=re.compile(r"models_clip_.*\.(pth|safetensors)"),
    folder="image_encoder",
    rename=clip_name,
)
TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer", "umt5-xxl")
TOKENIZER_FILE = "tokenizer.json"


def find_tokenizer(folder: WeightFolder) -> str | None:
    """Folder of the tokenizer inside the folder of weights."""
    return next((name for name in TOKENIZER_FOLDERS if f"{name}/{TOKENIZER_FILE}" in folder.sizes), None)


def clip_shapes(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """CLIP's one projection of queries, keys and values as three, and embeddings without their leading ones."""
    out: dict[str, Stored] = {}
    for key, stored in found.items():
        if ".to_qkv." in key:
            for index, letter in enumerate("qkv"):
                out[key.replace("to_qkv", f"{letter}_proj")] = stored.share(index, 3)
        elif key.startswith("embeddings.") and stored.shape[0] == 1 and len(stored.shape) == 3:
            _, rows, width = stored.shape
            out[key] = stored.reshaped((rows, width) if "position" in key else (width,))
        else:
            out[key] = stored
    return out

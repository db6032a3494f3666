"""Tiny random weights of Wan-class models, written as they are published: every layout that can be loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from workers.checkpoints.wan import to_diffusers
from workers.model.backbones import Backbone, ImageEncoderSizes, find_backbone
from workers.model.dit import CausalDiT
from workers.model.image_encoder import make_image_encoder
from workers.model.umt5 import make_umt5
from workers.model.wan_vae import make_wan_vae

TINY = find_backbone("tiny-wan-test")
TINY_I2V = replace(
    TINY,
    in_channels=36,
    image_dim=32,
    image_encoder=ImageEncoderSizes(num_layers=3, num_heads=2, ffn_dim=48, picture=28, patch=14),
)
Tensors = dict[str, Tensor]
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def make_dit(backbone: Backbone = TINY, seed: int = 5) -> CausalDiT:
    """No zeros anywhere: they would hide errors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CausalDiT(backbone).requires_grad_(False)
        scramble(model)
    return model


def scramble(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.normal_(std=0.05)


def split_shards(folder: Path, tensors: Tensors, stem: str = "diffusion_pytorch_model", num: int = 3) -> None:
    """Shards with an index, as large models are published."""
    keys = sorted(tensors)
    weight_map = {}
    for index in range(num):
        name = f"{stem}-{index + 1:05d}-of-{num:05d}.safetensors"
        part = {key: tensors[key].contiguous() for key in keys[index::num]}
        save_file(part, str(folder / name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{stem}.safetensors.index.json").write_text(index_text)


def write_original(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, str(folder / "diffusion_pytorch_model.safetensors"))
    return folder


def write_original_shards(folder: Path, tensors: Tensors) -> Path:
    split_shards(folder, tensors)
    return folder


def write_diffusers(folder: Path, tensors: Tensors) -> Path:
    (folder / "transformer").mkdir()
    renamed = {to_diffusers(key): tensor for key, tensor in tensors.items()}
    save_file(renamed, str(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    return folder


def write_diffusers_shards(folder: Path, tensors: Tensors) -> Path:
    (folder / "transformer").mkdir()
    split_shards(folder / "transformer", {to_diffusers(key): tensor for key, tensor in tensors.items()})
    return folder


def write_single_file(folder: Path, tensors: Tensors) -> Path:
    save_file({f"model.diffusion_model.{key}": t for key, t in tensors.items()}, str(folder / "wan.safetensors"))
    return folder / "wan.safetensors"


BASE_LAYOUTS: Mapping[str, Callable[[Path, Tensors], Path]] = {
    "original": write_original,
    "original-shards": write_original_shards,
    "diffusers": write_diffusers,
    "diffusers-shards": write_diffusers_shards,
    "single-file": write_single_file,
}


def write_forcing(path: Path, parts: Mapping[str, Tensors], *, zip_form: bool = True) -> Path:
    """A distilled checkpoint; EMA weights carry FSDP's segments, once outside and once inside the layers."""

    def name(part: str, key: str) -> str:
        if part.endswith("_ema"):
            key = key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module.")
            return f"model._fsdp_wrapped_module.{key}"
        return f"model.{key}"

    content = {part: {name(part, key): t for key, t in tensors.items()} for part, tensors in parts.items()}
    torch.save(content, path, _use_new_zipfile_serialization=zip_form)
    return path


def make_umt5_tensors(backbone: Backbone = TINY) -> Tensors:
    """The text encoder by the names of transformers; tied embeddings once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        module = make_umt5(backbone).requires_grad_(False)
        scramble(module)
    return {key: t for key, t in module.state_dict().items() if key != "encoder.embed_tokens.weight"}


def make_vae_tensors(backbone: Backbone = TINY) -> Tensors:
    """The VAE by the names of diffusers; wide enough numbers that pictures differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        module = make_wan_vae(backbone).requires_grad_(False)
        for tensor in module.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.02)
    return dict(module.state_dict())


def original_umt5_name(key: str) -> str:
    """From transformers' names to those of the published file: written from the table of names, not from our code."""
    if key == "shared.weight":
        return "token_embedding.weight"
    if key == "encoder.final_layer_norm.weight":
        return "norm.weight"
    for ours, theirs in (
        (".layer.0.layer_norm.", ".norm1."),
        (".layer.1.layer_norm.", ".norm2."),
        (".layer.0.SelfAttention.relative_attention_bias.", ".pos_embedding.embedding."),
        (".layer.0.SelfAttention.", ".attn."),
        (".layer.1.DenseReluDense.wi_0.", ".ffn.gate.0."),
        (".layer.1.DenseReluDense.wi_1.", ".ffn.fc1."),
        (".layer.1.DenseReluDense.wo.", ".ffn.fc2."),
    ):
        key = key.replace(ours, theirs)
    return key.replace("encoder.block.", "blocks.")


def original_vae_name(key: str) -> str:
    """From diffusers' names to those of `Wan2.1_VAE.pth`."""
    match = re.match(r"decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.", key)
    if match:
        number = 4 * int(match[1]) + (int(match[2]) if match[2] else 3)
        key = f"decoder.upsamples.{number}." + key[match.end() :]
    if re.match(r"(post_)?quant_conv\.", key):
        return key.replace("post_quant_conv.", "conv2.").replace("quant_conv.", "conv1.")
    for ours, theirs in (
        ("down_blocks.", "downsamples."),
        ("mid_block.resnets.0.", "middle.0."),
        ("mid_block.attentions.0.", "middle.1."),
        ("mid_block.resnets.1.", "middle.2."),
        ("conv_in.", "conv1_in."),
        ("norm_out.", "head.0."),
        ("conv_out.", "head.2."),
        ("conv_shortcut.", "shortcut."),
    ):
        key = key.replace(ours, theirs)
    if "middle.1." not in key:
        for ours, theirs in ((".norm1.", "0"), (".conv1.", "2"), (".norm2.", "3"), (".conv2.", "6")):
            key = key.replace(ours, f".residual.{theirs}.")
    return key.replace("conv1_in.", "conv1.")


def original_clip(state: Tensors) -> Tensors:
    """As the published file has it: one projection for three, embeddings with leading ones, a textual tower beside."""
    out: Tensors = {"textual.token_embedding.weight": torch.ones(3), "visual.head": torch.ones(2, 2)}
    out["visual.cls_embedding"] = state["embeddings.class_embedding"][None, None]
    out["visual.pos_embedding"] = state["embeddings.position_embedding.weight"][None]
    out["visual.patch_embedding.weight"] = state["embeddings.patch_embedding.weight"]
    for leaf in ("weight", "bias"):
        out[f"visual.pre_norm.{leaf}"] = state[f"pre_layrnorm.{leaf}"]
        out[f"visual.post_norm.{leaf}"] = state[f"post_layernorm.{leaf}"]
        for i in range(3):
            ours, theirs = f"encoder.layers.{i}", f"visual.transformer.{i}"
            qkv = [state[f"{ours}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            out[f"{theirs}.attn.to_qkv.{leaf}"] = torch.cat(qkv)
            out[f"{theirs}.attn.proj.{leaf}"] = state[f"{ours}.self_attn.out_proj.{leaf}"]
            for a, b in (
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("mlp.0", "mlp.fc1"),
                ("mlp.2", "mlp.fc2"),
            ):
                out[f"{theirs}.{a}.{leaf}"] = state[f"{ours}.{b}.{leaf}"]
    return {key: t.clone() for key, t in out.items()}


def write_tokenizer(folder: Path) -> None:
    """A word tokenizer in the form of umT5's: pad 0, end mark 1, unknown 2."""
    words = ["a", "red", "green", "house", "river", "flies", "over", "the", "north", "south", "hill", "&", "camera"]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    ).save_pretrained(folder)


def write_whole_model(folder: Path, *, layout: str = "original", backbone: Backbone = TINY) -> Path:
    """Transformer, text encoder, VAE and tokenizer in one folder, as a base model is published."""
    folder.mkdir(parents=True, exist_ok=True)
    dit, text, vae = make_dit(backbone).state_dict(), make_umt5_tensors(backbone), make_vae_tensors(backbone)
    if layout == "original":
        write_original(folder, dit)
        torch.save({original_umt5_name(key): t for key, t in text.items()}, folder / "models_t5_umt5-xxl-enc-bf16.pth")
        torch.save({original_vae_name(key): t for key, t in vae.items()}, folder / "Wan2.1_VAE.pth")
        if backbone.image_encoder is not None:
            tower = make_image_encoder(backbone)
            scramble(tower)
            torch.save(original_clip(dict(tower.state_dict())), folder / CLIP_FILE)
        write_tokenizer(folder / "google" / "umt5-xxl")
        return folder
    write_diffusers_shards(folder, dit)
    for name in ("text_encoder", "vae"):
        (folder / name).mkdir()
    split_shards(folder / "text_encoder", text, "model", 2)
    save_file(vae, str(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    write_tokenizer(folder / "tokenizer")
    return folder

"""Tiny random weights of Wan-class models, written as they are published: every layout that can be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workers.checkpoints.wan import to_diffusers
from workers.model.backbones import Backbone, find_backbone
from workers.model.dit import CausalDiT

TINY = find_backbone("tiny-wan-test")
TINY_I2V = replace(TINY, in_channels=36, image_dim=32)
Tensors = dict[str, Tensor]


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

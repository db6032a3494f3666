"""Transformers of the Wan family: original and diffusers names to ours, wrappers stripped, sizes read off the shapes.

Our names are Wan's own, so the original layout needs no change. The files are those of Wan-AI (Apache-2.0): safetensors
at the root of the folder, or in `transformer/` where diffusers wrote them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from workers.checkpoints.fetch import WeightFolder
from workers.checkpoints.place import build_empty, compare, fill
from workers.checkpoints.tensor_files import INDEX_SUFFIX, TORCH_SUFFIXES, Stored, open_tensors, shards_of
from workers.errors import CheckpointMismatch
from workers.model.backbones import BACKBONES, Backbone
from workers.model.dit import CausalDiT

T = TypeVar("T")
Layout = Literal["original", "diffusers"]

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
"""Path segments that training code leaves in names, anywhere and more than once."""

_STEM = "diffusion_pytorch_model"
_FOLDERS = ("", "transformer/", "dit/")

_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_IN_LAYER = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "norm_added_k": "norm_k_img",
    "norm2": "norm3",  # diffusers' own norm3 has no parameters
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
_LAYER_PART = re.compile("|".join(rf"(?<![^.]){re.escape(name)}(?![^.])" for name in sorted(_IN_LAYER, key=len)[::-1]))
_TOPS = {"patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head", "img_emb"} | {
    name.split(".")[0] for name in _TOP
}


@dataclass(frozen=True)
class DitSizes:
    """What the shapes of a transformer say about it."""

    dim: int
    num_layers: int
    ffn_dim: int
    in_channels: int
    takes_image: bool

    def backbone(self) -> Backbone | None:
        """The named architecture of these sizes, if there is one."""
        for b in BACKBONES.values():
            if b.text is None and sizes_of(b) == self:
                return b
        return None

    def text(self) -> str:
        known = self.backbone()
        name = f"the sizes of {known.name}" if known else "sizes of no model known here"
        image = ", takes an image" if self.takes_image else ""
        return (
            f"{name} (width {self.dim}, {self.num_layers} layers, ffn {self.ffn_dim}, "
            f"{self.in_channels} channels in{image})"
        )


def sizes_of(backbone: Backbone) -> DitSizes:
    """What its weights will look like."""
    b = backbone
    return DitSizes(b.dim, b.num_layers, b.ffn_dim, b.in_channels, bool(b.image_dim))


def from_diffusers(key: str) -> str:
    """Our name of a tensor in diffusers' naming; what is unknown stays as it is."""
    stem, _, leaf = key.rpartition(".")
    if key in _TOP:  # the one tensor without a leaf
        return _TOP[key]
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    if key.startswith("blocks."):
        _, index, rest = key.split(".", 2) if key.count(".") >= 2 else ("", "", key)
        return f"blocks.{index}.{_LAYER_PART.sub(lambda m: _IN_LAYER[m[0]], rest)}" if index else key
    return key


def to_diffusers(key: str) -> str:
    """The inverse, for writing."""
    if key == "head.modulation":
        return "scale_shift_table"
    stem, _, leaf = key.rpartition(".")
    for theirs, ours in _TOP.items():
        if stem == ours:
            return f"{theirs}.{leaf}"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if not match:
        return key
    index, rest = match.groups()
    for theirs, ours in sorted(_IN_LAYER.items(), key=lambda pair: -len(pair[1])):
        rest = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, rest, count=1)
    return f"blocks.{index}.{rest}"


def strip_wrappers(key: str) -> str:
    """A name without what FSDP, compile and checkpointing put into it."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def our_names(found: Mapping[str, T]) -> tuple[dict[str, T], Layout]:
    """Tensors of a Wan transformer by our names, and which layout they came in.

    Raises:
        CheckpointMismatch: Two tensors get the same name.
    """
    names = {key: strip_wrappers(key) for key in found}
    while (shared := _shared_first(names.values())) is not None:
        names = {key: name.removeprefix(f"{shared}.") for key, name in names.items()}
    is_diffusers = any(
        name.startswith(("condition_embedder.", "proj_out.")) or ".attn1." in name for name in names.values()
    )
    if is_diffusers:
        names = {key: from_diffusers(name) for key, name in names.items()}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise CheckpointMismatch(
            f"{len(twice)} tensors stand under two names (first: {twice[0]}, as "
            f"{' and '.join(key for key, name in names.items() if name == twice[0])}); expected each once"
        )
    return {name: found[key] for key, name in names.items()}, "diffusers" if is_diffusers else "original"


def _shared_first(names: Iterable[str]) -> str | None:
    """A first segment that all names share and that is none of Wan's: a wrapper's attribute, such as `model`."""
    firsts = {name.split(".", 1)[0] if "." in name else "" for name in names}
    first = firsts.pop() if len(firsts) == 1 else ""
    return first if first and first not in _TOPS else None


def read_sizes(found: Mapping[str, Stored]) -> DitSizes | None:
    """Sizes from the shapes of tensors in our names; None if these are no Wan transformer."""
    patch, ffn = found.get("patch_embedding.weight"), found.get("blocks.0.ffn.0.weight")
    if patch is None or ffn is None or len(patch.shape) != 5 or len(ffn.shape) != 2:
        return None
    layers = {int(key.split(".")[1]) for key in found if re.match(r"blocks\.\d+\.", key)}
    return DitSizes(
        patch.shape[0], max(layers) + 1, ffn.shape[0], patch.shape[1], any(key.startswith("img_emb.") for key in found)
    )


def find_dit(folder: WeightFolder) -> str | None:
    """Name of the file (or index) that holds the transformer of a base model, in either layout."""
    if folder.only is not None:
        return folder.only
    for place in _FOLDERS:
        for suffix in (INDEX_SUFFIX, ".safetensors", ".bin"):
            if f"{place}{_STEM}{suffix}" in folder.sizes:
                return f"{place}{_STEM}{suffix}"
    return None


def fetch_tensors(folder: WeightFolder, name: str) -> dict[str, Stored]:
    """Bring a file, or an index and all its shards, and open it."""
    path = folder.fetch(name)
    if name.endswith(INDEX_SUFFIX):
        parent = name.rpartition("/")[0]
        for shard in sorted(set(shards_of(path).values())):
            folder.fetch(f"{parent}/{shard}" if parent else shard)
    return open_tensors(path)


def read_dit(folder: WeightFolder) -> dict[str, Stored]:
    """The transformer of a base model, by our names.

    Raises:
        CheckpointMismatch: None is there; the message lists what is.
    """
    name = find_dit(folder)
    if name is None:
        raise CheckpointMismatch(f"{folder.url}: {no_transformer(folder)}")
    return our_names(fetch_tensors(folder, name))[0]


def no_transformer(folder: WeightFolder) -> str:
    """Says what was looked for, and what is there instead."""
    there = [n for n in folder.sizes if n.endswith((".safetensors", *TORCH_SUFFIXES))]
    return (
        f"no transformer there: expected {_STEM}.safetensors or its index, at the root (original layout) or in "
        f"transformer/ (diffusers layout). Weight files found: {', '.join(there[:6]) or 'none'}; a distilled "
        "checkpoint is named with backbone.finetune"
    )


def build_dit(
    backbone: Backbone, found: Mapping[str, Stored], device: torch.device, dtype: torch.dtype | None
) -> CausalDiT:
    """A transformer with these tensors.

    Raises:
        CheckpointMismatch: They do not fit; says what is wrong and which model they are of.
    """
    model = build_empty(lambda: CausalDiT(backbone))
    if not compare(model, found).is_good:
        sizes = read_sizes(found)
        hint = f"they have {sizes.text()}" if sizes else "they are no Wan transformer"
        try:
            fill(model, found, what=backbone.name, device=device, dtype=dtype)
        except CheckpointMismatch as error:
            advice = (
                "name that model, or fetch the weights of this one"
                if sizes != sizes_of(backbone)
                else "fetch them again"
            )
            raise CheckpointMismatch(f"{error}. By their shapes {hint}: {advice}") from None
    fill(model, found, what=backbone.name, device=device, dtype=dtype)
    return model

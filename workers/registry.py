"""Which models there are, what they need, what is at a path, and what a job costs: the answers of `longtake models`.

Loads without torch, which only `check` needs: it compares the tensors of files with those of a model.
"""

from __future__ import annotations

import importlib
import subprocess
from dataclasses import asdict, dataclass
from typing import Any, cast

from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.errors import ConfigUnsupported
from workers.geometry import (
    BFLOAT16_BYTES,
    GPUS,
    UTILISATION,
    Gpu,
    Workload,
    control_parameters,
    dit_parameters,
    image_parameters,
    text_parameters,
)
from workers.model.backbones import BACKBONES, Backbone, find_backbone
from workers.named_policies import POLICIES
from workers.releases import RELEASES

_VAE_PARAMETERS = 126_892_531
_VAE_PICTURES = 120
"""Full-size feature maps of the base width that decoding a chunk holds at once, its causal cache included: what native
takes of 1.3B at 832x480 took more with pictures than without, 8.6 and 9.7 GB (`rollout-h200`), in such maps."""


@dataclass(frozen=True)
class ModelCard:
    """One model in a list."""

    name: str
    num_parameters: int
    rollout: str
    """How it renders; "base only" for one that is loaded as the base of others."""
    width: int
    height: int
    source: str
    """Where its weights are."""
    licence: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Estimate:
    """One take at one size on one GPU. Bytes and operations are counted, seconds assume `utilisation`."""

    gpu: str | None
    gpu_bytes: int | None
    width: int
    height: int
    num_frames: int
    num_steps: int
    weight_bytes: int
    """On the GPU: transformer, control module, VAE, image encoder; bfloat16."""
    text_encoder_bytes: int
    """In host memory: it visits the GPU layer by layer."""
    native_cache_bytes: int
    """0 where nothing is kept between clips."""
    whole_history_bytes: int
    tile_table_bytes: int | None
    """Of the whole history in the table of policy fastar-tiles; None for models that cannot."""
    activation_bytes: int
    vae_decode_bytes: int
    peak_bytes: int
    """With the model's own attention window."""
    fits: bool | None
    teraflop: float
    seconds: float | None
    frames_per_second: float | None
    tile_table_peak_bytes: int | None
    tile_table_seconds: float | None
    utilisation: float = UTILISATION

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def list_models() -> list[ModelCard]:
    """All but those of the tests."""
    return [_card(b) for b in BACKBONES.values() if not b.name.endswith("-test")]


def _card(backbone: Backbone) -> ModelCard:
    release = RELEASES.get(backbone.name)
    if release is None:
        source, licence = "bundled with the package", "as the package"
    else:
        main = release.finetune or release.base
        source, licence = f"huggingface.co/{main.repository}", main.licence
    return ModelCard(
        name=backbone.name,
        num_parameters=dit_parameters(backbone) + control_parameters(backbone),
        rollout=backbone.rollout if backbone.renders_alone else "base only",
        width=backbone.width,
        height=backbone.height,
        source=source,
        licence=licence,
    )


def show_model(name: str) -> dict[str, Any]:
    """Sizes, parts, licences and how to get the weights.

    Raises:
        ConfigUnsupported: No such model.
    """
    backbone = find_backbone(name)
    release = RELEASES.get(name)
    parts = {
        "transformer": dit_parameters(backbone),
        "control module": control_parameters(backbone),
        "text encoder umT5": text_parameters(backbone),
        "image encoder": image_parameters(backbone),
        "VAE": _VAE_PARAMETERS if backbone.wan_vae is not None and backbone.wan_vae.dim == 96 else 0,
    }
    published = release.parts if release else ()
    return {
        **_card(backbone).as_dict(),
        "parts": {part: count for part, count in parts.items() if count},
        "renders_alone": backbone.renders_alone,
        "native": None if backbone.native is None else asdict(backbone.native),
        "fps": backbone.fps,
        "licences": list(release.licences) if release else [],
        "download": [part.download for part in published],
        "needs": {part.repository: list(part.files) for part in published},
    }


def estimate(name: str, *, gpu: Gpu | None, width: int | None, height: int | None, num_frames: int) -> Estimate:
    """Memory and time of one take, by the model's own way of sampling.

    Args:
        name: Model.
        gpu: `find_gpu`; None leaves out what depends on it.
        width, height: Picture size; None is what the model was trained for.
        num_frames: Video frames.
    Raises:
        ConfigUnsupported: No such model, or it cannot make this size.
    """
    backbone = find_backbone(name)
    native = backbone.native
    steps, guidance = (native.num_steps, native.guidance) if native else (4, 1.0)
    work = Workload(backbone, width or backbone.width, height or backbone.height, num_frames, steps, guidance)
    dim = backbone.wan_vae.dim if backbone.wan_vae else 0
    vae = _VAE_PARAMETERS * BFLOAT16_BYTES if dim == 96 else 0
    weights = (dit_parameters(backbone) + control_parameters(backbone) + image_parameters(backbone)) * BFLOAT16_BYTES
    native_cache = 0 if backbone.rollout == "clipwise" else work.kv_bytes(work.native_latent_frames)
    decode = _VAE_PICTURES * dim * work.width * work.height * BFLOAT16_BYTES
    # A chunk attends to one piece: its window's keys are laid down once more, rotated. Pictures are decoded beside it.
    rest = weights + vae + work.activation_bytes + decode
    peak = rest + 2 * native_cache
    seconds = work.seconds(gpu) if gpu else None
    has_table = backbone.rollout == "chunkwise" and backbone.renders_alone and not backbone.image_dim
    cache = TileCacheConfig.model_validate(POLICIES["fastar-tiles"]["cache"])
    attention = TileAttentionConfig.model_validate(POLICIES["fastar-tiles"]["attention"])
    table = work.table_bytes(cache) + work.kept_history_bytes(attention) if has_table else None
    table_flops = work.table_flops(cache, attention)
    return Estimate(
        gpu=gpu.name if gpu else None,
        gpu_bytes=gpu.memory_bytes if gpu else None,
        width=work.width,
        height=work.height,
        num_frames=num_frames,
        num_steps=steps,
        weight_bytes=weights + vae,
        text_encoder_bytes=text_parameters(backbone) * BFLOAT16_BYTES,
        native_cache_bytes=native_cache,
        whole_history_bytes=work.kv_bytes(work.history_latent_frames),
        tile_table_bytes=table,
        activation_bytes=work.activation_bytes,
        vae_decode_bytes=decode,
        peak_bytes=peak,
        fits=None if gpu is None else peak < 0.95 * gpu.memory_bytes,
        teraflop=work.take_flops / 1e12,
        seconds=seconds,
        frames_per_second=num_frames / seconds if seconds else None,
        tile_table_peak_bytes=None if table is None else rest + table,
        tile_table_seconds=None if table is None or gpu is None else table_flops / (gpu.peak_flops * UTILISATION),
    )


def find_gpu(name: str | None) -> Gpu | None:
    """The GPU of that name, or the one of this machine; None if there is none.

    Raises:
        ConfigUnsupported: No such name; the message lists those that exist.
    """
    if name is not None:
        if name.lower() not in GPUS:
            raise ConfigUnsupported(f"gpu: {name!r} is not known; known: {', '.join(GPUS)}")
        return GPUS[name.lower()]
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return match_gpu(answer)


def match_gpu(answer: str) -> Gpu | None:
    """The first line of nvidia-smi as a GPU that we know; its own memory counts."""
    found, _, mebibytes = answer.strip().splitlines()[0].rpartition(",") if answer.strip() else ("", "", "")
    words = found.lower()
    for key, gpu in sorted(GPUS.items(), key=lambda pair: -len(pair[0])):
        if key.split("-")[0] in words.replace("rtx ", "rtx-") and (key[:3] != "rtx" or key in words.replace(" ", "-")):
            return Gpu(found.strip(), int(mebibytes) << 20, gpu.peak_flops)
    return None


def check(url: str, name: str | None, finetune: str | None, *, fetch: bool) -> dict[str, Any]:
    """What is at a path, part by part: layout, files, and how their tensors fit the model. Needs torch.

    Args:
        url: Folder or file, local or s3://.
        name: Model; None finds out by names and shapes.
        finetune: As in the spec.
        fetch: Download from a bucket, to look into files; else they are known by their names alone.
    """
    survey = importlib.import_module("workers.checkpoints.survey")
    found = cast(dict[str, Any], survey.survey(url, name, finetune, fetch=fetch).as_dict())
    release = RELEASES.get(found["model"] or "")
    return {**found, "licences": list(release.licences) if release else []}

"""Random weights of a Wan-class model in the diffusers layout, for benches: everything is there but the art.

`python -m tests.bench.random_wan --out DIR` writes Wan2.1-1.3B's transformer and VAE at their true sizes (bfloat16,
3.2 GB) with a text encoder of two layers and a word tokenizer; `longtake render --model wan-1.3b-test --checkpoint DIR`
renders with it. Numbers have the spread that keeps signals at their size through all layers. The VAE's last convolution
is scaled so that pictures lie around a middle grey: neither black nor frozen, so the quality gate stays as it is.
They show faint noise at the scale of a latent, about as hard to encode as a film.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.wan_files import write_tokenizer
from workers.checkpoints.place import build_empty
from workers.checkpoints.wan import to_diffusers
from workers.model.backbones import Backbone, find_backbone
from workers.model.dit import CausalDiT
from workers.model.umt5 import make_umt5
from workers.model.wan_vae import make_wan_vae

SEED = 20
PICTURE_CONTRAST = 0.1  # of the last convolution: pictures vary by about 6 of 255, which takes 40 KB a frame at crf 18
TIED = "encoder.embed_tokens.weight"  # stands once in files, as shared.weight


def main() -> None:
    """Write the folder and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder, made if need be; files there are overwritten")
    parser.add_argument("--model", default="wan-1.3b-test", help="whose sizes; tiny-wan-test is written in no time")
    args = parser.parse_args()
    started = time.perf_counter()
    num_bytes = write_random_wan(args.out, find_backbone(args.model))
    print(f"{args.out}: {num_bytes / 1e9:.2f} GB of {args.model} in {time.perf_counter() - started:.1f} s", flush=True)


def write_random_wan(folder: Path, backbone: Backbone) -> int:
    """Transformer, text encoder, VAE and tokenizer; the same numbers each time on one kind of device. Returns bytes."""
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(SEED)
    modules: dict[str, nn.Module] = {
        "transformer/diffusion_pytorch_model": build_empty(lambda: CausalDiT(backbone)),
        "text_encoder/model": build_empty(lambda: make_umt5(backbone)),
        "vae/diffusion_pytorch_model": build_empty(lambda: make_wan_vae(backbone)),
    }
    num_bytes = 0
    for name, module in modules.items():
        shapes = {key: tensor.shape for key, tensor in module.state_dict().items() if key != TIED}
        tensors = {key: draw(key, shape, generator) for key, shape in shapes.items()}
        if name.startswith("transformer"):
            tensors = {to_diffusers(key): tensor for key, tensor in tensors.items()}
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(path))
        num_bytes += path.stat().st_size
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
    return num_bytes


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A tensor of this name: gains are one, biases zero, products keep the size of what they are given."""
    leaf = name.rpartition(".")[2]
    if leaf == "gamma" or (len(shape) == 1 and leaf == "weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if leaf == "bias":
        return torch.zeros(shape, dtype=torch.bfloat16)
    if leaf == "modulation":
        std = shape[-1] ** -0.5
    elif name == "shared.weight":
        std = 1.0
    else:
        std = math.prod(shape[1:]) ** -0.5
    if name == "decoder.conv_out.weight":
        std *= PICTURE_CONTRAST
    numbers = torch.empty(shape, dtype=torch.float32, device=generator.device)
    return numbers.normal_(std=std, generator=generator).to(torch.bfloat16).cpu()


if __name__ == "__main__":
    main()

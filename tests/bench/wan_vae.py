"""Wan's VAE decoding a chunk of 3 latent frames at 480x832 with random weights: the library against our decoder.

`python -m tests.bench.wan_vae` on a CUDA GPU: milliseconds, TFLOP/s of the operations that the plain decoder needs,
peak memory, and how far the pixels are from those of the library in float32, against how far the library's own are in
bfloat16.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from tests.bench.record import report
from tests.bench.rollout import machine
from tests.bench.rollout_models import decode_milliseconds, make_vae_network
from tests.bench.rollout_rows import Settings
from workers.model.backbones import find_backbone
from workers.model.wan_decode_weights import Route
from workers.model.wan_vae import WanVae

TERA_PER_LATENT_FRAME = 13.47
"""Operations (a multiply-add is two) of the plain decoder at 480x832, by hand: 6,735 G multiply-adds."""


def pixels(vae: WanVae, latents: Tensor) -> Tensor:
    stream = vae.stream()
    return torch.cat([stream.decode(chunk).float().cpu() for chunk in latents.split(3, 1)], 1)


def measure(name: str, make: Callable[[], WanVae], latents: Tensor, exact: Tensor, chunk: Tensor) -> dict[str, Any]:
    """One row; what fails says so and takes no other along."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        vae = make()
        error = (pixels(vae, latents) - exact).std().item()
        taken = decode_milliseconds(vae, chunk)
    except Exception as problem:
        return {"decoder": name, "failed": f"{type(problem).__name__}: {str(problem).strip()[:160]}"}
    return {
        "decoder": name,
        "ms": taken,
        "fps_alone": 12e3 / taken,
        "tflops_plain": 3 * TERA_PER_LATENT_FRAME / taken * 1e3,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "error_std": error,
    }


def main() -> None:
    backbone = find_backbone("self-forcing-1.3b")
    device = torch.device("cuda")
    settings = Settings(backbone, backbone.width, backbone.height, device, torch.bfloat16)
    torch.manual_seed(0)
    wide = make_vae_network(dataclasses.replace(settings, dtype=torch.float32))
    network = make_vae_network(settings)
    few = torch.randn(1, 6, 16, 16, 24, device=device)  # small pictures: float32 takes its time
    torch.backends.cudnn.allow_tf32 = False
    exact = pixels(WanVae(wide, fast=False), few)
    del wide
    chunk = torch.randn(1, 3, 16, *settings.latent_size, device=device)
    rows = [measure("library", lambda: WanVae(network, fast=False), few, exact, chunk)]
    for route in get_args(Route):
        rows.append(measure(route, lambda route=route: WanVae(network, route=route), few, exact, chunk))
        report("wan_vae", rows, f"{machine(settings)}; pixels span {exact.std().item():.3g} around their mean")


if __name__ == "__main__":
    main()

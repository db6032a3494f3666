"""What loading a transformer takes: host memory at its peak, and seconds. `python -m tests.bench.load_memory`.

Random weights at the true sizes are written in the forms in which models are published and loaded in a process of its
own: onto the GPU where there is one. The peak is counted from when torch and CUDA have started.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.bench.random_wan import SEED, draw
from tests.bench.record import ROOT, report
from workers.checkpoints.fetch import open_folder
from workers.checkpoints.place import build_empty
from workers.checkpoints.rolling_forcing import read_generator
from workers.checkpoints.wan import build_dit, read_dit
from workers.metrics import peak_rss_bytes, rss_bytes
from workers.model.backbones import find_backbone
from workers.model.dit import CausalDiT

FORMS = {
    "safetensors, bfloat16": torch.bfloat16,
    "safetensors, float32": torch.float32,
    "distilled .pt, float32": torch.float32,
}
"""As Wan's base and the distilled models are published; all become bfloat16."""


def write_weights(folder: Path, backbone: str, form: str) -> Path:
    """The transformer alone, in one file or folder."""
    shapes = {
        key: tensor.shape for key, tensor in build_empty(lambda: CausalDiT(find_backbone(backbone))).named_parameters()
    }
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(SEED)
    tensors: dict[str, Tensor] = {key: draw(key, shape, generator).to(FORMS[form]) for key, shape in shapes.items()}
    if form.startswith("distilled"):
        torch.save({"generator_ema": {f"model.{key}": tensor for key, tensor in tensors.items()}}, folder / "model.pt")
        return folder / "model.pt"
    save_file(tensors, str(folder / "diffusion_pytorch_model.safetensors"))
    return folder


def measure(path: Path, backbone: str) -> dict[str, Any]:
    """By a process that does nothing else.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    command = [sys.executable, "-m", "tests.bench.load_memory", "--load", str(path), "--model", backbone]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def load(path: Path, name: str) -> dict[str, Any]:
    """Body of that process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What libraries take at their first use is no weight: a tensor there and back, and a model of the smallest size.
    torch.ones(1 << 20).to(device, torch.bfloat16).float().cpu()
    build_empty(lambda: CausalDiT(find_backbone("tiny-wan-test")))
    before, began = rss_bytes(), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        folder = open_folder(str(path), Path(cache))
        found = read_generator(folder) if path.is_file() else read_dit(folder)
        model = build_dit(find_backbone(name), found, device, torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    size, peak = sum(p.nbytes for p in model.parameters()), peak_rss_bytes() - before
    return {
        "model_gb": size / 1e9,
        "host_peak_gb": peak / 1e9,
        "of_model": peak / size,
        "seconds": seconds,
        "on": device.type,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="self-forcing-1.3b", help="whose sizes")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.load:
        print(json.dumps(load(asked.load, asked.model)))
        return
    rows = []
    for form in FORMS:
        with tempfile.TemporaryDirectory(prefix="longtake-weights-") as folder:
            path = write_weights(Path(folder), asked.model, form)
            rows.append({"file": form} | measure(path, asked.model))
            print(rows[-1], flush=True)
    report(
        "load_memory",
        rows,
        f"Transformer of {asked.model}, random weights, loaded as bfloat16; host_peak_gb is above what the process "
        "held when torch and CUDA had started; the files, just written, came from the page cache. GB are 10^9 bytes.",
    )


if __name__ == "__main__":
    main()

"""Loading takes no more host memory than 1.3 times the model: measured in processes of their own."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.wan_files import TINY, make_dit, write_diffusers_shards, write_forcing, write_original
from workers.model.backbones import Backbone

ROOT = Path(__file__).resolve().parents[4]
WIDE = replace(TINY, dim=640, num_heads=5, ffn_dim=4096, num_layers=9)
LOAD = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from workers.checkpoints.fetch import open_folder
from workers.checkpoints.place import build_empty
from workers.checkpoints.rolling_forcing import read_generator
from workers.checkpoints.wan import build_dit, read_dit
from workers.metrics import peak_rss_bytes, rss_bytes
from workers.model.backbones import find_backbone
from workers.model.dit import CausalDiT

path, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
backbone = replace(find_backbone("tiny-wan-test"), dim=640, num_heads=5, ffn_dim=4096, num_layers=9)
build_empty(lambda: CausalDiT(find_backbone("tiny-wan-test")))  # torch loads modules of its own at first use

before = rss_bytes()
folder = open_folder(path, Path(sys.argv[3]))
found = read_generator(folder) if path.is_file() else read_dit(folder)
model = build_dit(backbone, found, torch.device("cpu"), dtype)
peak = peak_rss_bytes()
size = sum(p.nbytes for p in model.parameters())
print(json.dumps({"bytes": size, "peak": peak - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("original", "float32"), ("diffusers-shards", "bfloat16"), ("distilled", "float32"), ("distilled", "bfloat16")],
)
def test_the_host_never_holds_a_second_copy(tmp_path: Path, layout: str, dtype: str) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    tensors = make_dit(WIDE).state_dict()
    if layout == "original":
        path = write_original(folder, tensors)
    elif layout == "distilled":
        path = write_forcing(folder / "distilled.pt", {"generator": tensors, "generator_ema": tensors})
    else:
        path = write_diffusers_shards(folder, tensors)
    command = [sys.executable, "-c", LOAD, str(path), dtype, str(tmp_path / "cache")]
    answer = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert answer["bytes"] == sum(t.numel() for t in tensors.values()) * getattr(torch, dtype).itemsize
    assert answer["bytes"] > 150e6
    ratio = answer["peak"] / answer["bytes"]
    print(f"{layout} as {dtype}: model {answer['bytes'] / 1e6:.0f} MB, peak above start {ratio:.2f} times that")
    assert ratio <= 1.3


def test_the_backbone_of_the_measurement_is_the_one_that_was_written() -> None:
    assert isinstance(WIDE, Backbone)
    assert f"dim={WIDE.dim}, num_heads={WIDE.num_heads}, ffn_dim={WIDE.ffn_dim}, num_layers={WIDE.num_layers}" in LOAD

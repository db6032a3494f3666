"""Weights that go to a GPU tensor by tensor, and a text encoder that only visits it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.bench.load_memory import measure, write_weights
from tests.wan_files import TINY, make_dit, write_whole_model
from workers.checkpoints.modules import load_modules
from workers.config import BackboneConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_placed_on_the_gpu_is_what_the_files_hold(tmp_path: Path, dtype: torch.dtype) -> None:
    config = BackboneConfig(name=TINY.name, checkpoint=str(write_whole_model(tmp_path / "w")))
    modules = load_modules(TINY, config, GPU, dtype)
    expected = make_dit().state_dict()
    for key, tensor in modules.dit.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), expected[key].to(dtype))


def test_the_text_encoder_visits_the_gpu_and_leaves(tmp_path: Path) -> None:
    config = BackboneConfig(name=TINY.name, checkpoint=str(write_whole_model(tmp_path / "w")))
    here, there = load_modules(TINY, config, CPU, torch.float32), load_modules(TINY, config, GPU, torch.float32)
    text = ["the camera flies over a red house"]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    rows = there.text_encoder.encode(text).text_BPE
    # float32 products on a GPU may run in TF32 and in another order: a few units of the tenth bit.
    torch.testing.assert_close(rows.cpu(), here.text_encoder.encode(text).text_BPE, atol=2e-2, rtol=2e-2)
    del rows
    torch.cuda.synchronize()
    # cuBLAS keeps a workspace of its own; the weights of the true encoder would be 11 GB.
    assert torch.cuda.memory_allocated() - before < 64 << 20


def test_a_prompt_that_is_read_beside_other_work_becomes_the_same_rows(tmp_path: Path) -> None:
    config = BackboneConfig(name=TINY.name, checkpoint=str(write_whole_model(tmp_path / "w")))
    ahead, in_turn = (load_modules(TINY, config, GPU, torch.bfloat16).text_encoder for _ in range(2))
    text = ["the camera flies over a red house"]
    expected = in_turn.encode(text).text_BPE
    work, begun = torch.randn(8192, 8192, device=GPU), torch.cuda.Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(ahead.read_ahead, ["a river"]).result()  # libraries of a thread, which may wait for the GPU
        torch.cuda.synchronize()
        for _ in range(100):
            work = work @ work
        begun.record()
        pool.submit(ahead.read_ahead, text).result()
    assert not begun.query()  # it did not wait for what others had begun
    assert torch.equal(ahead.encode(text).text_BPE, expected)


def test_pictures_equal_those_of_the_cpu(tmp_path: Path) -> None:
    config = BackboneConfig(name=TINY.name, checkpoint=str(write_whole_model(tmp_path / "w")))
    latents = torch.randn(1, 6, 16, 4, 8, generator=torch.Generator().manual_seed(4))
    pictures = []
    # By default convolutions in float32 run in TF32, whose rounding grows over the layers of random weights.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for device in (CPU, GPU):
            stream = load_modules(TINY, config, device, torch.float32).vae.stream()
            pictures.append(torch.cat([stream.decode(chunk).cpu() for chunk in latents.split(3, 1)], 1))
    torch.testing.assert_close(pictures[1], pictures[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["safetensors, bfloat16", "distilled .pt, float32"])
def test_a_model_of_true_size_takes_no_more_host_memory_than_its_bytes(tmp_path: Path, form: str) -> None:
    found = measure(write_weights(tmp_path, "self-forcing-1.3b", form), "self-forcing-1.3b")
    print(form, found)
    assert found["on"] == "cuda"
    assert found["model_gb"] > 2.8
    assert found["of_model"] <= 1.3

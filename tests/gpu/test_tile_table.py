"""What a rollout over a tile table runs on a GPU, against the plain ways."""

from dataclasses import replace

import pytest
import torch

from tests.bench.history_checks import choose_attend, choose_nearest
from tests.bench.history_engine import Variant, make_engine, make_plan
from tests.bench.rollout_rows import Settings
from workers.model.backbones import find_backbone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make_settings() -> Settings:
    backbone = replace(find_backbone("wan2.1-t2v-1.3b"), num_layers=2)
    return Settings(backbone, 208, 160, torch.device("cuda"), torch.bfloat16, 120)


@pytest.mark.filterwarnings("ignore:cutlass:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.parametrize("kernels", ["flash-attn-4", "triton"])
def test_attention_over_listed_tiles_agrees_with_the_reference(kernels: str) -> None:
    name, _, lines = choose_attend(make_settings(), kernels)
    if "ImportError" in lines[0] or "ModuleNotFoundError" in lines[0]:
        pytest.skip(lines[0])
    assert name == kernels, lines


def test_nearest_keys_agree_with_the_plain_ones() -> None:
    _, line = choose_nearest(make_settings(), "auto")
    assert "by Triton" in line, line


def test_captured_calls_give_what_plain_calls_give() -> None:
    settings = make_settings()
    variant = Variant("small", kept_chunks=2, spare_chunks=2, density=0.3)
    latents = []
    for graphs in (True, False):
        engine = make_engine(variant, settings, None, None, graphs=graphs)
        latents.append([c.latents_BTCHW.clone() for c in engine.rollout.run(make_plan(engine, settings, 9))][-1])
    assert torch.equal(*latents)

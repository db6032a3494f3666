"""Rollouts whose attention multiplies 8-bit floats: by the kernel over coded tiles, captured, and rounded by torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.bench import history_engine
from tests.bench.history_engine import Variant, make_engine, make_plan
from tests.bench.rollout_rows import Settings
from workers.config_tiles import Fp8Attention
from workers.kernels.select_fp8 import KERNEL_ON, Fp8Choice
from workers.model.backbones import find_backbone

HAS_KERNEL = torch.cuda.is_available() and torch.cuda.get_device_capability() == KERNEL_ON
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_KERNEL, reason="needs compute capability 9.0")]
KERNELS = ("pairs", "packing", "choice")
CHUNKS = 9


@torch.no_grad()
def roll(which: Fp8Attention, *, graphs: bool = True) -> list[Tensor]:
    backbone = replace(find_backbone("wan2.1-t2v-1.3b"), num_layers=2)
    settings = Settings(backbone, 208, 160, torch.device("cuda"), torch.bfloat16, 120)
    variant = Variant(
        "small", kept_chunks=2, spare_chunks=2, density=0.3, clean_share=0.5, rule="pairs", storage="int4",
        history_at=(0,), fp8_attention=which,
    )  # fmt: skip
    engine = make_engine(variant, settings, None, None, kernels=KERNELS, graphs=graphs)
    return [chunk.latents_BTCHW.clone() for chunk in engine.rollout.run(make_plan(engine, settings, CHUNKS))]


@pytest.mark.parametrize("which", ["steps", "all"])
def test_captured_calls_give_what_plain_calls_give(which: Fp8Attention) -> None:
    captured, plain = roll(which), roll(which, graphs=False)
    assert all(torch.equal(a, b) for a, b in zip(captured, plain, strict=True))


@pytest.mark.parametrize("which", ["steps", "all"])
def test_the_kernel_rounds_about_as_torch_does(which: Fp8Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, found = roll("none"), roll(which)
    monkeypatch.setattr(history_engine, "choose_fp8_of", lambda *_: Fp8Choice(which, "asked for"))
    rounded = roll(which)

    def distance(a: list[Tensor], b: list[Tensor], chunk: int) -> float:
        return float((a[chunk] - b[chunk]).square().mean().sqrt())

    for chunk in range(CHUNKS):
        assert 0 < distance(found, exact, chunk) < 0.1 * float(exact[chunk].std())
    # Both are as far from what is not rounded, and nearer to one another until rollouts go apart.
    assert distance(found, rounded, 0) < distance(rounded, exact, 0)
    assert 0.5 < distance(found, exact, 0) / distance(rounded, exact, 0) < 2

"""What a model cannot do is known before anything starts, by field, value and what is allowed, and without torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from workers.assemble_cache import temporal_settings
from workers.config import RenderConfig, TemporalCacheConfig
from workers.errors import ConfigUnsupported
from workers.kernel_limits import KERNEL_LIMITS
from workers.kernels.select import CAPABILITIES
from workers.model.backbones import BACKBONES, find_backbone
from workers.model_limits import budget_conflicts, conflicts_with_model, kernel_conflict


def make(model: str, **parts: Any) -> RenderConfig:
    return RenderConfig.model_validate({"backbone": {"name": model}} | parts)


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        (
            "longvie2-14b",
            {"cache": {"kind": "flow", "budget_latent_frames": 29}},
            "cache.budget_latent_frames: 29 is below 30, what sink_latent_frames 3, recent_latent_frames 6 and a chunk "
            "of 21 take at least",
        ),
        (
            "longtake-world",
            {"policy": "tempcache", "cache": {"budget_latent_frames": 12}},
            "cache.budget_latent_frames: 12 is below 20, what sink_latent_frames 3, recent_latent_frames 6 in float32, "
            "a chunk of 3 and one more in storage int8 take at least",
        ),
        (
            "longtake-world",
            {"policy": "annsa", "attention": {"layers": [0, 8]}},
            "attention.layers: 8 is not a layer of this model: they go from 0 to 7",
        ),
        ("longtake-world", {"cache": {"kind": "native"}}, "cache.kind: native: longtake-world has no window"),
        ("rolling-forcing-1.3b", {"policy": "teacache"}, "reuse.kind: teacache goes by the steps of one chunk"),
        ("wan2.1-i2v-14b", {}, "backbone.name: wan2.1-i2v-14b takes a picture beside the noise"),
        ("longvie2-14b", {"guard": {"enabled": True}}, "guard.enabled: longvie2-14b makes whole clips"),
        (
            "longtake-world",
            {"policy": "fastar-tiles", "cache": {"budget_latent_frames": 49}},
            "49 is not a multiple of",
        ),
    ],
)
def test_what_does_not_go_with_a_model_is_named(model: str, parts: dict[str, Any], message: str) -> None:
    assert message in "\n".join(conflicts_with_model(make(model, **parts), find_backbone(model)))


@pytest.mark.parametrize("name", [name for name, one in BACKBONES.items() if one.renders_alone])
def test_defaults_go_with_every_model(name: str) -> None:
    assert list(conflicts_with_model(make(name), find_backbone(name))) == []
    assert kernel_conflict(make(name), find_backbone(name)) is None


@pytest.mark.parametrize(
    ("kernel", "model", "dtype", "reason"),
    [
        ("flashinfer", "longtake-world", "float32", "backbone.dtype is float32, it computes in bfloat16, float16"),
        ("flashinfer", "longtake-world", "bfloat16", "cache.kind merges keys, and it cannot add log m"),
        (
            "flex",
            "tiny-test",
            "float32",
            "the head dimension of backbone.name is 40, it takes 16 to 256 in steps of 16",
        ),
    ],
)
def test_a_kernel_that_cannot_do_the_model_on_any_gpu_is_named(
    kernel: str, model: str, dtype: str, reason: str
) -> None:
    config = make(model, backbone={"name": model, "dtype": dtype}, kernel={"name": kernel}, policy="tempcache")
    assert kernel_conflict(config, find_backbone(model)) == f"kernel.name: {kernel!r} cannot run: {reason}"


def test_every_kernel_has_its_limits() -> None:
    assert [capability.name for capability in CAPABILITIES] == list(KERNEL_LIMITS)


@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["longtake-world", "self-forcing-1.3b", "longvie2-14b"])
def test_a_budget_that_would_hold_is_never_refused_and_one_that_would_not_hardly_ever_passes(
    model: str, dtype: str, storage: str
) -> None:
    backbone = find_backbone(model)

    def holds(budget: int) -> bool:
        cache = TemporalCacheConfig.model_validate({"budget_latent_frames": budget, "storage": storage})
        tokens = backbone.tokens_per_latent_frame(backbone.width, backbone.height)
        try:
            temporal_settings(cache, backbone, getattr(torch, dtype), tokens, is_guarded=False)
        except ConfigUnsupported:
            return False
        return True

    def passes(budget: int) -> bool:
        cache = {"kind": "temporal", "budget_latent_frames": budget, "storage": storage}
        config = make(model, backbone={"name": model, "dtype": dtype}, cache=cache)
        return not list(budget_conflicts(config, backbone))

    budgets = range(12, 90)
    assert all(passes(budget) for budget in budgets if holds(budget))
    assert sum(passes(budget) and not holds(budget) for budget in budgets) <= 2


def test_they_load_without_torch() -> None:
    code = "import sys, workers.model_limits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The ordinary loop over a tile table, which measurements use, against the loop that renders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.plain_fp8 import RoundedAttention
from tests.plain_tables import plain_table_parts
from workers.assemble import LoadedModel, load_model, prepare_take
from workers.attention.measure import RecallMeter
from workers.config import RenderConfig
from workers.config_tiles import TileAttentionConfig
from workers.denoise import draw_noise
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.rollout import CleanChunk, Rollout, RolloutPlan

SIZE, CHUNKS = (4, 8), 11


def make_model(storage: str = "model", **attention: Any) -> LoadedModel:
    record = {
        "backbone": {"name": "tiny-test"},
        "video": {"width": 64, "height": 32},
        "sampling": {"num_steps": 2},
        "cache": {
            "kind": "tiles",
            "budget_latent_frames": 15,
            "spare_latent_frames": 3,
            "mass_decay": 0.5,
            "storage": storage,
        },
        "attention": {"kind": "tiles", **attention},
    }
    return load_model(RenderConfig.model_validate(record))


def make_plan(model: LoadedModel, seeds: list[int]) -> RolloutPlan:
    b = model.backbone
    text = torch.randn(1, 5, b.text_dim, generator=torch.Generator().manual_seed(3))
    prompt = model.dit.project_prompt(text.expand(len(seeds), -1, -1), torch.zeros(len(seeds), 5))
    shape = (1, b.chunk_latent_frames, b.latent_channels, *model.latent_size)

    def maps(chunk: int) -> Tensor:
        generator = torch.Generator().manual_seed(chunk)
        one = torch.randn(1, b.chunk_latent_frames, b.control_channels, *model.latent_size, generator=generator)
        return one.expand(len(seeds), -1, -1, -1, -1)

    return RolloutPlan(
        num_chunks=CHUNKS,
        latent_size=model.latent_size,
        schedule=model.schedule,
        guidance=1.0,
        noise=lambda chunk, step: torch.cat([draw_noise(seed, chunk, step, shape) for seed in seeds]),
        prompt=lambda chunk: [prompt],
        control=maps,
    )


def roll_plainly(model: LoadedModel, seeds: list[int]) -> tuple[list[CleanChunk], RecallMeter]:
    cache, policy = plain_table_parts(model)
    meter = RecallMeter(cache, dtype=torch.float32)
    assert isinstance(model.config.attention, TileAttentionConfig)
    kernel = RoundedAttention(model.kernel, model.dit, model.config.attention.fp8)
    attention = RolloutAttention(model.backbone, cache, policy, kernel, probes=(meter,))
    return list(Rollout(model.dit, attention, Stopwatch(model.device)).run(make_plan(model, seeds))), meter


def latents(chunks: list[CleanChunk]) -> Tensor:
    return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1)


@pytest.mark.parametrize(
    ("storage", "fields"),
    [
        ("model", {}),
        ("int8", {}),
        ("int4", {}),
        ("model", {"history_at": (0,)}),
        ("int4", {"history_at": (0,)}),
        ("model", {"clean_pass_share": 0.3}),
        ("int4", {"history_at": (0,), "clean_pass_share": 0.3}),
        ("model", {"density_until_full": 0.8}),
        ("int4", {"history_at": (0,), "clean_pass_share": 0.3, "density_until_full": 0.8}),
        ("model", {"history_at": (0,), "always_recent": True}),
        ("int4", {"history_at": (0, 1), "always_sink": True, "always_recent": True}),
        ("model", {"history_at": (0, 1), "always_sink": True, "always_recent": True}),
        ("model", {"history_at": (0, 1), "choose_at": (0, 1), "always_sink": True}),
    ],
)
def test_it_makes_what_the_render_makes(storage: str, fields: dict[str, Any]) -> None:
    """Of a packed table: in 16 or 32 bits, and rounded as its codes are."""
    model = make_model(storage, density=0.4, keys_per_tile=4, **fields)
    assert prepare_take(model, 0).cache_name == "tiles-15-8" + {"model": ""}.get(storage, f"-{storage}")
    assert model.seat is not None
    rendered = list(model.seat.begin_take().run(make_plan(model, [1])))
    assert any(bool((layer.m_NC > 1).any()) for layer in model.seat.table.layers), "it must have merged"
    plain, _ = roll_plainly(model, [1])
    torch.testing.assert_close(latents(plain), latents(rendered), rtol=1e-3, atol=1e-3)
    assert plain[-1].kv_bytes == rendered[-1].kv_bytes


@pytest.mark.parametrize("which", ["steps", "all"])
def test_it_rounds_attention_as_the_render_does(which: str) -> None:
    fields: dict[str, Any] = {"density": 0.4, "keys_per_tile": 4, "history_at": (0,), "clean_pass_share": 0.3}
    model, exact = make_model("int4", **fields, fp8=which), make_model("int4", **fields)
    assert model.seat is not None
    rendered = list(model.seat.begin_take().run(make_plan(model, [1])))
    plain, unrounded = (roll_plainly(one, [1])[0] for one in (model, exact))

    def distance(other: list[CleanChunk], chunk: int) -> float:
        return float((rendered[chunk].latents_BTCHW - other[chunk].latents_BTCHW).square().mean().sqrt())

    for chunk in range(2):  # later ones go apart: what is rounded a half step from another number may be either
        assert distance(plain, chunk) < 0.2 * distance(unrounded, chunk)
        assert 0 < distance(unrounded, chunk) < 0.02
    torch.testing.assert_close(latents(rendered), latents(unrounded), rtol=0, atol=1.0)


def test_videos_side_by_side_are_as_if_alone() -> None:
    model = make_model(density=0.4)
    both, _ = roll_plainly(model, [1, 2])
    for place, seed in enumerate((1, 2)):
        alone, _ = roll_plainly(model, [seed])
        torch.testing.assert_close(latents(both)[place : place + 1], latents(alone), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_recall_is_measured_over_what_became_of_each_key(density: float) -> None:
    model = make_model(density=density)
    chunks, meter = roll_plainly(model, [1])
    if density == 1.0:
        assert meter.mean() == pytest.approx(1.0, abs=1e-5), "a merged key is kept"
    assert 0.3 < meter.mean_strict() < meter.mean() + 1e-6
    cache, _ = plain_table_parts(replace(model))
    assert cache.owners(0) is None
    assert len(chunks) == CHUNKS

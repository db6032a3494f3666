"""Every baseline in rollouts of the tiny model: as dense where it leaves nothing out, else finite and repeatable."""

import pytest
import torch
from torch import Tensor

from workers.assemble_policies import make_policy
from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.cache.flow import FlowCache, FlowSettings
from workers.cache.window import WindowCache
from workers.config import RenderConfig
from workers.contracts import AttentionPolicy, KVCache, PromptKeys
from workers.denoise import draw_noise, make_schedule
from workers.kernels.reference import ReferenceKernel
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import find_backbone
from workers.model.dit import CausalDiT
from workers.rollout import Rollout, RolloutPlan

BACKBONE = find_backbone("tiny-test")
ROWS, COLUMNS, CHUNKS = 2, 3, 4
FRAME, LAYERS = ROWS * COLUMNS, BACKBONE.num_layers
USUAL: dict[str, dict[str, float | int]] = {
    "streaming": {"sink_latent_frames": 1, "recent_latent_frames": 3},
    "radial": {"sink_latent_frames": 1, "recent_latent_frames": 3},
    "svg": {"sink_latent_frames": 1, "recent_latent_frames": 3, "density": 0.2},
    "svg2": {"sink_latent_frames": 1, "recent_latent_frames": 3, "top_p": 0.3, "keys_per_cluster": 6},
}
FULL: dict[str, dict[str, float | int]] = {"radial": {"decay": 999.0}, "svg": {"density": 1.0}, "svg2": {"top_p": 1.0}}


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    torch.manual_seed(4)
    dit = CausalDiT(BACKBONE)
    dit.reset_parameters(zero_output=False)
    return dit.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompt(model: CausalDiT) -> list[PromptKeys]:
    return model.project_prompt(torch.randn(1, 7, BACKBONE.text_dim, generator=torch.Generator().manual_seed(5)))


def policy_of(kind: str, settings: dict[str, float | int]) -> AttentionPolicy:
    config = RenderConfig.model_validate({"attention": {"kind": kind, **settings}})
    return make_policy(config.attention, FRAME, LAYERS)


def roll(
    model: CausalDiT, prompt: list[PromptKeys], policy: AttentionPolicy, cache: KVCache | None = None
) -> tuple[Tensor, float]:
    """Latents, and the density of the last chunk."""
    plan = RolloutPlan(
        num_chunks=CHUNKS,
        latent_size=(2 * ROWS, 2 * COLUMNS),
        schedule=make_schedule(4, 3.0),
        guidance=1.0,
        noise=lambda chunk, step: draw_noise(11, chunk, step, (1, 3, 16, 2 * ROWS, 2 * COLUMNS)),
        prompt=lambda index: [prompt],
        control=lambda index: None,
    )
    attention = RolloutAttention(BACKBONE, cache or DenseCache(LAYERS), policy, ReferenceKernel())
    chunks = list(Rollout(model, attention, Stopwatch(torch.device("cpu"))).run(plan))
    return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1), chunks[-1].density


@pytest.mark.parametrize("kind", FULL)
def test_a_policy_that_leaves_nothing_out_gives_the_dense_video(
    model: CausalDiT, prompt: list[PromptKeys], kind: str
) -> None:
    expected, _ = roll(model, prompt, DenseAttention())
    latents, density = roll(model, prompt, policy_of(kind, {**USUAL[kind], **FULL[kind]}))
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)
    assert density == pytest.approx(1.0)


@pytest.mark.parametrize("kind", USUAL)
def test_a_policy_serves_one_take_after_another(model: CausalDiT, prompt: list[PromptKeys], kind: str) -> None:
    policy = policy_of(kind, USUAL[kind])
    (first, density), (second, _) = roll(model, prompt, policy), roll(model, prompt, policy)
    assert torch.equal(first, second)
    assert torch.isfinite(first).all()
    assert density < 0.99
    assert not torch.equal(first, roll(model, prompt, DenseAttention())[0])


def test_streaming_over_a_full_cache_equals_the_window(model: CausalDiT, prompt: list[PromptKeys]) -> None:
    window = WindowCache(LAYERS, sink_tokens=FRAME, recent_tokens=3 * FRAME)
    expected, _ = roll(model, prompt, DenseAttention(), window)
    latents, _ = roll(model, prompt, policy_of("streaming", USUAL["streaming"]))
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)


def test_a_flow_cache_with_room_for_all_gives_the_dense_video(model: CausalDiT, prompt: list[PromptKeys]) -> None:
    cache = FlowCache(LAYERS, FlowSettings(FRAME, 3 * FRAME, 99 * FRAME, FRAME))
    expected, _ = roll(model, prompt, DenseAttention())
    torch.testing.assert_close(roll(model, prompt, DenseAttention(), cache)[0], expected, atol=1e-5, rtol=0)


def test_a_flow_cache_keeps_its_limit_and_goes_by_what_queries_look_at(
    model: CausalDiT, prompt: list[PromptKeys]
) -> None:
    videos = []
    for importance in (0.0, 1.0):
        cache = FlowCache(LAYERS, FlowSettings(FRAME, 3 * FRAME, 2 * FRAME, FRAME, importance))
        latents, density = roll(model, prompt, DenseAttention(), cache)
        assert cache.num_tokens == 6 * FRAME
        assert density == pytest.approx((6 + 3) / (3 * CHUNKS))
        assert torch.isfinite(latents).all()
        videos.append(latents)
    assert not torch.equal(*videos)

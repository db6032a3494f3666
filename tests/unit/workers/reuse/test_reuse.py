"""Step reuse: when a step is spared, that it then adds the residual of the last full run, and never in a clean pass."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from workers.attention.dense import DenseAttention
from workers.cache.dense import DenseCache
from workers.contracts import Moment, StepReuse
from workers.denoise import draw_noise, make_schedule
from workers.kernels.sdpa import SdpaKernel
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.model.backbones import find_backbone
from workers.model.dit import CausalDiT
from workers.reuse.flowcache import FlowReuse
from workers.reuse.teacache import TeaCache, TeaCacheSettings, fit_coefficients, relative_change
from workers.rollout import Rollout, RolloutPlan

BACKBONE = find_backbone("tiny-test")
STEPS, CHUNKS = 5, 3
REUSES: dict[str, Callable[[TeaCacheSettings], TeaCache]] = {"teacache": TeaCache, "flowcache": FlowReuse}


def at(step: int, *, branch: int = 0, chunk: int = 0) -> Moment:
    return Moment(chunk, step, STEPS, branch=branch)


def play(reuse: StepReuse, features: list[float], *, branch: int = 0, chunk: int = 0) -> list[bool]:
    """Which steps of a chunk are spared, given the level of what the policy looks at; step k learns the residual k."""
    spared, last = [], -1.0
    for step, level in enumerate(features):
        reuse.begin_call(at(step, branch=branch, chunk=chunk))
        x = torch.full((1, 4, 3), level)
        residual = reuse.recall(x, x)
        spared.append(residual is not None)
        if residual is None:
            reuse.learn(torch.full((1, 4, 3), float(step)))
            last = float(step)
        else:
            assert (residual == last).all(), "not that of the last full run"
    return spared


@pytest.mark.parametrize("name", REUSES)
class TestEveryReuse:
    def test_first_and_last_step_are_always_run(self, name: str) -> None:
        assert play(REUSES[name](TeaCacheSettings(9.0)), [1.0] * STEPS) == [False, True, True, True, False]

    def test_changes_add_up_until_the_threshold_and_then_begin_anew(self, name: str) -> None:
        features = [1.0, 1.1, 1.21, 1.331, 1.4641, 1.61051, 1.771561, 1.9487171]
        moments = [Moment(0, step, 8) for step in range(8)]
        reuse, spared = REUSES[name](TeaCacheSettings(0.25)), []
        for moment, level in zip(moments, features, strict=True):
            reuse.begin_call(moment)
            x = torch.full((1, 4, 3), level, dtype=torch.float64)
            spared.append(reuse.recall(x, x) is not None)
            reuse.learn(x)
        assert spared == [False, True, True, False, True, True, False, False]

    def test_a_chunk_begins_anew(self, name: str) -> None:
        reuse = REUSES[name](TeaCacheSettings(0.5))
        first = play(reuse, [1.0, 1.3, 1.3, 1.3, 1.3])
        assert play(reuse, [7.0, 9.1, 9.1, 9.1, 9.1], chunk=1) == first

    def test_branches_of_the_guidance_are_apart(self, name: str) -> None:
        reuse = REUSES[name](TeaCacheSettings(0.5))
        expected = play(REUSES[name](TeaCacheSettings(0.5)), [1.0, 9.0, 9.0, 9.0, 9.0])
        spared: list[list[bool]] = [[], []]
        for step in range(STEPS):
            for branch, level in enumerate((1.0, 1.0 if step == 0 else 9.0)):
                reuse.begin_call(at(step, branch=branch))
                x = torch.full((1, 2, 2), level)
                residual = reuse.recall(x, x)
                spared[branch].append(residual is not None)
                if residual is None:
                    reuse.learn(torch.full((1, 2, 2), 10.0 * branch))
                else:
                    assert (residual == 10.0 * branch).all()
        assert spared == [[False, True, True, True, False], expected]

    def test_a_clean_pass_is_run(self, name: str) -> None:
        reuse = REUSES[name](TeaCacheSettings(9.0))
        play(reuse, [1.0] * STEPS)
        reuse.begin_call(Moment(0, is_clean_pass=True, noise_level=0.0))
        assert reuse.recall(torch.ones(1, 4, 3), torch.ones(1, 4, 3)) is None


def test_teacache_looks_at_the_modulated_input_and_flowcache_at_the_embedded_latents() -> None:
    for reuse, expected in ((TeaCache(TeaCacheSettings(0.5)), False), (FlowReuse(TeaCacheSettings(0.5)), True)):
        x, modulated = torch.ones(1, 2, 2), torch.ones(1, 2, 2)
        for step in range(2):
            reuse.begin_call(at(step))
            spared = reuse.recall(x, modulated * (1 + step)) is not None
            reuse.learn(x)
        assert spared is expected


def test_the_polynomial_rescales_and_warm_up_steps_are_run() -> None:
    assert play(TeaCache(TeaCacheSettings(0.5, (0.0, 0.6))), [1.0] * STEPS) == [False] * STEPS
    assert play(FlowReuse(TeaCacheSettings(9.0, first_steps=3)), [1.0] * STEPS) == [False, False, False, True, False]


def test_fitted_coefficients_predict_what_they_were_fitted_to() -> None:
    changes = np.linspace(0.1, 1.0, 12)
    fitted = fit_coefficients(changes.tolist(), (0.3 * changes**2 - 0.1 * changes + 0.05).tolist(), 2)
    np.testing.assert_allclose(fitted, (0.3, -0.1, 0.05), atol=1e-9)


def test_relative_change_is_the_l1_distance_over_the_norm_before() -> None:
    assert relative_change(torch.tensor([1.0, -3.0]), torch.tensor([2.0, -3.0])) == pytest.approx(0.25)


class _Watch(TeaCache):
    """Notes in which steps the layers were run."""

    def __init__(self, settings: TeaCacheSettings) -> None:
        super().__init__(settings)
        self.run: list[tuple[int, int, bool]] = []

    def learn(self, residual_BQE: Tensor) -> None:
        self.run.append((self._moment.chunk_index, self._moment.step_index, self._moment.is_clean_pass))
        super().learn(residual_BQE)


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    torch.manual_seed(4)
    dit = CausalDiT(BACKBONE)
    dit.reset_parameters(zero_output=False)
    return dit.eval().requires_grad_(False)


def roll(model: CausalDiT, reuse: StepReuse | None) -> tuple[Tensor, list[float]]:
    torch.manual_seed(5)
    prompt = model.project_prompt(torch.randn(1, 7, BACKBONE.text_dim))
    plan = RolloutPlan(
        num_chunks=CHUNKS,
        latent_size=(4, 6),
        schedule=make_schedule(4, 3.0),
        guidance=1.0,
        noise=lambda chunk, step: draw_noise(3, chunk, step, (1, 3, 16, 4, 6)),
        prompt=lambda index: [prompt],
        control=lambda index: None,
    )
    attention = RolloutAttention(BACKBONE, DenseCache(BACKBONE.num_layers), DenseAttention(), SdpaKernel())
    chunks = list(Rollout(model, attention, Stopwatch(torch.device("cpu")), reuse).run(plan))
    return torch.cat([chunk.latents_BTCHW for chunk in chunks], 1), [chunk.density for chunk in chunks]


def test_a_rollout_without_spared_steps_is_the_same(model: CausalDiT) -> None:
    plain, dense = roll(model, None)
    watched, density = roll(model, TeaCache(TeaCacheSettings(1e-9)))
    assert torch.equal(plain, watched)
    assert density == dense


def test_spared_steps_skip_the_layers_and_count_as_keys_not_seen(model: CausalDiT) -> None:
    watch = _Watch(TeaCacheSettings(99.0))
    latents, density = roll(model, watch)
    per_chunk = [[(0, False), (3, False), (0, True)]] * (CHUNKS - 1) + [[(0, False), (3, False)]]
    assert watch.run == [(index, *call) for index, calls in enumerate(per_chunk) for call in calls]
    assert torch.isfinite(latents).all()
    assert density == pytest.approx([3 / 5, 3 / 5, 2 / 4])


def test_residual_used_again_equals_layers_that_add_it(model: CausalDiT) -> None:
    """The skipped model is its own embedding and head around the residual, with the new timestep."""
    prompt = model.project_prompt(torch.randn(1, 7, BACKBONE.text_dim))
    x, times = torch.randn(1, 3, 16, 4, 6), torch.full((1, 3), 700.0)
    attention = RolloutAttention(BACKBONE, DenseCache(BACKBONE.num_layers), DenseAttention(), SdpaKernel())
    attention.begin_chunk(torch.zeros(18, 3))
    reuse = TeaCache(TeaCacheSettings(99.0))
    reuse.begin_call(at(0))
    full = model(x, times, prompt, attention, reuse=reuse)
    reuse.begin_call(at(1))
    torch.testing.assert_close(model(x, times, prompt, attention, reuse=reuse), full, atol=1e-5, rtol=0)

"""Noise levels against closed forms and published values; noise keyed by (seed, chunk, step)."""

from itertools import pairwise

import pytest
import torch

from workers.denoise import (
    add_noise,
    clean_estimate,
    draw_noise,
    flow_target,
    make_flow_schedule,
    make_schedule,
    step_euler,
    step_renoise,
    warp_steps,
)


def test_published_timesteps_of_four_and_five_steps_at_shift_five() -> None:
    assert make_schedule(4, 5.0).timesteps == pytest.approx((1000.0, 937.5, 833.3333, 625.0), abs=1e-4)
    expected = (1000.0, 952.38104, 882.35291, 769.23077, 555.55560)
    assert make_schedule(5, 5.0).timesteps == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("steps", [(1000, 750, 500, 250), (1000, 800, 600, 400, 200), (999, 313, 1)])
def test_warped_steps_are_the_closed_form_to_the_last_bits_of_float32(steps: tuple[int, ...]) -> None:
    schedule = warp_steps(steps, 5.0)
    for step, sigma, timestep in zip(steps, schedule.sigmas, schedule.timesteps, strict=True):
        u = step / 1000
        assert sigma == pytest.approx(5 * u / (1 + 4 * u), abs=2e-7)
        assert timestep == pytest.approx(1000 * 5 * u / (1 + 4 * u), abs=2e-4)
        assert timestep == float(torch.tensor(sigma) * 1000)
    assert warp_steps((1000, 750, 500, 250), 5.0) == make_schedule(4, 5.0)
    assert warp_steps((1000, 800, 600, 400, 200), 5.0) == make_schedule(5, 5.0)


@pytest.mark.parametrize("steps", [(), (1000, 0), (1001, 500), (500, 500), (250, 500), (1000, -1)])
def test_step_lists_that_are_none_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected places that fall from at most 1000 to 1"):
        warp_steps(steps, 5.0)


def test_fifty_euler_levels_are_the_published_ones() -> None:
    schedule = make_flow_schedule(50, 5.0)
    expected = [5 * (1 - i / 50) / (1 + 4 * (1 - i / 50)) for i in range(50)]
    assert schedule.sigmas == pytest.approx(expected, abs=2e-7)
    assert schedule.timesteps[1] == pytest.approx(995.9349593, abs=1e-3)
    assert schedule.next_sigma(49) == 0.0
    # In bfloat16, as that model gets them, timesteps above 512 are multiples of 4.
    assert torch.tensor(schedule.timesteps[1]).bfloat16().item() == 996.0
    # The mix of history and noise in later clips, 25/27, lies between two levels.
    assert not any(abs(sigma - 25 / 27) < 1e-4 for sigma in schedule.sigmas)
    assert schedule.sigmas[14] > 25 / 27 > schedule.sigmas[15]


@pytest.mark.parametrize("num_steps", [1, 3, 7, 64])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_levels_fall_from_noise_to_clean_on_the_shifted_line(num_steps: int, shift: float) -> None:
    schedule = make_schedule(num_steps, shift)
    assert schedule.sigmas[0] == 1.0
    levels = [*schedule.sigmas, schedule.next_sigma(num_steps - 1)]
    assert levels[-1] == 0.0
    assert all(a > b for a, b in pairwise(levels))
    for i, sigma in enumerate(schedule.sigmas):
        u = 1 - round(1000 * i / num_steps) / 1000
        assert sigma == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=1e-6)
        assert schedule.timesteps[i] == pytest.approx(1000 * sigma, abs=1e-3)


def test_steps_with_the_true_flow_stay_on_the_line_between_clean_and_noise() -> None:
    clean, noise, fresh = torch.randn(3, 2, 3, 4, 4, 4, dtype=torch.float64).unbind(0)
    noisy, flow = add_noise(clean, noise, 0.9), flow_target(clean, noise)
    torch.testing.assert_close(step_euler(noisy, flow, 0.9, 0.4), add_noise(clean, noise, 0.4))
    torch.testing.assert_close(clean_estimate(noisy, flow, 0.9), clean)
    torch.testing.assert_close(step_renoise(noisy, flow, 0.9, 0.4, fresh), 0.6 * clean + 0.4 * fresh)
    torch.testing.assert_close(step_euler(noisy, flow, 0.9, 0.0), clean)


def test_noise_depends_on_seed_chunk_and_step_alone() -> None:
    shape = (1, 3, 16, 8, 8)
    first = draw_noise(2**63 - 1, 5, 2, shape)
    draw_noise(1, 0, 0, shape)
    assert torch.equal(first, draw_noise(2**63 - 1, 5, 2, shape))
    for other in ((2**63 - 2, 5, 2), (2**63 - 1, 4, 2), (2**63 - 1, 5, 1), (2**63 - 1, 2, 5)):
        assert (draw_noise(*other, shape) == first).float().mean() < 0.01
    assert first.dtype == torch.float32
    assert abs(first.mean().item()) < 0.06
    assert first.std().item() == pytest.approx(1.0, abs=0.05)


def test_noise_numbers_are_fixed_for_ever() -> None:
    assert draw_noise(7, 1, 0, (3,)).tolist() == pytest.approx([1.28103018, 2.47979259, -0.78451687], abs=1e-6)

"""Measures of quality say what they claim: nearness, sharpness, memory, stability, following."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from workers.quality.drift import compare_looks, is_stable, measure_look
from workers.quality.following import recognise_biome, recognise_direction
from workers.quality.landmarks import make_quizzes
from workers.quality.reference import confidence_95, psnr_db, sharpness, ssim
from workers.quality.revisit import Away, plan_revisit, seen_before
from workers.worlds.camera import DIRECTIONS
from workers.worlds.clips import Difficulty, Worlds, build_worlds, draw_spec, landmarks_of, render_views

CALM = Difficulty(second_biome=0.0, max_movers=0, mover_share=0.0)


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    return build_worlds([draw_spec(21, CALM), draw_spec(22, CALM)], torch.device("cpu"))


def test_psnr_is_that_of_the_error_of_each_clip() -> None:
    truth = torch.zeros(2, 3, 3, 8, 8)
    off = truth + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1, 1)
    assert psnr_db(off, truth).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)
    assert psnr_db(truth, truth).tolist() == [100.0, 100.0]


def test_ssim_is_one_for_equals_and_falls_with_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(1, 3, 32, 32, generator=generator)
    values = [ssim(picture + level * noise, picture).item() for level in (0.0, 0.1, 0.5)]
    assert values[0] == pytest.approx(1.0, abs=1e-4)
    assert values[0] > values[1] > values[2]


def test_blur_lowers_sharpness(worlds: Worlds) -> None:
    view = worlds.pictures_BCHW[:1, :, :256, :256]
    blurred = torch.nn.functional.avg_pool2d(view, 5, 1, 2)
    assert sharpness(blurred)[0] < 0.9 * sharpness(view)[0]


def test_confidence_narrows_with_the_root_of_n() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    mean, half = confidence_95(values)
    assert abs(mean) < 0.2
    assert half == pytest.approx(1.96 / math.sqrt(400), rel=0.1)


@pytest.mark.parametrize("distance", [39, 159, 318])
@pytest.mark.parametrize("cut", [True, False])
def test_the_place_is_far_from_the_first_view_and_is_returned_to(distance: int, cut: bool) -> None:
    path = plan_revisit(distance, np.random.default_rng(distance), 1024, 128, cut=cut)
    at = path.positions_F2
    assert path.num_latent_frames == distance + 21
    assert np.array_equal(at[-12:], at[60:72][::-1])
    assert np.abs(at[60:72].mean(0) - at[:12].mean(0)).max() > 100
    assert np.hypot(*(at[60] - at[0])) > 128
    away = np.abs(at[72:-12] - at[60]).max(1)
    assert away.max() > 128
    assert at.min() >= 0
    assert at.max() <= 1024 - 128
    if cut:
        window = away[-21 * 4 :]
        assert window.min() > 64  # the frames that a window still holds do not show the whole place


@pytest.mark.parametrize("away", ["fast", "cuts"])
@pytest.mark.parametrize("seed", range(8))
def test_a_fast_camera_and_one_that_cuts_do_not_show_the_place_meanwhile(away: Away, seed: int) -> None:
    path = plan_revisit(159, np.random.default_rng(seed), 1024, 128, cut=True, away=away)
    at = path.positions_F2
    assert path.num_latent_frames == 180
    assert at.min() >= 0
    assert at.max() <= 1024 - 128
    from_when = 72 + (50 if away == "fast" else 0)  # a fast camera needs as long to get away
    distance = np.abs(at[from_when:-12, None] - at[None, 60:72]).max(-1)
    assert distance.min() >= 126
    paces = np.abs(np.diff(at[72:-12], axis=0)).max(1)
    assert ((paces > 4).sum() >= 12) == (away == "cuts")
    assert np.median(paces) >= (2 if away == "fast" else 0)


def test_a_shifted_return_is_displaced_by_at_most_its_shift() -> None:
    path = plan_revisit(39, np.random.default_rng(1), 1024, 128, cut=True, shift=16).positions_F2
    displaced = path[-12:] - path[60:72][::-1]
    assert np.abs(displaced).max() <= 16
    assert np.array_equal(displaced, np.broadcast_to(displaced[0], displaced.shape))


def test_a_return_is_judged_where_its_land_was_in_view_before() -> None:
    for shift, cut in ((0, True), (0, False), (16, True)):
        at = plan_revisit(39, np.random.default_rng(3), 1024, 128, cut=cut, shift=shift).positions_F2
        seen = seen_before(at, 12, 128)
        world = np.zeros((1024, 1024), dtype=bool)
        for x, y in at[:-12].astype(int):
            world[y : y + 128, x : x + 128] = True
        assert np.array_equal(seen, np.stack([world[y : y + 128, x : x + 128] for x, y in at[-12:].astype(int)]))
        assert seen.all() == (shift == 0)
    truth, off = torch.zeros(2, 12, 3, 128, 128), torch.full((2, 12, 3, 128, 128), 0.02)
    off[..., :7] = 1.0
    counts = (torch.arange(128) >= 7).expand(2, 12, 1, 128, 128)
    assert psnr_db(off, truth, counts).tolist() == pytest.approx([40.0, 40.0], abs=1e-3)
    assert (psnr_db(off, truth) < 20).all()


def test_drift_bands_tell_a_wash_out_from_a_walk(worlds: Worlds) -> None:
    early = measure_look(render_views(worlds.pictures_BCHW[:1], torch.tensor([[[200.0, 200.0]]]))[0])
    grey = measure_look(torch.zeros(1, 3, 128, 128))
    assert is_stable(compare_looks(early, early))
    assert not is_stable(compare_looks(early, grey))


def test_true_frames_show_their_biome_and_direction(worlds: Worlds) -> None:
    for index, direction in ((0, 0), (1, 3), (0, 6)):
        step = torch.tensor(DIRECTIONS[direction][1], dtype=torch.float32) * 2
        path = torch.tensor([400.0, 400.0]) + torch.arange(18)[:, None] * step
        frames = render_views(worlds.pictures_BCHW[index : index + 1], path[None])[0]
        assert recognise_biome(frames[::4]) == worlds.specs[index].biomes[0]
        assert recognise_direction(frames) == direction


def test_landmarks_are_recognised_in_the_truth_and_not_elsewhere(worlds: Worlds) -> None:
    marks = landmarks_of(worlds.specs[0], worlds.levels_BHW[0])
    mark = next(m for m in marks if 200 < m.x < 800 and 200 < m.y < 800)
    x, y = int(mark.x) - 64, int(mark.y) - 64
    first = Worlds(worlds.specs[:1], worlds.pictures_BCHW[:1], worlds.levels_BHW[:1])
    quiz = make_quizzes(first, torch.tensor([[float(x), float(y)]]))[0]
    truth = worlds.pictures_BCHW[0, :, y : y + 128, x : x + 128]
    right, asked = quiz.ask(truth)
    assert right == asked >= 1
    assert quiz.ask(truth.roll((40, 40), (1, 2)))[0] < asked

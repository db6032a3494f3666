"""The quality gate: what counts as black and frozen, when a take is refused, and how early."""

import numpy as np
import pytest

from workers.config import QualityGateConfig
from workers.errors import QualityRefused
from workers.quality.gate import LUMA_WEIGHTS, QualityGate, mean_luma

NOISE = np.random.default_rng(7)


def noise(num_frames: int) -> np.ndarray:
    return NOISE.integers(60, 200, (num_frames, 32, 32, 3), dtype=np.uint8)


def black(num_frames: int) -> np.ndarray:
    return NOISE.integers(0, 8, (num_frames, 32, 32, 3), dtype=np.uint8)


def gate(**limits: float) -> QualityGate:
    return QualityGate(QualityGateConfig(**limits))


def test_moving_picture_passes_with_clean_scores():
    watched = gate(max_frozen_ratio=0.0)
    watched.observe(noise(10))
    scores = watched.judge()
    assert (scores.nan, scores.black_ratio, scores.frozen_ratio) == (False, 0, 0)
    assert 100 < scores.mean_luma < 160


def test_black_take_is_refused():
    watched = gate(max_black_ratio=0.5)
    watched.observe(black(6))
    watched.observe(noise(4))
    with pytest.raises(QualityRefused, match="6 of 10 frames are black; the limit is 50%"):
        watched.judge()


def test_share_at_the_limit_passes():
    watched = gate(max_black_ratio=0.5)
    watched.observe(np.concatenate([black(5), noise(5)]))
    assert watched.judge().black_ratio == 0.5


def test_saturated_blue_is_not_black():
    watched = gate(max_black_ratio=0.0)
    watched.observe(np.full((1, 32, 32, 3), (0, 0, 255), np.uint8))
    assert watched.judge().mean_luma == pytest.approx(0.0722 * 255)


def test_frozen_frames_are_counted_across_chunks():
    watched = gate()
    frame = noise(1)
    for num_frames in (1, 3, 4):
        watched.observe(np.repeat(frame, num_frames, axis=0))
    assert watched.scores().frozen_ratio == 7 / 8


def test_one_changed_byte_is_not_frozen():
    watched = gate(max_frozen_ratio=0.0)
    frames = np.repeat(noise(1), 2, axis=0)
    frames[1, 5, 5, 1] ^= 1
    watched.observe(frames)
    assert watched.judge().frozen_ratio == 0


def test_caller_may_reuse_its_buffer():
    watched = gate()
    buffer = noise(2)
    watched.observe(buffer)
    buffer[:] = buffer[-1]
    buffer[0] ^= 1
    watched.observe(buffer)
    assert watched.scores().frozen_ratio == 0


def test_frozen_take_is_refused():
    watched = gate(max_frozen_ratio=0.8)
    watched.observe(np.repeat(noise(1), 20, axis=0))
    with pytest.raises(QualityRefused, match="19 of 20 frames are frozen"):
        watched.judge()


def test_latents_that_are_not_finite_are_refused():
    watched = gate()
    watched.observe(noise(3))
    watched.flag_nan()
    assert watched.scores().nan
    with pytest.raises(QualityRefused, match="not finite"):
        watched.judge()


def test_hopeless_take_is_refused_before_its_end_and_an_open_one_is_not():
    watched = gate(max_black_ratio=0.5)
    watched.observe(black(50))
    watched.judge(num_frames=100)  # the other half may still be bright
    watched.observe(black(1))
    with pytest.raises(QualityRefused, match="51 of 100"):
        watched.judge(num_frames=100)


def test_no_frames_no_refusal():
    assert gate().judge(num_frames=10).mean_luma == 0


def test_fast_luma_equals_the_plain_mean():
    frame = NOISE.integers(0, 256, (48, 32, 3), dtype=np.uint8)
    assert mean_luma(frame) == pytest.approx(frame.mean(axis=(0, 1)) @ LUMA_WEIGHTS, rel=1e-12)
    assert mean_luma(frame[:, ::-1]) == mean_luma(frame)
    assert mean_luma(np.full((8192, 16, 3), 255, np.uint8)) == pytest.approx(255)

"""Is this take a picture at all? Counts black and frozen frames while they stream by, and refuses what is hopeless.

Cheap enough to look at every frame. Drift, memory and comparison with a reference have their own files.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workers.config import QualityGateConfig
from workers.errors import QualityRefused
from workers.task import QualityScores

BLACK_LUMA = 16.0  # mean brightness of 0 to 255 below which a frame shows nothing; also the black of broadcast video
LUMA_WEIGHTS = np.array([0.2126, 0.7152, 0.0722], dtype=np.float64)  # BT.709, as the encoder's


class QualityGate:
    """Looks at the frames of one take, in order.

    Ratios are over the frames seen; a frame is frozen when all its bytes equal those of the frame before.
    The first frame of a take is never frozen, so a still picture of n frames scores (n - 1) / n.
    """

    def __init__(self, config: QualityGateConfig) -> None:
        self._config = config
        self._num_frames = self._num_black = self._num_frozen = 0
        self._luma_sum = 0.0
        self._is_nan = False
        self._last_HWC: NDArray[np.uint8] | None = None

    def observe(self, frames_THWC: NDArray[np.uint8]) -> None:
        """Take the next frames, uint8 RGB; nothing of the array is kept but a copy of its last frame."""
        for frame_HWC in frames_THWC:
            luma = mean_luma(frame_HWC)
            self._luma_sum += luma
            self._num_black += luma < BLACK_LUMA
            self._num_frozen += self._last_HWC is not None and np.array_equal(frame_HWC, self._last_HWC)
            self._last_HWC = frame_HWC
        self._num_frames += len(frames_THWC)
        if self._last_HWC is not None:
            self._last_HWC = self._last_HWC.copy()

    def flag_nan(self) -> None:
        """The caller saw a NaN or an infinity in the latents: pictures can no longer show it."""
        self._is_nan = True

    def scores(self) -> QualityScores:
        """What was measured so far."""
        total = max(self._num_frames, 1)
        return QualityScores(
            nan=self._is_nan,
            black_ratio=self._num_black / total,
            frozen_ratio=self._num_frozen / total,
            mean_luma=self._luma_sum / total,
        )

    def judge(self, num_frames: int | None = None) -> QualityScores:
        """Accept or refuse.

        Args:
            num_frames: Length of the whole take while it is still being made: it is refused as soon as no frame to
                come could save it. None: the frames seen are the whole take.
        Returns:
            The scores of the frames seen.
        Raises:
            QualityRefused: Too much of the take is black or frozen, or its latents were not finite.
        """
        scores = self.scores()
        total = max(num_frames or self._num_frames, 1)
        if scores.nan:
            raise QualityRefused("latents are not finite")
        for name, count, limit in (
            ("black", self._num_black, self._config.max_black_ratio),
            ("frozen", self._num_frozen, self._config.max_frozen_ratio),
        ):
            if count / total > limit:
                raise QualityRefused(f"{count} of {total} frames are {name}; the limit is {limit:.0%}")
        return scores


def mean_luma(frame_HWC: NDArray[np.uint8]) -> float:
    """Mean brightness, 0 to 255.

    Rows are added up first, which numpy does fifteen times as fast as the mean over both axes at once: 1 ms for a frame
    of 832x480. A column's sum fits into 32 bits up to 16 million rows.
    """
    columns = frame_HWC.reshape(len(frame_HWC), -1).sum(axis=0, dtype=np.uint32)
    channels = columns.reshape(-1, 3).sum(axis=0, dtype=np.uint64)
    num_pixels = frame_HWC.size // 3
    return float(channels @ LUMA_WEIGHTS) / num_pixels

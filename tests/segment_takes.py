"""Takes of small pictures for the tests of `SegmentEncoders`: where segments go, and encoders that obey a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from workers.config import VideoConfig
from workers.errors import UploadFailed
from workers.video import encoders as encoders_module
from workers.video.encode import Frames, SegmentEncoder, SegmentPlan
from workers.video.encoders import SegmentEncoders

SMALL = VideoConfig(width=32, height=32, segment_frames=4)
OWN_THREADS = ("order-segments", "encode-frames", "upload-segments")


def small_picture(frame_index: int, config: VideoConfig = SMALL) -> Frames:
    """A picture whose first byte is its index."""
    picture = np.random.default_rng(frame_index // 3).integers(0, 255, (config.height, config.width, 3), np.uint8)
    picture[0, 0, 0] = frame_index
    return picture


class Uploads:
    """Where segments go: remembers their names and bytes, and fails when told so."""

    def __init__(self) -> None:
        self.failure: UploadFailed | None = None
        self.names: list[str] = []
        self.files: list[bytes] = []

    def submit(self, path: Path) -> None:
        self.names.append(path.name)
        self.files.append(path.read_bytes())


class ObedientEncoder(SegmentEncoder):
    """Does before each picture, and before the end, what `before` says: wait, raise, spoil the file."""

    before: Callable[[int], None]

    def encode(self, frame_HWC: Frames) -> None:
        type(self).before(int(frame_HWC[0, 0, 0]))
        super().encode(frame_HWC)


def obey(monkeypatch, before: Callable[[int], None]) -> None:
    """Encoders call `before` with the index of each picture from now on."""
    kind = type("Obedient", (ObedientEncoder,), {"before": staticmethod(before)})
    monkeypatch.setattr(encoders_module, "SegmentEncoder", kind)


def start(
    folder: Path,
    num_frames: int,
    num_encoders: int,
    *,
    first_chunk: int = 4,
    uploads: Uploads | None = None,
    config: VideoConfig = SMALL,
) -> tuple[SegmentEncoders, Uploads]:
    """Encoders of a take and where its segments go."""
    uploads = uploads or Uploads()
    plan = SegmentPlan.of(num_frames, first_chunk, config)
    return SegmentEncoders("videos/cat.mp4", plan, folder, config, uploads, num_encoders), uploads  # type: ignore[arg-type]


def put_all(encoders: SegmentEncoders, frame_indices: range, config: VideoConfig = SMALL) -> None:
    for frame_index in frame_indices:
        encoders.put(small_picture(frame_index, config))


def wait_until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in OWN_THREADS]

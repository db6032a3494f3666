"""Pictures that move, and videos made of them, for every test that needs real frames."""

import random
from pathlib import Path

import numpy as np

from workers.config import VideoConfig
from workers.video.encode import Frames, SegmentPlan, encode_segment, join_segments

CONFIG = VideoConfig(segment_frames=16)
# Without `cpu-independent=1` x264 gives ten different files in twelve runs at this size, on machines with AVX-512; at
# widths that are multiples of 64 it always gives one, and the tests of the heap would prove nothing.
FRAGILE = VideoConfig(width=320, height=320, segment_frames=16)
TAGS = {"item_id": "naïve-7", "prompt_sha256": "ab" * 32, "render_fingerprint": "cd" * 32, "seed": str(2**62)}


def picture(frame_index: int, size: int = 128) -> Frames:
    """A smooth picture that moves, so that B-frames and motion search have work."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    waves = [np.sin((x * a + y * b) / 40 + frame_index / 7) for a, b in ((1, 0.3), (0.2, 1), (0.7, -0.6))]
    return np.round(np.stack(waves, axis=-1) * 100 + 128).astype(np.uint8)


def disturb_heap(randomness: random.Random) -> list[bytearray]:
    return [bytearray(randomness.randrange(1, 300_000)) for _ in range(randomness.randrange(1, 12))]


def make_segment(folder: Path, plan: SegmentPlan, index: int, config: VideoConfig, disturbance: int = 0) -> Path:
    path = folder / f"{index:05d}.mp4"
    randomness = random.Random(disturbance)
    litter = []

    def frames():
        for frame_index in range(plan.start(index), plan.stop(index)):
            litter.append(disturb_heap(randomness))
            if len(litter) > 5:
                litter.pop(randomness.randrange(5))
            yield picture(frame_index, config.width)

    encode_segment(path, frames(), config)
    return path


def make_video(folder: Path, plan: SegmentPlan, config: VideoConfig = CONFIG, disturbance: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    segments = [make_segment(folder, plan, index, config, disturbance) for index in range(plan.num_segments)]
    join_segments(segments, plan, folder / "video.mp4", fps=config.fps, metadata=TAGS)
    return folder / "video.mp4"

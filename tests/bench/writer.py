"""How many pictures a second `VideoWriter` takes, by the number of its encoders: `python -m tests.bench.writer`.

Pictures are as hard for x264 as those of a film: smooth ones that change, with grain. `as fast as it can` writes
without a pause, `paced` writes a chunk of 12 when it is due, as a GPU does. A sustained FPS is that of the last three
quarters of the writes, which a queue that fills at first does not flatter. All files must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from PIL import Image

from cluster.local_store import LocalStore
from tests.bench.record import format_table, load_text, median_and_spread, report
from workers.config import VideoConfig
from workers.video.decode import probe
from workers.video.encode import PIX_FMT, Frames, encode_segment
from workers.video.encoders import choose_num_encoders, usable_cpus
from workers.video.writer import VideoFile, VideoWriter

CHUNK_FRAMES = 12  # three latent frames
GRAIN = 5.0  # levels, standard deviation
KEY_FRAMES = 12  # pictures between two that are drawn; those between are blends


def film(num_frames: int, config: VideoConfig) -> Frames:
    """Pictures that change smoothly and have grain, [num_frames, H, W, 3]; 37 kB each as H.264 at 832x480."""
    rng = np.random.default_rng(1)
    size = (config.width, config.height)
    coarse = (config.height // 8, config.width // 8, 3)
    drawn = [
        np.asarray(Image.fromarray(np.clip(rng.normal(128, 50, coarse), 0, 255).astype(np.uint8)).resize(size, 3))
        for _ in range(num_frames // KEY_FRAMES + 2)
    ]
    frames_THWC = np.empty((num_frames, config.height, config.width, 3), np.uint8)
    for index in range(num_frames):
        place, share = index // KEY_FRAMES, index % KEY_FRAMES / KEY_FRAMES
        smooth = drawn[place] * np.float32(1 - share) + drawn[place + 1] * np.float32(share)
        grain = rng.standard_normal(smooth.shape, np.float32) * np.float32(GRAIN)
        frames_THWC[index] = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    return frames_THWC


def parts(frames_THWC: Frames, config: VideoConfig) -> list[dict[str, Any]]:
    """Milliseconds of a picture on one thread, by what is done with it."""
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    for frame_HWC in frames_THWC:
        hashlib.sha256(frame_HWC.reshape(-1).data).digest()
    seconds["hash"] = time.perf_counter() - started
    converter, started = VideoReformatter(), time.perf_counter()
    for frame_HWC in frames_THWC:
        rgb = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
        space, colours = Colorspace.ITU709, ColorRange.MPEG
        converter.reformat(rgb, format=PIX_FMT, dst_colorspace=space, dst_color_range=colours, threads=1)
    seconds["convert"] = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "segment.mp4", time.perf_counter()
        encode_segment(path, frames_THWC, config)
        seconds["encode"] = time.perf_counter() - started - seconds["convert"]
        started = time.perf_counter()
        probe(path)
        seconds["check"] = time.perf_counter() - started
        kilobytes = path.stat().st_size / len(frames_THWC) / 1000
    per_frame = {f"{name} ms": 1000 * value / len(frames_THWC) for name, value in seconds.items()}
    return [{"part": "one thread", **per_frame, "sum ms": sum(per_frame.values()), "kB": kilobytes}]


@dataclass(frozen=True)
class Take:
    """One take written: seconds from its start until each `write` had returned and until the video was there."""

    written_s: list[float]
    finished_s: float
    video: VideoFile

    @property
    def sustained_fps(self) -> float:
        first = len(self.written_s) // 4
        num_chunks = len(self.written_s) - 1 - first
        return num_chunks * CHUNK_FRAMES / (self.written_s[-1] - self.written_s[first])


def write_take(frames_THWC: Frames, config: VideoConfig, num_encoders: int, pace_fps: float | None) -> Take:
    """Write a take in chunks, each when it is due at `pace_fps`, or without a pause."""
    with tempfile.TemporaryDirectory() as folder:
        writer = VideoWriter(LocalStore(Path(folder)), "video.mp4", "segments", config, {}, len(frames_THWC))
        writer.num_encoders = num_encoders
        started, written_s = time.perf_counter(), []
        for first in range(0, len(frames_THWC), CHUNK_FRAMES):
            if pace_fps is not None:
                # What `write` waited is not caught up with: the GPU stood still meanwhile.
                due = started + writer.blocked_s + (first + CHUNK_FRAMES) / pace_fps
                time.sleep(max(0.0, due - time.perf_counter()))
            writer.write(frames_THWC[first : first + CHUNK_FRAMES])
            written_s.append(time.perf_counter() - started)
        video = writer.finish()
        return Take(written_s, time.perf_counter() - started, video)


def measure(
    frames_THWC: Frames, config: VideoConfig, encoders: Sequence[int], pace_fps: float | None, num_rounds: int
) -> list[dict[str, Any]]:
    """One row for each number of encoders, which take turns; the first is what the others are compared with."""
    takes: dict[int, list[Take]] = {num: [] for num in encoders}
    for _ in range(num_rounds):
        for num in encoders:
            takes[num].append(write_take(frames_THWC, config, num, pace_fps))
    files = {take.video.sha256 for some in takes.values() for take in some}
    assert len(files) == 1, "the number of encoders changes the file"
    num_frames, rows = len(frames_THWC), []
    for num in encoders:
        pairs = list(zip(takes[num], takes[encoders[0]], strict=True))
        fps, fps_spread = median_and_spread([take.sustained_fps for take, _ in pairs])
        ratio, ratio_spread = median_and_spread([take.sustained_fps / one.sustained_fps for take, one in pairs])
        row = {
            "part": "as fast as it can" if pace_fps is None else f"paced, {pace_fps:g} FPS",
            "encoders": num,
            "FPS, sustained": fps,
            "+-": fps_spread,
            "of one encoder": ratio,
            "ratio +-": ratio_spread,
            "FPS, whole take": median_and_spread([num_frames / take.finished_s for take, _ in pairs])[0],
            "blocked share": median_and_spread([take.video.blocked_s / take.written_s[-1] for take, _ in pairs])[0],
            "encode_s": median_and_spread([take.video.encode_s for take, _ in pairs])[0],
            "check_s": median_and_spread([take.video.check_s for take, _ in pairs])[0],
        }
        rows.append(row)
    return rows


def main() -> None:
    """Print the tables and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--encoders", type=int, nargs="+", default=[2, 4], help="beside one, which is always there")
    parser.add_argument("--paces", type=float, nargs="*", default=[60.0, 100.0], help="pictures a second")
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="writer")
    args = parser.parse_args()
    config = VideoConfig(width=args.width, height=args.height)
    frames_THWC = film(args.frames, config)
    rows = parts(frames_THWC[: config.segment_frames], config)
    print(format_table(rows), flush=True)
    encoders = [1, *args.encoders]
    for pace_fps in (None, *args.paces):
        rows += measure(frames_THWC, config, encoders, pace_fps, args.rounds)
        print(format_table(rows[-len(encoders) :]), flush=True)
    notes = (
        f"{args.frames} frames of {args.width}x{args.height}, {args.rounds} rounds in turns, all files equal. encode_s "
        f"and check_s are sums over threads. By itself the writer takes {choose_num_encoders(usable_cpus())} encoders "
        f"here. {load_text()}"
    )
    report(args.name, rows, notes)


if __name__ == "__main__":
    main()

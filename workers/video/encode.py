"""Frames to H.264: closed-GOP segments, and their join into one web-playable MP4 without encoding again.

Each segment has its own encoder, so any of them can be encoded again later, elsewhere, and fit in its place byte for
byte. Threads, queues and the store are the writer's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from numpy.typing import NDArray

from workers.config import VideoConfig
from workers.errors import EncodeFailed

Frames = NDArray[np.uint8]
"""Raw RGB pictures, [T, H, W, 3], 0 to 255."""

CODEC = "h264"
PIX_FMT = "yuv420p"
BT709 = 1  # the number of BT.709 in FFmpeg's tables of spaces, primaries and transfers
REORDER_FRAMES = (
    2  # x264's decoding delay with its default B-frame pyramid: a packet's dts lies this far before its place
)
MAX_KEY_INTERVAL_FRAMES = 240  # a player can only seek to key frames; 10 s at 24 fps, however long a segment is


@dataclass(frozen=True)
class SegmentPlan:
    """Where segments begin: the first holds the first chunk, each later one `segment_frames`.

    A pure function of these three numbers, all decided by the configuration and the task, so that every attempt cuts
    at the same frames. Segments partition [0, num_frames) in order.
    """

    num_frames: int
    first_frames: int
    segment_frames: int

    def __post_init__(self) -> None:
        if not 1 <= self.first_frames <= min(self.segment_frames, self.num_frames):
            raise ValueError(f"first segment of {self.first_frames} frames does not fit {self}")

    @classmethod
    def of(cls, num_frames: int, first_chunk_frames: int, config: VideoConfig) -> SegmentPlan:
        """The plan of a take whose first chunk has so many frames."""
        first_frames = min(first_chunk_frames, config.segment_frames, num_frames)
        return cls(num_frames, first_frames, config.segment_frames)

    @property
    def num_segments(self) -> int:
        return 1 + -(-(self.num_frames - self.first_frames) // self.segment_frames)

    def start(self, segment_index: int) -> int:
        """First frame of a segment."""
        if segment_index == 0:
            return 0
        return self.first_frames + (segment_index - 1) * self.segment_frames

    def stop(self, segment_index: int) -> int:
        """One past the last frame of a segment."""
        return min(self.start(segment_index + 1), self.num_frames)


class SegmentEncoder:
    """Encodes one segment into an MP4 file of its own, which begins with a key frame and refers to nothing outside.

    One thread and `cpu-independent=1`: x264 otherwise gives different bytes from run to run on AVX-512 machines, and
    from one thread count to another.
    """

    def __init__(self, path: Path, config: VideoConfig) -> None:
        self._size = (config.height, config.width, 3)
        self._time_base = Fraction(1, config.fps)
        self._converter = VideoReformatter()
        self._num_frames = 0
        self._container = av.open(str(path), "w", format="mp4", container_options={"fflags": "+bitexact"})
        try:
            self._stream = self._add_stream(config)
        except BaseException:
            self._container.close()
            raise

    def _add_stream(self, config: VideoConfig) -> av.VideoStream:
        key_interval = str(min(config.segment_frames, MAX_KEY_INTERVAL_FRAMES))
        options = {
            "preset": config.preset,
            "crf": str(config.crf),
            "g": key_interval,
            "keyint_min": key_interval,
            "sc_threshold": "0",
            "x264-params": "cpu-independent=1:open-gop=0",
        }
        stream = self._container.add_stream("libx264", rate=config.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = config.width, config.height, PIX_FMT
        codec = stream.codec_context
        stream.time_base = codec.time_base = self._time_base
        codec.thread_count = 1
        codec.color_range = ColorRange.MPEG
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        return stream

    def encode(self, frame_HWC: Frames) -> None:
        """Take the next picture of the segment."""
        if frame_HWC.shape != self._size:
            raise ValueError(f"frame of shape {frame_HWC.shape}, expected {self._size}")
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
        # The tags of the stream describe the pixels and do not convert them: without this they would be BT.601.
        frame = self._converter.reformat(
            rgb, format=PIX_FMT, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
        )
        frame.pts = self._num_frames
        frame.time_base = self._time_base
        self._num_frames += 1
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Flush and close; the file is complete afterwards."""
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def close(self) -> None:
        """Release the encoder; the file is of no use unless `finish` came first."""
        self._container.close()

    def __enter__(self) -> SegmentEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            self.close()


def encode_segment(path: Path, frames: Iterable[Frames], config: VideoConfig) -> None:
    """Encode one whole segment: the plain form of what the writer does frame by frame."""
    with SegmentEncoder(path, config) as encoder:
        for frame_HWC in frames:
            encoder.encode(frame_HWC)


def join_segments(
    segments: Sequence[Path], plan: SegmentPlan, path: Path, *, fps: int, metadata: dict[str, str]
) -> None:
    """Put segments one after the other into a faststart MP4 by copying packets.

    Args:
        segments: Files made by SegmentEncoder, in order, one for each segment of `plan`.
        path: A real file (faststart reads it back to move the index to the front).
        metadata: Tags of the file; written in the order of their keys, so that equal tags give equal bytes.
    Raises:
        EncodeFailed: A segment does not hold the frames that the plan gives it, or had another encoder's settings.
    """
    if len(segments) != plan.num_segments:
        raise EncodeFailed(f"{len(segments)} segments, expected {plan.num_segments}")
    options = {
        "movflags": "+faststart+use_metadata_tags",
        "fflags": "+bitexact",
        "movie_timescale": str(1000 * fps),  # the default, 1000, rounds the duration of most takes
    }
    with av.open(str(path), "w", format="mp4", container_options=options) as output:
        output.metadata.update(sorted(metadata.items()))
        stream: av.VideoStream | None = None
        settings: bytes | None = None
        for segment_index, segment in enumerate(segments):
            with av.open(str(segment)) as source:
                template = source.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(template)
                    settings = template.codec_context.extradata
                elif template.codec_context.extradata != settings:
                    raise EncodeFailed(f"segment {segment_index} was encoded with other settings than the first one")
                first, stop = plan.start(segment_index), plan.stop(segment_index)
                _copy_packets(source, output, stream, range(first, stop), fps)


def _copy_packets(
    source: av.container.InputContainer,
    output: av.container.OutputContainer,
    stream: av.VideoStream,
    frames: range,
    fps: int,
) -> None:
    """Copy one segment to its place in time, with timestamps counted in frames."""
    num_packets = 0
    for packet in source.demux(source.streams.video[0]):
        if packet.size == 0:
            continue  # the empty packet by which PyAV announces the end
        assert packet.pts is not None
        assert packet.time_base is not None
        shown_at = round(packet.pts * packet.time_base * fps)
        packet.stream = stream
        packet.time_base = Fraction(1, fps)
        packet.pts = frames.start + shown_at
        # x264 shortens the delay of segments of one or two frames; counted anew, dts stay one frame apart throughout.
        packet.dts = frames.start + num_packets - REORDER_FRAMES
        packet.duration = 1
        output.mux(packet)
        num_packets += 1
    if num_packets != len(frames):
        raise EncodeFailed(f"segment from frame {frames.start} holds {num_packets} frames, expected {len(frames)}")

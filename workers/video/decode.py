"""Reads MP4 files back: what they say of themselves, what they really hold, and single frames of them.

A file is judged by decoding all of it: an MP4 cut at a fragment boundary decodes without an error, and zeroed bytes
pass unless the decoder is told to be strict.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from workers.errors import EncodeFailed
from workers.video.encode import Frames

STRICT = {"err_detect": "explode"}
"""For container and codec alike: without both, 400 zeroed bytes in the middle of a file decode silently."""


@dataclass(frozen=True)
class VideoProbe:
    """What a file holds. `num_frames` was counted, not read from the index."""

    num_frames: int
    width: int
    height: int
    fps: float
    duration_s: float
    codec: str
    pix_fmt: str
    num_bytes: int
    metadata: dict[str, str]


class Digest(Protocol):
    """A hash of hashlib."""

    def update(self, data: bytes, /) -> None: ...


def probe(path: Path, packets: Digest | None = None) -> VideoProbe:
    """Decode a whole video and say what it holds.

    Args:
        packets: Gets the bytes of all packets in order, as they are decoded.
    Raises:
        EncodeFailed: It is not a video, or is damaged.
    """
    with _strict(path) as (container, stream):
        num_frames = 0
        for packet in container.demux(stream):
            if packets is not None:
                packets.update(bytes(packet))
            num_frames += len(packet.decode())
        return _facts_of(container, stream, path, num_frames)


def probe_packets(path: Path, packets: Digest) -> VideoProbe:
    """As `probe`, but frames are counted as packets and not decoded.

    Args:
        packets: Gets the bytes of all packets in order. With equal hashes and equal settings of the decoder two files
            decode to the same frames.
    """
    with _strict(path) as (container, stream):
        num_packets = 0
        for packet in container.demux(stream):
            packets.update(bytes(packet))  # the last one is empty: by it PyAV announces the end
            num_packets += packet.size > 0
        return _facts_of(container, stream, path, num_packets)


def indexed_num_frames(path: Path) -> int:
    """How many frames the file's index promises; costs nothing and proves nothing (see `probe`)."""
    with _strict(path) as (_, stream):
        return stream.frames


def frames_sha256_of_file(path: Path) -> str:
    """SHA-256 over the decoded planes of all frames, in order: equal for files that show the same pictures.

    Encoding is lossy, so it never equals the `frames_sha256` of a manifest row, which is taken before encoding.

    Raises:
        EncodeFailed: It is not a video, or is damaged.
    """
    digest = hashlib.sha256()
    with _strict(path) as (container, stream):
        for frame in container.decode(stream):
            digest.update(frame.to_ndarray().tobytes())
    return digest.hexdigest()


def decode_frames(path: Path, indices: Sequence[int]) -> Frames:
    """The frames with these indices as RGB, [len(indices), H, W, 3], in the order asked for.

    Seeks to the key frame before each index, so a few frames of a long video cost little.

    Raises:
        IndexError: The video has no such frame.
        EncodeFailed: It is not a video, or is damaged where it was read.
    """
    found: dict[int, Frames] = {}
    with _strict(path) as (container, stream):
        assert stream.time_base is not None
        rate = stream.average_rate or stream.base_rate
        if rate is None:
            raise EncodeFailed(f"{path.name}: no frame rate")
        for frame_index in sorted(set(indices)):
            if frame_index < 0:
                raise IndexError(f"{path.name}: frame {frame_index}")
            container.seek(round(frame_index / rate / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts is not None and round(frame.pts * stream.time_base * rate) == frame_index:
                    found[frame_index] = _as_rgb(frame)
                    break
            else:
                raise IndexError(f"{path.name}: frame {frame_index}")
    return np.stack([found[frame_index] for frame_index in indices])


def each_picture(path: Path) -> Iterator[Frames]:
    """All frames as RGB [H, W, 3], in order, converted as the file's own tags say (BT.601 where it has none).

    Raises:
        EncodeFailed: It is not a video, or is damaged.
    """
    with _strict(path) as (container, stream):
        for frame in container.decode(stream):
            yield np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _facts_of(
    container: av.container.InputContainer, stream: av.VideoStream, path: Path, num_frames: int
) -> VideoProbe:
    return VideoProbe(
        num_frames=num_frames,
        width=stream.width,
        height=stream.height,
        fps=float(stream.average_rate or 0),
        duration_s=float((stream.duration or 0) * (stream.time_base or 0)),
        codec=stream.codec_context.name,
        pix_fmt=stream.codec_context.pix_fmt or "",
        num_bytes=path.stat().st_size,
        metadata=dict(container.metadata),
    )


def _as_rgb(frame: av.VideoFrame) -> Frames:
    """For eyes: FFmpeg's converter rounds down, so colours come out about one level darker than they are stored."""
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=Colorspace.ITU709,
        src_color_range=ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
    )
    return np.asarray(rgb.to_ndarray(), dtype=np.uint8)


@contextmanager
def _strict(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open for strict decoding on one thread; what FFmpeg objects to becomes EncodeFailed."""
    try:
        with av.open(str(path), options=dict(STRICT)) as container:
            if not container.streams.video:
                raise EncodeFailed(f"{path.name}: no video stream")
            stream = container.streams.video[0]
            stream.codec_context.options = dict(STRICT)
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        raise EncodeFailed(f"{path.name}: {error}") from error

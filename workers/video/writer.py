"""Turns frames into a finished video object in the background, while the next chunk is being generated.

Encoding (`encoders.py`) and uploading (`upload.py`) have threads of their own and bounded queues, so memory is constant
at any length and a slow network shows as time blocked in `write`, which is counted. Each segment is decoded and goes to
the store as soon as it and all before it are closed; the whole video is joined from local copies, must hold the packets
that were decoded, and is uploaded before `finish` returns. So the last frame of a long take is not followed by a
decoding of the whole.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import av

from cluster.object_store import ObjectStore
from cluster.owned_folder import OwnedFolder
from workers.config import VideoConfig
from workers.errors import EncodeFailed, RenderError
from workers.video.decode import decode_frames, probe_packets, sha256_of_file
from workers.video.encode import CODEC, PIX_FMT, Frames, SegmentPlan, join_segments
from workers.video.encoders import SegmentEncoders, choose_num_encoders, usable_cpus
from workers.video.upload import SegmentUploads

SCRATCH_PREFIX = "longtake-video-"


@dataclass(frozen=True)
class VideoFile:
    """A video that is complete in the store; every packet of it was decoded. Times in seconds.

    The three work times overlap with generation and are sums over threads, so that with several encoders `encode_s` and
    `check_s` can exceed the time that passed; `blocked_s` is what the caller of `write` waited.
    """

    key: str
    num_bytes: int
    sha256: str
    frames_sha256: str
    width: int
    height: int
    fps: int
    num_frames: int
    codec: str
    pix_fmt: str
    crf: int
    num_segments: int
    encode_s: float
    upload_s: float
    check_s: float
    blocked_s: float


class VideoWriter:
    """Writes one take: `write` with every chunk, then `finish`, or `abort` at any time; all from one thread.

    The first `write` must bring the whole first chunk: it becomes the first segment, so that something durable
    exists after one chunk, and all later cuts follow from its length (see SegmentPlan).

    Args:
        store: Where objects go; its `put_file` is also called from the writer's own thread.
        video_key: Object of the finished video; must be unique to the attempt.
        segment_prefix: Folder of the segments while the take is being made.
        metadata: Tags of the file. Equal frames and equal tags give equal bytes, so keep times and hosts out of it.
        num_frames: Length of the take; frames beyond it are dropped.

    Attributes:
        num_encoders: Threads that encode; may be set before the first `write` and changes no byte.
    """

    def __init__(
        self,
        store: ObjectStore,
        video_key: str,
        segment_prefix: str,
        config: VideoConfig,
        metadata: dict[str, str],
        num_frames: int,
    ) -> None:
        self._video_key, self._config, self._num_frames = video_key, config, num_frames
        self._metadata = {**metadata, "fps": str(config.fps), "num_frames": str(num_frames)}
        self._folder = OwnedFolder(SCRATCH_PREFIX)
        self._uploads = SegmentUploads(store, segment_prefix)
        self._encoders: SegmentEncoders | None = None
        self._num_written = 0
        self._blocked_s = 0.0
        self._is_open = True
        self.num_encoders = choose_num_encoders(usable_cpus())

    @property
    def blocked_s(self) -> float:
        """Seconds that `write` has waited so far."""
        return self._blocked_s

    def write(self, frames_THWC: Frames) -> None:
        """Hand over the next frames, uint8 RGB [T, H, W, 3]; the array must not be changed afterwards.

        Raises:
            EncodeFailed, UploadFailed: What went wrong in the background since the last call.
            ValueError: The frames are not of the configured size, or the writer is closed.
        """
        self._check_frames(frames_THWC)
        self._raise_failure()
        frames_THWC = frames_THWC[: self._num_frames - self._num_written]
        if not len(frames_THWC):
            return
        encoders = self._encoders = self._encoders or self._start_encoders(len(frames_THWC))
        self._num_written += len(frames_THWC)
        started = time.perf_counter()
        for frame_HWC in frames_THWC:
            encoders.put(frame_HWC)
        self._blocked_s += time.perf_counter() - started
        self._raise_failure()

    def finish(self) -> VideoFile:
        """Wait for the background work, join, check and upload the video, remove the segments.

        Raises:
            EncodeFailed: Frames are missing, or the file does not hold what was put in.
            UploadFailed: The store did not take it. In either case nothing is left behind locally.
        """
        if not self._is_open:
            raise ValueError("finish after finish or abort")
        video: VideoFile | None = None
        try:
            self._stop()
            self._raise_failure()
            video = self._deliver()
        finally:
            self._clean_up(delivered=video is not None)
        return video

    def abort(self) -> None:
        """Give up: leave no local file and, if the store answers, no object; may be called more than once.

        Waits for an upload that is under way, since it would else land after the removal.
        """
        if not self._is_open:
            return
        if self._encoders is not None:
            self._encoders.drop()
        try:
            self._stop()
        finally:
            self._clean_up(delivered=False)

    def _check_frames(self, frames_THWC: Frames) -> None:
        size = (self._config.height, self._config.width, 3)
        if not self._is_open:
            raise ValueError("write after finish or abort")
        if frames_THWC.ndim != 4 or frames_THWC.shape[1:] != size or frames_THWC.dtype != "uint8":
            raise ValueError(f"frames are {frames_THWC.shape} {frames_THWC.dtype}, expected (n, *{size}) uint8")

    def _start_encoders(self, first_chunk_frames: int) -> SegmentEncoders:
        plan = SegmentPlan.of(self._num_frames, first_chunk_frames, self._config)
        folder, uploads = self._folder.path, self._uploads
        return SegmentEncoders(self._video_key, plan, folder, self._config, uploads, self.num_encoders)

    def _raise_failure(self) -> None:
        failure: RenderError | None = None if self._encoders is None else self._encoders.failure
        failure = failure or self._uploads.failure
        if failure is not None:
            raise failure

    def _stop(self) -> None:
        self._is_open = False
        if self._encoders is not None:
            self._encoders.stop()
        self._uploads.wait()

    def _clean_up(self, *, delivered: bool) -> None:
        self._folder.remove()
        if delivered:
            self._uploads.remove_segments()
        elif self._num_written >= self._num_frames:
            self._uploads.remove_segments(self._video_key)  # its upload may have happened; nobody will name it
        else:
            self._uploads.remove_segments()

    def _deliver(self) -> VideoFile:
        """Join, check, upload; everything has been encoded without an error."""
        encoders = self._encoders
        if encoders is None or self._num_written < self._num_frames:
            raise EncodeFailed(f"{self._num_written} of {self._num_frames} frames were written")
        path = self._folder.path / "video.mp4"
        started = time.perf_counter()
        try:
            join_segments(encoders.segments, encoders.plan, path, fps=self._config.fps, metadata=self._metadata)
            joined = time.perf_counter()
            sha256 = self._checked_sha256(path, encoders)
        except (av.FFmpegError, OSError) as error:
            raise EncodeFailed(f"{self._video_key}: {error}") from error
        checked = time.perf_counter()
        self._uploads.upload(self._video_key, path)
        return VideoFile(
            key=self._video_key,
            num_bytes=path.stat().st_size,
            sha256=sha256,
            frames_sha256=encoders.frames_sha256,
            width=self._config.width,
            height=self._config.height,
            fps=self._config.fps,
            num_frames=self._num_frames,
            codec=CODEC,
            pix_fmt=PIX_FMT,
            crf=self._config.crf,
            num_segments=encoders.plan.num_segments,
            encode_s=encoders.encode_s + joined - started,
            upload_s=self._uploads.seconds,
            check_s=encoders.check_s + checked - joined,
            blocked_s=self._blocked_s,
        )

    def _checked_sha256(self, path: Path, encoders: SegmentEncoders) -> str:
        """Hash of a file that holds what was decoded segment by segment, bit by bit, and says what it must."""
        packets = _SegmentHashes(encoders.plan)
        found = probe_packets(path, packets)
        decode_frames(path, [0])  # whose settings all segments share
        config = self._config
        expected = (self._num_frames, config.width, config.height, float(config.fps), CODEC, PIX_FMT)
        actual = (found.num_frames, found.width, found.height, found.fps, found.codec, found.pix_fmt)
        if actual != expected:
            raise EncodeFailed(f"{self._video_key}: file holds {actual}, expected {expected}")
        if packets.packets_sha256 != encoders.packets_sha256:
            raise EncodeFailed(f"{self._video_key}: its packets are not those that were checked")
        lost = {key for key, value in self._metadata.items() if found.metadata.get(key) != value}
        if lost:
            raise EncodeFailed(f"{self._video_key}: tags {sorted(lost)} did not survive")
        return sha256_of_file(path)


class _SegmentHashes:
    """Gets the packets of a joined file in order and hashes those of each segment by themselves."""

    def __init__(self, plan: SegmentPlan) -> None:
        self.packets_sha256: list[bytes] = []
        self._plan, self._num_packets, self._hash = plan, 0, hashlib.sha256()

    def update(self, data: bytes, /) -> None:
        """Take the next packet; an empty one announces the end."""
        if not data:
            return
        self._hash.update(data)
        self._num_packets += 1
        if self._num_packets == self._plan.stop(len(self.packets_sha256)):
            self.packets_sha256.append(self._hash.digest())
            self._hash = hashlib.sha256()

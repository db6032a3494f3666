"""Turns frames into a finished video object in the background, while the next chunk is being generated.

Encoding and uploading each have a thread and a bounded queue, so memory is constant at any length and a slow network
shows as time blocked in `write`, which is counted. Each segment is decoded and goes to the store as soon as it is
closed; the whole video is joined from local copies, must hold the packets that were decoded, and is uploaded before
`finish` returns. So the last frame of a long take is not followed by a decoding of the whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import av

from cluster.object_store import ObjectStore
from cluster.owned_folder import OwnedFolder
from workers.config import VideoConfig
from workers.errors import EncodeFailed, RenderError
from workers.video.decode import decode_frames, probe, probe_packets, sha256_of_file
from workers.video.encode import CODEC, PIX_FMT, Frames, SegmentEncoder, SegmentPlan, join_segments
from workers.video.upload import SegmentUploads

SCRATCH_PREFIX = "longtake-video-"
PIECE_BYTES = 8 << 20  # frames travel to the encoder in pieces of about this size ...
MAX_WAITING_PIECES = 3  # ... of which so many may wait: 24 MiB, or three frames where a single one is larger


@dataclass(frozen=True)
class VideoFile:
    """A video that is complete in the store; every packet of it was decoded. Times in seconds.

    The three work times overlap with generation; `blocked_s` is what the caller of `write` waited.
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
        self._plan: SegmentPlan | None = None
        self._segments: list[Path] = []
        self._encoder: SegmentEncoder | None = None
        self._digest = hashlib.sha256()
        self._packets = hashlib.sha256()  # of all that was decoded without an error
        self._num_written = self._num_encoded = 0
        self._blocked_s = self._encode_s = self._check_s = 0.0
        self._failure: RenderError | None = None
        self._is_open = True
        self._pieces: queue.Queue[Frames | None] = queue.Queue(MAX_WAITING_PIECES)
        self._thread = threading.Thread(target=self._encode_all, name="encode-frames", daemon=True)
        self._thread.start()

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
        if self._plan is None:
            self._plan = SegmentPlan.of(self._num_frames, len(frames_THWC), self._config)
        self._num_written += len(frames_THWC)
        step = max(1, PIECE_BYTES // frames_THWC[0].nbytes)
        started = time.perf_counter()
        for first in range(0, len(frames_THWC), step):
            self._pieces.put(frames_THWC[first : first + step])
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
        self._failure = self._failure or EncodeFailed("aborted")
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

    def _raise_failure(self) -> None:
        failure = self._failure or self._uploads.failure
        if failure is not None:
            raise failure

    def _stop(self) -> None:
        self._is_open = False
        self._pieces.put(None)
        self._thread.join()
        self._uploads.wait()

    def _clean_up(self, *, delivered: bool) -> None:
        self._folder.remove()
        if delivered:
            self._uploads.remove_segments()
        elif self._num_written >= self._num_frames:
            self._uploads.remove_segments(self._video_key)  # its upload may have happened; nobody will name it
        else:
            self._uploads.remove_segments()

    def _encode_all(self) -> None:
        """Body of the thread. After a failure it only empties the queue, so that `write` never waits for ever."""
        while (piece := self._pieces.get()) is not None:
            if self._failure is None and self._uploads.failure is None:
                try:
                    self._encode(piece)
                except Exception as error:  # a dead thread would leave `write` waiting for ever
                    self._failure = EncodeFailed(f"frame {self._num_encoded}: {error!r}")
                    self._failure.__cause__ = error
            del piece  # else the array stays in memory until the next one comes
        if self._encoder is not None:
            with contextlib.suppress(av.FFmpegError):  # it is thrown away; its file need not be complete
                self._encoder.close()

    def _encode(self, frames_THWC: Frames) -> None:
        """Encode frames, cutting segments where the plan says."""
        assert self._plan is not None
        for frame_HWC in frames_THWC:
            started = time.perf_counter()
            self._digest.update(frame_HWC.tobytes())
            if self._encoder is None:
                self._segments.append(self._folder.path / f"{len(self._segments):05d}.mp4")
                self._encoder = SegmentEncoder(self._segments[-1], self._config)
            self._encoder.encode(frame_HWC)
            self._num_encoded += 1
            is_cut = self._num_encoded == self._plan.stop(len(self._segments) - 1)
            if is_cut:
                encoder, self._encoder = self._encoder, None
                encoder.finish()
            self._encode_s += time.perf_counter() - started
            if is_cut:
                self._check_segment(len(self._segments) - 1)
                self._uploads.submit(self._segments[-1])

    def _check_segment(self, index: int) -> None:
        """Decode a closed segment from end to end."""
        assert self._plan is not None
        started = time.perf_counter()
        found = probe(self._segments[index], self._packets)
        expected = (self._plan.stop(index) - self._plan.start(index), self._config.width, self._config.height)
        actual = (found.num_frames, found.width, found.height)
        if actual != expected:
            raise EncodeFailed(f"segment {index} of {self._video_key} holds {actual}, expected {expected}")
        self._check_s += time.perf_counter() - started

    def _deliver(self) -> VideoFile:
        """Join, check, upload; everything has been encoded without an error."""
        if self._plan is None or self._num_written < self._num_frames:
            raise EncodeFailed(f"{self._num_written} of {self._num_frames} frames were written")
        path = self._folder.path / "video.mp4"
        started = time.perf_counter()
        try:
            join_segments(self._segments, self._plan, path, fps=self._config.fps, metadata=self._metadata)
            joined = time.perf_counter()
            sha256 = self._checked_sha256(path)
        except (av.FFmpegError, OSError) as error:
            raise EncodeFailed(f"{self._video_key}: {error}") from error
        checked = time.perf_counter()
        self._uploads.upload(self._video_key, path)
        return VideoFile(
            key=self._video_key,
            num_bytes=path.stat().st_size,
            sha256=sha256,
            frames_sha256=self._digest.hexdigest(),
            width=self._config.width,
            height=self._config.height,
            fps=self._config.fps,
            num_frames=self._num_frames,
            codec=CODEC,
            pix_fmt=PIX_FMT,
            crf=self._config.crf,
            num_segments=self._plan.num_segments,
            encode_s=self._encode_s + joined - started,
            upload_s=self._uploads.seconds,
            check_s=self._check_s + checked - joined,
            blocked_s=self._blocked_s,
        )

    def _checked_sha256(self, path: Path) -> str:
        """Hash of a file that holds what was decoded segment by segment, bit by bit, and says what it must."""
        packets = hashlib.sha256()
        found = probe_packets(path, packets)
        decode_frames(path, [0])  # whose settings all segments share
        config = self._config
        expected = (self._num_frames, config.width, config.height, float(config.fps), CODEC, PIX_FMT)
        actual = (found.num_frames, found.width, found.height, found.fps, found.codec, found.pix_fmt)
        if actual != expected:
            raise EncodeFailed(f"{self._video_key}: file holds {actual}, expected {expected}")
        if packets.digest() != self._packets.digest():
            raise EncodeFailed(f"{self._video_key}: its packets are not those that were checked")
        lost = {key for key, value in self._metadata.items() if found.metadata.get(key) != value}
        if lost:
            raise EncodeFailed(f"{self._video_key}: tags {sorted(lost)} did not survive")
        return sha256_of_file(path)

"""Encodes and checks the segments of a take side by side on a few threads; they leave one by one, in their order.

A segment refers to nothing outside itself and has an encoder of its own, so how many threads there are changes no byte.
One thread more stands before and behind them: it hashes raw frames in order, hands each to its segment, and passes
segments on when all before them have passed. Joining them is the writer's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np

from workers.config import VideoConfig
from workers.errors import EncodeFailed
from workers.video.decode import probe
from workers.video.encode import Frames, SegmentEncoder, SegmentPlan
from workers.video.upload import SegmentUploads

MAX_ENCODERS = 4  # one makes 30 to 50 hard pictures of 832x480 a second, so that four outrun any GPU that we know
MAX_WAITING_BYTES = (
    24 << 20
)  # of frames that no encoder has taken yet, or three frames where a single one is larger ...
MAX_AHEAD_BYTES = 128 << 20  # ... and for several encoders a segment more, up to this: else all wait for one's frames
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus(quota: Path = CPU_QUOTA) -> int:
    """CPUs that this process may use: by its affinity, and by the quota of its container if it has one."""
    num_cpus = len(os.sched_getaffinity(0))
    if quota.is_file():
        granted, period = quota.read_text().split()
        if granted != "max":
            num_cpus = min(num_cpus, max(1, int(granted) // int(period)))
    return num_cpus


def choose_num_encoders(num_cpus: int) -> int:
    """Threads that encode one take: one CPU is left to whoever makes the frames."""
    return min(MAX_ENCODERS, max(1, num_cpus - 1))


def max_waiting_bytes(config: VideoConfig, num_encoders: int) -> int:
    """Raw bytes of frames that may wait for an encoder: 79 MiB at 832x480 and 48 frames a segment, 24 for one encoder.

    What is beside it in memory: the frame that each encoder holds, and the rest of an array of which a frame waits.
    """
    frame_bytes = 3 * config.width * config.height
    alone = max(MAX_WAITING_BYTES, 3 * frame_bytes)
    return alone if num_encoders == 1 else alone + min(config.segment_frames * frame_bytes, MAX_AHEAD_BYTES)


@dataclass(eq=False)
class _Segment:
    """One segment on its way: filled by the thread that orders, then owned by its encoder until it is done."""

    index: int
    path: Path
    num_done: int  # frames of the take up to the next one to encode
    frames: queue.SimpleQueue[Frames | None] = field(default_factory=queue.SimpleQueue)
    """Ends with None if not all of them come."""
    packets_sha256: bytes | None = None
    """Over all packets; not before they were decoded without an error."""
    failure: EncodeFailed | None = None
    encode_s: float = 0.0
    check_s: float = 0.0


class SegmentEncoders:
    """Takes the frames of a take one after the other, from one thread, and submits closed segments in order.

    After a failure what comes later is dropped and what came earlier goes on, because it may fail, too: `failure` is
    the first in the order of frames, and there once everything before it is done.

    Args:
        video_key: Names the take in messages.
        folder: Where segments are put; must last until `stop` has returned.
        uploads: Gets each segment that was decoded from end to end; after a failure of it nothing more is encoded.
        num_encoders: Threads that encode and check; fewer are started for a take of fewer segments.

    Attributes:
        segments, packets_sha256: Files submitted so far, in order; of each the SHA-256 over its packets, all decoded.
        encode_s, check_s: Seconds of all threads together, of the segments that have passed.
    """

    def __init__(
        self,
        video_key: str,
        plan: SegmentPlan,
        folder: Path,
        config: VideoConfig,
        uploads: SegmentUploads,
        num_encoders: int,
    ) -> None:
        self.plan = plan
        self.failure: EncodeFailed | None = None
        self.segments: list[Path] = []
        self.packets_sha256: list[bytes] = []
        self.encode_s = self.check_s = 0.0
        self.max_waiting_bytes = max_waiting_bytes(config, num_encoders)
        self._video_key, self._folder = video_key, folder
        self._config, self._uploads = config, uploads
        self._digest = hashlib.sha256()
        self._room = threading.Condition()
        self._waiting_bytes = 0
        self._end = plan.num_segments  # segments from here on are not wanted any more
        self._events: queue.SimpleQueue[Frames | _Segment | None] = queue.SimpleQueue()
        self._opened: queue.SimpleQueue[_Segment | None] = queue.SimpleQueue()
        self._filling: _Segment | None = None
        self._done: dict[int, _Segment] = {}
        self._num_hashed = self._num_opened = self._num_received = self._num_passed = 0
        self._encoders: list[threading.Thread] = []
        self._orderer = threading.Thread(target=self._order, name="order-segments", daemon=True)
        self._orderer.start()
        try:
            for _ in range(min(num_encoders, plan.num_segments)):
                encoder = threading.Thread(target=self._encode_segments, name="encode-frames", daemon=True)
                encoder.start()
                self._encoders.append(encoder)
        except BaseException:
            self.stop()
            raise

    @property
    def waiting_bytes(self) -> int:
        """Raw bytes of frames that no encoder has taken yet."""
        return self._waiting_bytes

    @property
    def frames_sha256(self) -> str:
        """SHA-256 (hex) of all raw frames; complete after `stop`."""
        return self._digest.hexdigest()

    def put(self, frame_HWC: Frames) -> None:
        """Hand over the next frame; waits while there is no room. It must not be changed afterwards."""
        with self._room:
            self._room.wait_for(lambda: self._has_room(frame_HWC.nbytes))
            self._waiting_bytes += frame_HWC.nbytes
        self._events.put(frame_HWC)

    def drop(self) -> None:
        """Give up all that is not encoded yet; `stop` must follow."""
        self._cut(0)

    def stop(self) -> None:
        """Return when all frames are encoded, checked and submitted, or dropped; no thread is left, `put` is over."""
        self._events.put(None)
        self._orderer.join()
        for encoder in self._encoders:
            encoder.join()

    def _has_room(self, num_bytes: int) -> bool:
        return self._waiting_bytes == 0 or self._waiting_bytes + num_bytes <= self.max_waiting_bytes

    def _release(self, frame_HWC: Frames) -> None:
        with self._room:
            self._waiting_bytes -= frame_HWC.nbytes
            self._room.notify()

    def _cut(self, segment_index: int) -> None:
        with self._room:
            self._end = min(self._end, segment_index)

    def _is_wanted(self, segment: _Segment) -> bool:
        return segment.index < self._end and self._uploads.failure is None

    def _order(self) -> None:
        """Body of the thread before and behind the encoders; it always comes to its end, or they would not."""
        while (event := self._events.get()) is not None:
            self._take(event)
            del event  # else the array stays in memory until the next one comes
        self._end_filling()
        for _ in self._encoders:
            self._opened.put(None)
        while self._num_received < self._num_opened:
            event = self._events.get()
            assert event is not None
            self._take(event)

    def _take(self, event: Frames | _Segment) -> None:
        try:
            if isinstance(event, _Segment):
                self._receive(event)
            else:
                self._hand_on(event)
        except Exception as error:  # a dead thread would leave `put` waiting for ever
            self.failure = self.failure or _failure_at(self._num_hashed, error)
            self._cut(0)

    def _hand_on(self, frame_HWC: Frames) -> None:
        """Hash the next frame and put it where its encoder looks for it."""
        if self._num_opened - (self._filling is not None) >= self._end:
            self._release(frame_HWC)
            return
        started = time.perf_counter()
        self._digest.update(np.ascontiguousarray(frame_HWC).reshape(-1).data)
        self.encode_s += time.perf_counter() - started
        if self._filling is None:
            index = self._num_opened
            self._filling = _Segment(index, self._folder / f"{index:05d}.mp4", self.plan.start(index))
            self._opened.put(self._filling)
            self._num_opened += 1
        self._filling.frames.put(frame_HWC)
        self._num_hashed += 1
        if self._num_hashed == self.plan.stop(self._filling.index):
            self._filling = None

    def _end_filling(self) -> None:
        if self._filling is not None:
            self._filling.frames.put(None)
            self._filling = None

    def _receive(self, segment: _Segment) -> None:
        """Take back a segment that is checked, has failed or was dropped, and pass on those whose turn it is now."""
        self._num_received += 1
        if segment.packets_sha256 is None:
            self._cut(segment.index)
            self._end_filling()
            with contextlib.suppress(queue.Empty):
                while (frame_HWC := segment.frames.get_nowait()) is not None:
                    self._release(frame_HWC)
        self._done[segment.index] = segment
        while (ready := self._done.pop(self._num_passed, None)) is not None:
            self._num_passed += 1
            self._pass_on(ready)

    def _pass_on(self, segment: _Segment) -> None:
        self.encode_s += segment.encode_s
        self.check_s += segment.check_s
        if self.failure is None and self._uploads.failure is None:
            self.failure = segment.failure
        if segment.packets_sha256 is not None and segment.index < self._end:
            self.segments.append(segment.path)
            self.packets_sha256.append(segment.packets_sha256)
            self._uploads.submit(segment.path)

    def _encode_segments(self) -> None:
        """Body of an encoding thread: the oldest segment that nobody has, until there are no more."""
        while (segment := self._opened.get()) is not None:
            try:
                if self._encode(segment):
                    self._check(segment)
            except Exception as error:  # a dead thread would leave `put` and `stop` waiting for ever
                segment.failure = _failure_at(segment.num_done, error)
            self._events.put(segment)
            del segment

    def _encode(self, segment: _Segment) -> bool:
        """Encode a segment as its frames come; False if it was given up."""
        encoder: SegmentEncoder | None = None
        try:
            for _ in range(self.plan.start(segment.index), self.plan.stop(segment.index)):
                frame_HWC = segment.frames.get()
                if frame_HWC is None:
                    return False
                self._release(frame_HWC)
                if not self._is_wanted(segment):
                    return False
                started = time.perf_counter()
                encoder = encoder or SegmentEncoder(segment.path, self._config)
                encoder.encode(frame_HWC)
                segment.encode_s += time.perf_counter() - started
                segment.num_done += 1
                del frame_HWC
            assert encoder is not None
            started = time.perf_counter()
            encoder.finish()
            segment.encode_s += time.perf_counter() - started
            return self._is_wanted(segment)
        finally:
            if encoder is not None:
                with contextlib.suppress(av.FFmpegError):  # unless finished, it is thrown away with its file
                    encoder.close()

    def _check(self, segment: _Segment) -> None:
        """Decode a closed segment from end to end."""
        started = time.perf_counter()
        packets = hashlib.sha256()
        found = probe(segment.path, packets)
        num_frames = self.plan.stop(segment.index) - self.plan.start(segment.index)
        expected = (num_frames, self._config.width, self._config.height)
        actual = (found.num_frames, found.width, found.height)
        if actual != expected:
            raise EncodeFailed(f"segment {segment.index} of {self._video_key} holds {actual}, expected {expected}")
        segment.packets_sha256 = packets.digest()
        segment.check_s = time.perf_counter() - started


def _failure_at(frame_index: int, error: Exception) -> EncodeFailed:
    failure = EncodeFailed(f"frame {frame_index}: {error!r}")
    failure.__cause__ = error
    return failure

"""VideoWriter on a real store: what lands there, what is left behind, what each failure does."""

import hashlib
import shutil
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import psutil
import pytest

from cluster.errors import StoreUnavailable
from cluster.local_store import LocalStore
from cluster.s3_store import S3Store
from tests.fakes import ManualClock
from tests.fault_proxy import FaultProxy
from tests.moving_pictures import picture
from tests.segment_takes import own_threads
from tests.servers import shared_moto, use_endpoint
from workers.config import VideoConfig
from workers.errors import EncodeFailed, UploadFailed
from workers.video import encoders as encoders_module
from workers.video import writer as writer_module
from workers.video.decode import decode_frames, probe, sha256_of_file
from workers.video.encoders import SegmentEncoders
from workers.video.writer import VideoWriter

CONFIG = VideoConfig(segment_frames=16)
KEY = "videos/ab/cat-0-12345678-e1a1.mp4"
SEGMENTS = "_state/segments/cat-0-e1a1"
TAGS = {"item_id": "cat", "seed": "7", "prompt_sha256": "ab" * 32}


class WatchedStore(LocalStore):
    """A folder that counts requests, and fails where a test asks for it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.requests: list[tuple[str, str]] = []
        self.fail_at = ""
        self.delay_s = 0.0
        self.damage = b""
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def put_file(self, key: str, path: Path) -> None:
        self.may_go_on.wait(120)
        time.sleep(self.delay_s)
        self.requests.append(("put", key))
        if self.fail_at and self.fail_at in key:
            raise StoreUnavailable("connection reset")
        super().put_file(key, path)
        if self.damage and key.startswith("videos/"):
            self.put(key, self.damage)

    def size(self, key: str) -> int | None:
        self.requests.append(("size", key))
        return super().size(key)

    def delete(self, keys) -> None:
        keys = list(keys)
        self.requests.append(("delete", f"{len(keys)}"))
        super().delete(keys)

    def keys(self) -> list[str]:
        return [info.key for info in self.list()]


@pytest.fixture
def store(tmp_path):
    return WatchedStore(tmp_path / "out")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where local files go; whatever a test does, nothing may be left in it."""
    root = tmp_path / "scratch"
    root.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    yield root
    assert list(root.iterdir()) == []
    assert own_threads() == []


@pytest.fixture(autouse=True, params=[1, 4])
def num_encoders(request, monkeypatch):
    """Every test holds with one encoder and with several."""
    monkeypatch.setattr(writer_module, "choose_num_encoders", lambda num_cpus: request.param)
    return request.param


def frames(first: int, stop: int) -> np.ndarray:
    return np.stack([picture(index) for index in range(first, stop)])


def open_writer(store, num_frames=50, config=CONFIG, tags=TAGS) -> VideoWriter:
    return VideoWriter(store, KEY, f"{SEGMENTS}/", config, tags, num_frames)


def write_take(writer: VideoWriter, num_frames: int, first_chunk: int = 9, chunk: int = 12) -> None:
    writer.write(frames(0, first_chunk))
    for first in range(first_chunk, num_frames, chunk):
        writer.write(frames(first, first + chunk))


def finish_rest(writer: VideoWriter, first: int, stop: int) -> None:
    writer.write(frames(first, stop))
    writer.finish()


def finish_take(writer: VideoWriter, num_frames: int) -> None:
    write_take(writer, num_frames)
    writer.finish()


def test_take_arrives_whole_and_is_described_truly(store, tmp_path):
    writer = open_writer(store)
    write_take(writer, 50)
    video = writer.finish()
    path = tmp_path / "out" / KEY
    found = probe(path)
    assert store.keys() == [KEY]
    assert (found.num_frames, found.width, found.height, found.fps) == (50, 128, 128, 16.0)
    assert (video.num_frames, video.num_segments, video.codec, video.pix_fmt) == (50, 4, "h264", "yuv420p")
    assert video.num_bytes == path.stat().st_size
    assert video.sha256 == sha256_of_file(path)
    assert video.frames_sha256 == hashlib.sha256(frames(0, 50).tobytes()).hexdigest()
    assert found.metadata.items() >= {**TAGS, "fps": "16", "num_frames": "50"}.items()
    assert np.abs(decode_frames(path, range(50)).astype(int) - frames(0, 50)).mean() < 2
    assert min(video.encode_s, video.upload_s, video.check_s) > 0


def test_frames_beyond_the_take_are_dropped(store):
    writer = open_writer(store, num_frames=13)
    writer.write(frames(0, 9))
    writer.write(frames(9, 30))
    writer.write(frames(30, 33))
    video = writer.finish()
    assert video.num_frames == 13
    assert video.frames_sha256 == hashlib.sha256(frames(0, 13).tobytes()).hexdigest()


def test_one_frame_take(store):
    writer = open_writer(store, num_frames=1)
    writer.write(frames(0, 9))
    assert writer.finish().num_frames == 1


def test_how_later_frames_are_split_over_calls_does_not_change_the_file(store):
    hashes = set()
    for chunk in (5, 12, 41):
        writer = open_writer(store)
        write_take(writer, 50, chunk=chunk)
        hashes.add(writer.finish().sha256)
    assert len(hashes) == 1


def test_first_segment_is_durable_after_the_first_chunk(store):
    writer = open_writer(store)
    writer.write(frames(0, 9))
    wait_until(lambda: bool(store.keys()))
    assert store.keys() == [f"{SEGMENTS}/00000.mp4"]
    assert probe(store.root / SEGMENTS / "00000.mp4").num_frames == 9
    writer.abort()
    assert store.keys() == []


def test_requests_are_one_for_each_segment_and_three_more(store):
    writer = open_writer(store)
    write_take(writer, 50)
    video = writer.finish()
    assert len(store.requests) == video.num_segments + 3
    assert [kind for kind, _ in store.requests] == ["put"] * (video.num_segments + 1) + ["size", "delete"]


@pytest.mark.parametrize("fail_at", ["00000.mp4", "00002.mp4"])
def test_store_that_fails_in_the_middle_is_upload_failed(store, fail_at):
    writer = open_writer(store)
    store.fail_at = fail_at
    with pytest.raises(UploadFailed, match="connection reset"):
        finish_take(writer, 50)
    writer.abort()
    assert store.keys() == []


def test_store_that_fails_at_the_video_leaves_nothing(store):
    writer = open_writer(store)
    store.fail_at = "videos/"
    write_take(writer, 50)
    with pytest.raises(UploadFailed, match="videos/"):
        writer.finish()
    assert store.keys() == []


def test_failure_reaches_the_next_write_so_that_no_more_is_generated(store):
    writer = open_writer(store, num_frames=10_000)
    store.fail_at = "00000.mp4"
    with pytest.raises(UploadFailed):
        write_take(writer, 10_000)
    writer.abort()


def test_object_of_another_size_than_the_file_is_upload_failed(store):
    writer = open_writer(store)
    store.damage = b"half a video"
    write_take(writer, 50)
    with pytest.raises(UploadFailed, match="12 bytes of"):
        writer.finish()
    assert store.keys() == []


def test_missing_frames_are_encode_failed(store):
    writer = open_writer(store)
    writer.write(frames(0, 9))
    with pytest.raises(EncodeFailed, match="9 of 50 frames"):
        writer.finish()
    assert store.keys() == []


def test_scratch_disk_that_vanishes_is_encode_failed(store, scratch):
    writer = open_writer(store)
    write_take(writer, 30)
    (folder,) = scratch.iterdir()
    while folder.exists():  # the encoder may be making a file in it
        shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises((EncodeFailed, UploadFailed), match=r"^(?!.*frames were written)"):
        finish_rest(writer, 30, 50)
    writer.abort()


def test_a_segment_that_changes_after_its_check_is_encode_failed(store, scratch):
    writer = open_writer(store)
    write_take(writer, 50)
    wait_until((store.root / SEGMENTS / "00002.mp4").exists)
    (segment,) = scratch.glob("*/00001.mp4")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(EncodeFailed, match="not those that were checked"):
        writer.finish()
    assert store.keys() == []


def test_wrong_frames_are_refused_at_once(store):
    writer = open_writer(store)
    for wrong in (np.zeros((1, 64, 128, 3), np.uint8), np.zeros((1, 128, 128, 3)), np.zeros((128, 128, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected"):
            writer.write(wrong)
    writer.abort()


def test_abort_while_an_upload_is_under_way_leaves_nothing(store):
    writer = open_writer(store)
    store.may_go_on.clear()
    write_take(writer, 40)
    threading.Timer(0.2, store.may_go_on.set).start()
    writer.abort()
    writer.abort()
    assert store.keys() == []
    with pytest.raises(ValueError, match="after finish or abort"):
        writer.write(frames(0, 1))


def test_abort_before_the_first_frame(store):
    open_writer(store).abort()
    assert store.requests == []


def test_a_store_that_stands_still_shows_as_blocked_time(store, monkeypatch):
    monkeypatch.setattr(encoders_module, "MAX_WAITING_BYTES", 0)  # three frames, and one more where a segment is ahead
    writer = open_writer(store, num_frames=60, config=VideoConfig(segment_frames=1))
    store.may_go_on.clear()
    store.delay_s = 0.01

    def write_all() -> None:
        for index in range(60):
            writer.write(frames(index, index + 1))

    watch = PutWatch(monkeypatch)
    producer = threading.Thread(target=write_all)
    producer.start()
    wait_until(lambda: watch.waits_for_s() > 0.5)  # in `write`: there is no room for its next frame
    store.may_go_on.set()
    producer.join()
    video = writer.finish()
    assert video.blocked_s > 0.5
    assert video.upload_s > 60 * 0.01


def test_a_producer_that_is_slower_than_the_store_is_never_blocked(store, monkeypatch):
    clock = ManualClock()  # moves only while there is no room
    monkeypatch.setattr(writer_module, "time", SimpleNamespace(perf_counter=clock.monotonic))
    watch = PutWatch(monkeypatch, on_full=lambda: clock.advance(1.0))
    writer = open_writer(store)
    for index in range(0, 50, 10):
        writer.write(frames(index, index + 10))
        wait_until(lambda: watch.encoders.waiting_bytes == 0)
    assert writer.finish().blocked_s == 0


class PutWatch:
    """Looks on while a writer hands over a frame: does it find room, and for how long has it waited?"""

    def __init__(self, monkeypatch, on_full=lambda: None) -> None:
        self.encoders: SegmentEncoders | None = None
        self._put, self._on_full = SegmentEncoders.put, on_full
        self._since: float | None = None

        def put(encoders: SegmentEncoders, frame: np.ndarray) -> None:
            self.look_on(encoders, frame)

        monkeypatch.setattr(SegmentEncoders, "put", put)

    def look_on(self, encoders: SegmentEncoders, frame: np.ndarray) -> None:
        self.encoders = encoders
        if encoders.waiting_bytes + frame.nbytes > encoders.max_waiting_bytes:
            self._on_full()
        self._since = time.perf_counter()
        self._put(encoders, frame)
        self._since = None

    def waits_for_s(self) -> float:
        since = self._since
        return 0.0 if since is None else time.perf_counter() - since


def wait_until(is_true) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_index_stands_before_the_data(store):
    writer = open_writer(store)
    write_take(writer, 50)
    writer.finish()
    data = store.get(KEY)
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(store.root / KEY)) as container:
        assert sum(1 for packet in container.demux(video=0) if packet.is_keyframe) == 4


@pytest.mark.parametrize(
    ("width", "height", "num_frames"), [(128, 128, 2600), pytest.param(832, 480, 200, marks=pytest.mark.slow)]
)
def test_memory_is_constant_at_any_length(store, width, height, num_frames):
    config = VideoConfig(width=width, height=height, preset="ultrafast", segment_frames=16)
    process = psutil.Process()
    noise = np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8)
    base = np.broadcast_to(np.linspace(0, 200, width, dtype=np.uint8)[None, :, None], (height, width, 3))

    def chunk(first: int) -> np.ndarray:
        return np.stack([np.roll(base, index, axis=1) + (noise >> 5) for index in range(first, first + 8)])

    writer = open_writer(store, num_frames=num_frames, config=config)
    sizes = []
    for first in range(0, num_frames, 8):
        writer.write(chunk(first))
        sizes.append(process.memory_info().rss)
    writer.finish()
    sizes.append(process.memory_info().rss)
    num_warm = max(8, len(sizes) // 8)
    assert (num_frames - 8 * num_warm) * base.nbytes > 100 << 20, "what follows would show"
    assert max(sizes) - sizes[num_warm - 1] < 50 << 20


@pytest.fixture(scope="module")
def moto():
    return shared_moto()  # before `scratch` moves the temporary folder, in which the server lives on


def test_over_s3_a_take_costs_its_segments_and_three_requests_and_survives_resets(moto, monkeypatch):
    with FaultProxy(moto.url) as proxy:
        use_endpoint(monkeypatch, proxy)
        s3 = S3Store(moto.new_bucket(), "renders/night")
        writer = open_writer(s3)
        write_take(writer, 50)
        video = writer.finish()
        assert [proxy.count(verb) for verb in ("PUT", "HEAD", "POST", "GET", "DELETE")] == [5, 1, 1, 0, 0]
        assert [info.key for info in s3.list()] == [KEY]
        assert hashlib.sha256(s3.get(KEY)).hexdigest() == video.sha256

        proxy.arm("reset_before", lambda seen: "segments" in seen.key)
        proxy.arm("lost_answer", lambda seen: "videos" in seen.key and seen.verb == "PUT")
        writer = open_writer(s3)
        write_take(writer, 50)
        assert writer.finish().sha256 == video.sha256
        assert [info.key for info in s3.list()] == [KEY]

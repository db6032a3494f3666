"""Segments encoded side by side: the bytes of one thread, their order, the first failure, and no thread left over."""

import hashlib
import threading
from dataclasses import replace

import numpy as np
import pytest

from tests.moving_pictures import FRAGILE, make_segment, picture
from tests.segment_takes import SMALL, Uploads, obey, own_threads, put_all, small_picture, start, wait_until
from workers.config import VideoConfig
from workers.errors import UploadFailed
from workers.video import encoders as encoders_module
from workers.video.decode import probe
from workers.video.encode import SegmentPlan
from workers.video.encoders import choose_num_encoders, max_waiting_bytes, usable_cpus


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = own_threads()
    yield
    assert [thread for thread in own_threads() if thread not in before] == []


@pytest.mark.parametrize("num_encoders", [1, 2, 4])
def test_segments_have_the_bytes_of_one_encoder_after_the_other(tmp_path, num_encoders):
    plan = SegmentPlan.of(60, 9, FRAGILE)
    encoders, uploads = start(tmp_path, 60, num_encoders, first_chunk=9, config=FRAGILE)
    for index in range(60):
        encoders.put(picture(index, FRAGILE.width))
    encoders.stop()
    (tmp_path / "plain").mkdir()
    plain = [make_segment(tmp_path / "plain", plan, index, FRAGILE, disturbance=index) for index in range(5)]
    assert uploads.names == [path.name for path in plain] == [path.name for path in encoders.segments]
    assert uploads.files == [path.read_bytes() for path in plain]
    raw = b"".join(picture(index, FRAGILE.width).tobytes() for index in range(60))
    assert encoders.frames_sha256 == hashlib.sha256(raw).hexdigest()
    for path, found in zip(plain, encoders.packets_sha256, strict=True):
        packets = hashlib.sha256()
        probe(path, packets)
        assert found == packets.digest()
    assert min(encoders.encode_s, encoders.check_s) > 0


def test_later_segments_are_made_meanwhile_and_wait_for_their_turn(tmp_path, monkeypatch):
    may_go_on = threading.Event()
    obey(monkeypatch, lambda index: may_go_on.wait(120) if index == 2 else None)
    encoders, uploads = start(tmp_path, 16, 3)
    put_all(encoders, range(16))
    wait_until(lambda: encoders._num_received == 3)  # all but the first
    assert uploads.names == []
    may_go_on.set()
    encoders.stop()
    assert uploads.names == [f"{index:05d}.mp4" for index in range(4)]


def test_of_two_failures_the_one_of_the_earlier_frame_is_told(tmp_path, monkeypatch):
    may_go_on = threading.Event()

    def before(index):
        if index == 6:
            may_go_on.wait(120)
            raise OSError("disk full")
        if index == 9:
            raise OSError("later in the take, earlier in time")

    obey(monkeypatch, before)
    encoders, uploads = start(tmp_path, 100, 2)
    put_all(encoders, range(30))
    wait_until(lambda: encoders._end == 2)  # the third has failed
    assert encoders.failure is None
    may_go_on.set()
    wait_until(lambda: encoders.failure is not None)
    put_all(encoders, range(30, 100))
    encoders.stop()
    assert str(encoders.failure) == "frame 6: OSError('disk full')"
    assert isinstance(encoders.failure.__cause__, OSError)
    assert uploads.names == ["00000.mp4"]


def test_what_came_before_a_failure_is_finished(tmp_path, monkeypatch):
    may_go_on = threading.Event()

    def before(index):
        if index == 6:
            may_go_on.wait(120)
        if index == 9:
            raise OSError("disk full")

    obey(monkeypatch, before)
    encoders, uploads = start(tmp_path, 40, 3)
    put_all(encoders, range(40))
    wait_until(lambda: encoders._end == 2)
    assert encoders.failure is None
    may_go_on.set()
    encoders.stop()
    assert str(encoders.failure) == "frame 9: OSError('disk full')"
    assert uploads.names == ["00000.mp4", "00001.mp4"]


def test_a_segment_that_does_not_hold_its_frames_fails_at_its_end(tmp_path, monkeypatch):
    def lossy(path, packets):
        found = probe(path, packets)
        return replace(found, num_frames=3) if path.name == "00001.mp4" else found

    monkeypatch.setattr(encoders_module, "probe", lossy)
    encoders, uploads = start(tmp_path, 12, 2)
    put_all(encoders, range(12))
    encoders.stop()
    assert "frame 8: EncodeFailed" in str(encoders.failure)
    assert "segment 1 of videos/cat.mp4 holds (3, 32, 32), expected (4, 32, 32)" in str(encoders.failure)
    assert uploads.names == ["00000.mp4"]


def test_a_failure_never_leaves_put_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders_module, "MAX_WAITING_BYTES", 0)

    def before(index):
        raise MemoryError("no room")

    obey(monkeypatch, before)
    for num_encoders in (1, 3):
        encoders, uploads = start(tmp_path, 250, num_encoders)
        put_all(encoders, range(250))
        encoders.stop()
        assert str(encoders.failure) == "frame 0: MemoryError('no room')"
        assert encoders.waiting_bytes == 0
        assert uploads.names == []


def test_an_error_of_the_thread_that_orders_is_told_and_leaves_nobody_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders_module, "MAX_WAITING_BYTES", 0)

    class Refusing(Uploads):
        def submit(self, path):
            raise RuntimeError("no queue")

    encoders, _ = start(tmp_path, 200, 2, uploads=Refusing())
    put_all(encoders, range(200))
    encoders.stop()
    assert "RuntimeError('no queue')" in str(encoders.failure)
    assert encoders.waiting_bytes == 0


def test_after_a_failed_upload_nothing_more_is_encoded(tmp_path, monkeypatch):
    uploads, seen = Uploads(), []
    obey(monkeypatch, seen.append)
    encoders, _ = start(tmp_path, 40, 3, uploads=uploads)
    put_all(encoders, range(4))
    wait_until(lambda: uploads.names)
    uploads.failure = UploadFailed("gone")
    put_all(encoders, range(4, 40))
    encoders.stop()
    assert seen == [0, 1, 2, 3]
    assert encoders.failure is None, "the upload's own failure is the one to tell"
    assert encoders.waiting_bytes == 0


@pytest.mark.parametrize("num_put", [0, 1, 4, 14, 40])
def test_dropped_while_several_are_under_way_leaves_nothing_waiting(tmp_path, monkeypatch, num_put):
    may_go_on, begun = threading.Event(), []

    def before(index):
        begun.append(index)
        may_go_on.wait(120)

    obey(monkeypatch, before)
    encoders, uploads = start(tmp_path, 40, 3)
    put_all(encoders, range(num_put))
    wait_until(lambda: len(begun) == min(3, -(-num_put // 4)))
    encoders.drop()
    may_go_on.set()
    encoders.stop()
    assert len(begun) <= 3, "each encoder ends the frame in its hand"
    assert uploads.names == []
    assert encoders.failure is None
    assert encoders.waiting_bytes == 0


def test_put_waits_when_the_bound_is_reached_and_goes_on_when_a_frame_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders_module, "MAX_WAITING_BYTES", 10 * 32 * 32 * 3)
    num_may_go_on, num_put, highest = threading.Semaphore(0), [], []
    obey(monkeypatch, lambda index: num_may_go_on.acquire(timeout=120))
    encoders, _ = start(tmp_path, 60, 2)
    assert encoders.max_waiting_bytes == 14 * 32 * 32 * 3

    def put_and_count():
        for index in range(60):
            encoders.put(small_picture(index))
            num_put.append(index)
            highest.append(encoders.waiting_bytes)

    producer = threading.Thread(target=put_and_count)
    producer.start()
    wait_until(lambda: len(num_put) == 16)  # two are in the hands of encoders, fourteen wait
    assert not _comes_true_soon(lambda: len(num_put) > 16)
    num_may_go_on.release()
    wait_until(lambda: len(num_put) == 17)
    assert not _comes_true_soon(lambda: len(num_put) > 17)
    num_may_go_on.release(100)
    producer.join()
    encoders.stop()
    assert max(highest) <= encoders.max_waiting_bytes
    assert encoders.waiting_bytes == 0


def _comes_true_soon(is_true) -> bool:
    event = threading.Event()
    for _ in range(20):
        if is_true():
            return True
        event.wait(0.01)
    return False


def test_a_frame_larger_than_the_bound_has_room_alone(tmp_path):
    encoders, uploads = start(tmp_path, 8, 2)
    encoders.max_waiting_bytes = 1
    put_all(encoders, range(8))
    encoders.stop()
    assert uploads.names == ["00000.mp4", "00001.mp4"]


def test_frames_need_not_be_contiguous(tmp_path):
    encoders, uploads = start(tmp_path, 4, 2)
    turned = [small_picture(index)[::-1] for index in range(4)]
    for frame in turned:
        encoders.put(frame)
    encoders.stop()
    assert encoders.frames_sha256 == hashlib.sha256(np.stack(turned).tobytes()).hexdigest()
    assert len(uploads.names) == 1


def test_threads_that_cannot_be_started_leave_none_behind(tmp_path, monkeypatch):
    begin = threading.Thread.start
    begun = []

    def start_two(thread):
        begun.append(thread)
        if len(begun) > 2:
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="new thread"):
        start(tmp_path, 100, 4)


def test_one_cpu_is_left_and_four_encoders_are_the_most():
    assert [choose_num_encoders(cpus) for cpus in (1, 2, 3, 4, 5, 16)] == [1, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(("text", "expected"), [("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1)])
def test_a_container_has_the_cpus_of_its_quota(tmp_path, monkeypatch, text, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(text)
    assert usable_cpus(tmp_path / "cpu.max") == expected
    assert usable_cpus(tmp_path / "none") == 8


def test_bytes_that_may_wait():
    wan = VideoConfig(width=832, height=480)
    assert max_waiting_bytes(wan, 1) == 24 << 20
    assert max_waiting_bytes(wan, 4) == (24 << 20) + 48 * 832 * 480 * 3
    large = VideoConfig(width=8192, height=8192)
    assert max_waiting_bytes(large, 4) == 3 * 8192 * 8192 * 3 + (128 << 20)
    assert max_waiting_bytes(SMALL, 4) == (24 << 20) + 4 * 32 * 32 * 3

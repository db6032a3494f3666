"""Any plan, any number of encoders, any frames that fail: bytes as of one encoder, and the first failure is told."""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.segment_takes import SMALL, obey, own_threads, put_all, small_picture, start
from workers.video.encode import encode_segment

takes = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12))


@given(take=takes, num_encoders=st.integers(1, 5), spread=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_every_plan_gives_the_segments_of_one_encoder(take, num_encoders, spread):
    num_frames, first_chunk, segment_frames = take
    config, pauses = SMALL.model_copy(update={"segment_frames": segment_frames}), random.Random(spread)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        obey(patch, lambda index: time.sleep(pauses.choice((0, 0, 0.002))))
        encoders, uploads = start(folder, num_frames, num_encoders, first_chunk=first_chunk, config=config)
        put_all(encoders, range(num_frames))
        encoders.stop()
        plan = encoders.plan
        assert uploads.names == [f"{index:05d}.mp4" for index in range(plan.num_segments)]
        for index, data in enumerate(uploads.files):
            plain = folder / "plain.mp4"
            encode_segment(plain, map(small_picture, range(plan.start(index), plan.stop(index))), config)
            assert plain.read_bytes() == data
        raw = b"".join(small_picture(index).tobytes() for index in range(num_frames))
        assert encoders.frames_sha256 == hashlib.sha256(raw).hexdigest()
    assert own_threads() == []


@given(
    take=takes, num_encoders=st.integers(1, 5), failing=st.sets(st.integers(0, 29), min_size=1), spread=st.integers()
)
@settings(max_examples=60, deadline=None)
def test_the_first_failure_is_told_and_all_before_it_is_submitted(take, num_encoders, failing, spread):
    num_frames, first_chunk, segment_frames = take
    config, pauses = SMALL.model_copy(update={"segment_frames": segment_frames}), random.Random(spread)

    def before(index: int) -> None:
        time.sleep(pauses.choice((0, 0, 0.002)))
        if index in failing:
            raise OSError("disk full")

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        obey(patch, before)
        encoders, uploads = start(Path(name), num_frames, num_encoders, first_chunk=first_chunk, config=config)
        put_all(encoders, range(num_frames))
        encoders.stop()
    plan, first = encoders.plan, min(failing)
    if first >= num_frames:
        assert encoders.failure is None
        assert len(uploads.names) == plan.num_segments
    else:
        assert str(encoders.failure) == f"frame {first}: OSError('disk full')"
        num_before = sum(plan.stop(index) <= first for index in range(plan.num_segments))
        assert uploads.names == [f"{index:05d}.mp4" for index in range(num_before)]
    assert encoders.waiting_bytes == 0
    assert own_threads() == []

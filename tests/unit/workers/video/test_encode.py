"""Segments and their join: reproducible to the byte, uniform in time, right in colour."""

import hashlib
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from tests.moving_pictures import CONFIG, FRAGILE, TAGS, make_segment, make_video, picture
from workers.errors import EncodeFailed
from workers.video.decode import decode_frames, frames_sha256_of_file, probe, probe_packets
from workers.video.encode import SegmentPlan, encode_segment, join_segments


@pytest.mark.parametrize("num_frames", [1, 9, 10, 25, 26, 100])
@pytest.mark.parametrize("first_chunk", [1, 9, 16, 99])
def test_segments_partition_the_take(num_frames, first_chunk):
    plan = SegmentPlan.of(num_frames, first_chunk, CONFIG)
    frames = [f for index in range(plan.num_segments) for f in range(plan.start(index), plan.stop(index))]
    assert frames == list(range(num_frames))
    assert plan.stop(0) == min(first_chunk, 16, num_frames)


def test_first_segment_must_not_be_empty():
    with pytest.raises(ValueError, match="does not fit"):
        SegmentPlan(num_frames=10, first_frames=0, segment_frames=4)


@pytest.mark.parametrize("first_chunk", [1, 2, 9])
def test_joined_frames_are_one_frame_apart_and_in_order(tmp_path, first_chunk):
    path = make_video(tmp_path, SegmentPlan.of(44, first_chunk, CONFIG))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [(packet.dts, packet.pts) for packet in container.demux(stream) if packet.size]
        ticks = int(1 / stream.time_base) // 16
    assert [dts for dts, _ in times] == [(index - 2) * ticks for index in range(44)]
    assert sorted(pts for _, pts in times) == [index * ticks for index in range(44)]
    assert all(dts <= pts for dts, pts in times)


def test_each_segment_plays_on_its_own_and_begins_with_a_key_frame(tmp_path):
    plan = SegmentPlan.of(40, 9, CONFIG)
    for index in range(plan.num_segments):
        path = make_segment(tmp_path, plan, index, CONFIG)
        assert probe(path).num_frames == plan.stop(index) - plan.start(index)
        with av.open(str(path)) as container:
            assert next(container.demux(video=0)).is_keyframe


def test_duration_is_exact(tmp_path):
    assert probe(make_video(tmp_path, SegmentPlan.of(43, 9, CONFIG))).duration_s == 43 / 16


def test_one_frame_makes_a_video(tmp_path):
    found = probe(make_video(tmp_path, SegmentPlan.of(1, 9, CONFIG)))
    assert (found.num_frames, found.fps, found.duration_s) == (1, 16.0, 1 / 16)


def test_index_stands_before_the_data(tmp_path):
    data = make_video(tmp_path, SegmentPlan.of(20, 9, CONFIG)).read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_tags_survive(tmp_path):
    metadata = probe(make_video(tmp_path, SegmentPlan.of(20, 9, CONFIG))).metadata
    assert {key: metadata[key] for key in TAGS} == TAGS


def test_colours_are_tagged_and_converted_as_bt709(tmp_path):
    path = make_video(tmp_path, SegmentPlan.of(12, 9, CONFIG))
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.color_range, codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1, 1)
        assert codec.pix_fmt == "yuv420p"
    error = decode_frames(path, range(12)).astype(float) - np.stack([picture(index) for index in range(12)])
    assert np.abs(error).mean() < 2  # 4:2:0 and the decoder's rounding cost 1.4 of it, crf 18 the rest


def test_saturated_colours_come_back(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    flat = [np.full((128, 128, 3), colour, np.uint8) for colour in colours]
    encode_segment(tmp_path / "flat.mp4", flat, CONFIG)
    found = decode_frames(tmp_path / "flat.mp4", range(5))
    # BT.601 pixels under BT.709 tags would be off by more than 20 levels here.
    assert np.abs(found.astype(int) - np.stack(flat)).max() <= 3


def test_same_frames_give_the_same_file_whatever_the_heap_looks_like(tmp_path):
    plan = SegmentPlan.of(20, 9, FRAGILE)
    files = {make_video(tmp_path / str(n), plan, FRAGILE, disturbance=n).read_bytes() for n in range(8)}
    assert len(files) == 1


def test_other_process_gives_the_same_file(tmp_path):
    plan = SegmentPlan.of(20, 9, FRAGILE)
    here = hashlib.sha256(make_video(tmp_path / "here", plan, FRAGILE).read_bytes()).hexdigest()
    code = (
        "import hashlib, pathlib, sys; from tests.moving_pictures import *;"
        "plan = SegmentPlan.of(20, 9, FRAGILE); folder, disturbance = pathlib.Path(sys.argv[1]), int(sys.argv[2]);"
        "print(hashlib.sha256(make_video(folder, plan, FRAGILE, disturbance).read_bytes()).hexdigest())"
    )
    for disturbance in ("11", "12"):
        command = [sys.executable, "-c", code, str(tmp_path / disturbance), disturbance]
        there = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[4])
        assert there.stdout.strip() == here


def test_segment_encoded_again_fits_in_place(tmp_path):
    plan = SegmentPlan.of(40, 9, FRAGILE)
    original = make_video(tmp_path, plan, FRAGILE)
    before = original.read_bytes()
    for index in range(plan.num_segments):
        make_segment(tmp_path, plan, index, FRAGILE, disturbance=5 + index)
    segments = [tmp_path / f"{index:05d}.mp4" for index in range(plan.num_segments)]
    join_segments(segments, plan, tmp_path / "again.mp4", fps=16, metadata=TAGS)
    assert (tmp_path / "again.mp4").read_bytes() == before


def test_order_of_tags_does_not_change_the_file(tmp_path):
    plan = SegmentPlan.of(9, 9, CONFIG)
    segment = make_segment(tmp_path, plan, 0, CONFIG)
    for name, tags in (("a", TAGS), ("b", dict(reversed(TAGS.items())))):
        join_segments([segment], plan, tmp_path / name, fps=16, metadata=tags)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_lost_segment_is_refused(tmp_path):
    plan = SegmentPlan.of(30, 9, CONFIG)
    first = make_segment(tmp_path, plan, 0, CONFIG)
    with pytest.raises(EncodeFailed, match="1 segments, expected 3"):
        join_segments([first], plan, tmp_path / "video.mp4", fps=16, metadata={})


def test_segments_in_the_wrong_place_are_refused(tmp_path):
    plan = SegmentPlan.of(25, 9, CONFIG)
    segments = [make_segment(tmp_path, plan, index, CONFIG) for index in range(2)]
    with pytest.raises(EncodeFailed, match="holds 16 frames, expected 9"):
        join_segments(segments[::-1], plan, tmp_path / "video.mp4", fps=16, metadata={})


def test_segment_with_other_encoder_settings_is_refused(tmp_path):
    plan = SegmentPlan.of(25, 9, CONFIG)
    first = make_segment(tmp_path, plan, 0, CONFIG)
    second = make_segment(tmp_path, plan, 1, CONFIG.model_copy(update={"preset": "ultrafast"}))
    with pytest.raises(EncodeFailed, match="other settings"):
        join_segments([first, second], plan, tmp_path / "video.mp4", fps=16, metadata={})


def test_equal_pictures_have_equal_decoded_hashes_and_one_changed_frame_another(tmp_path):
    frames = [picture(index) for index in range(9)]
    encode_segment(tmp_path / "a.mp4", frames, CONFIG)
    encode_segment(tmp_path / "b.mp4", frames, CONFIG)
    frames[5] = picture(50)
    encode_segment(tmp_path / "c.mp4", frames, CONFIG)
    a, b, c = (frames_sha256_of_file(tmp_path / f"{name}.mp4") for name in "abc")
    assert a == b != c


def test_frames_are_found_by_index_across_segments(tmp_path):
    path = make_video(tmp_path, SegmentPlan.of(60, 9, CONFIG))
    wanted = [59, 0, 26, 26, 9, 8]
    assert np.array_equal(decode_frames(path, wanted), decode_frames(path, range(60))[wanted])


def test_frame_past_the_end_is_an_index_error(tmp_path):
    path = make_video(tmp_path, SegmentPlan.of(10, 9, CONFIG))
    with pytest.raises(IndexError, match="frame 10"):
        decode_frames(path, [3, 10])


def damaged(path: Path, first: int, size: int) -> Path:
    data = bytearray(path.read_bytes())
    data[first : first + size] = bytes(size)
    (path.parent / "damaged.mp4").write_bytes(data)
    return path.parent / "damaged.mp4"


def test_zeroed_bytes_are_caught(tmp_path):
    path = make_video(tmp_path, SegmentPlan.of(60, 9, CONFIG))
    size = path.stat().st_size
    for place in (0.3, 0.5, 0.9):
        with pytest.raises(EncodeFailed):
            probe(damaged(path, int(size * place), 400))


def test_file_cut_in_the_middle_is_caught(tmp_path):
    path = make_video(tmp_path, SegmentPlan.of(60, 9, CONFIG))
    data = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(EncodeFailed):
        probe(tmp_path / "cut.mp4")


def test_fragmented_file_cut_at_a_fragment_shows_fewer_frames(tmp_path):
    movflags = {"movflags": "+frag_keyframe+empty_moov+default_base_moof"}
    path = tmp_path / "fragmented.mp4"
    with av.open(str(path), "w", container_options=movflags) as container:
        stream = container.add_stream("libx264", rate=16, options={"g": "8", "keyint_min": "8", "sc_threshold": "0"})
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for index in range(32):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index), format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    fragments = [place for place in range(len(data)) if data[place + 4 : place + 8] == b"moof"]
    path.write_bytes(data[: fragments[2]])
    assert probe(path).num_frames == 16


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"not a video at all")
    with pytest.raises(EncodeFailed):
        probe(tmp_path / "x.mp4")


def test_a_joined_file_holds_the_packets_of_its_segments_and_a_changed_one_does_not(tmp_path):
    plan = SegmentPlan.of(43, 9, CONFIG)
    path = make_video(tmp_path, plan)
    decoded, copied, changed = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for index in range(plan.num_segments):
        probe(make_segment(tmp_path, plan, index, CONFIG), decoded)
    assert probe_packets(path, copied) == probe(path)
    assert copied.digest() == decoded.digest()
    probe_packets(damaged(path, path.stat().st_size // 2, 40), changed)
    assert changed.digest() != decoded.digest()

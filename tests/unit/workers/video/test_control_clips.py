"""Control inputs in the public form: what is accepted, and that each refusal names its clip."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.control_files import write_control, write_video
from workers.errors import BadPrompt
from workers.video.control_clips import read_control_clips


def write_list(folder: Path, entries: Any) -> Path:
    path = folder / "cond.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Two clips; the list names a third, whose files are not there."""
    return write_control(tmp_path, 2, num_named=3)


def test_the_public_form_is_read_and_an_odd_frame_rate_only_noted(example: Path, caplog) -> None:
    with caplog.at_level("INFO"):
        video = read_control_clips(example / "cond.json", example / "first.png", num_clips=2)
    assert [clip.text for clip in video.clips] == ["prompt 0", "prompt 1"]
    assert video.clips[1].track == example / "track_01.mp4"
    assert "clip 0: depth says 16 pictures a second, track 8" in video.clips[0].notes[0]
    assert "clip 1" in caplog.text
    depth = video.clips[0].read_depth(16, 24)  # the aspect is ignored
    assert depth.shape == (81, 24, 16, 3)
    assert np.abs(depth.mean((1, 2, 3)) - (40 + 2 * np.arange(81))).max() < 4
    assert video.read_first(16, 24).shape == (24, 16, 3)
    assert video.read_first(16, 24)[0, 0].tolist() == [200, 10, 10]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "track_01.mp4").unlink(), r"clip 1: track: no file '\./elsewhere/track_01\.mp4'"),
        (lambda d: write_video(d / "depth_01.mp4", num_frames=80), "clip 1: depth: depth_01.mp4 has 80 pictures"),
        (lambda d: write_video(d / "depth_00.mp4", width=48), "clip 0: depth: depth_00.mp4 is 48x16, .* is 32x16"),
        (lambda d: (d / "track_00.mp4").write_bytes(b"no video"), "clip 0: track: track_00.mp4"),
        (lambda d: write_list(d, "{"), "cond.json: list: Invalid JSON"),
        (lambda d: write_list(d, []), "cond.json: names no clip"),
        (lambda d: write_list(d, [{"text": "", "depth": "a", "track": "b"}]), r"clip 0: 0\.text"),
        (lambda d: write_list(d, [{"text": "a", "depth": "a"}]), r"clip 0: 0\.track"),
        (lambda d: write_list(d, [{"text": "a", "depth": "a", "track": "b", "dept": "c"}]), r"clip 0: 0\.dept"),
        (lambda d: (d / "cond.json").unlink(), "cond.json: No such file"),
        (lambda d: (d / "first.png").unlink(), "first picture .*first.png: No such file"),
        (lambda d: (d / "first.png").write_bytes(b"no picture"), "first picture .*first.png"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_clip(example: Path, spoil, message: str) -> None:
    spoil(example)
    with pytest.raises(BadPrompt, match=message):
        read_control_clips(example / "cond.json", example / "first.png", num_clips=2)


def test_a_list_may_name_more_clips_than_are_there_but_not_fewer_than_asked_for(example: Path) -> None:
    with pytest.raises(BadPrompt, match="clip 2: depth"):
        read_control_clips(example / "cond.json", example / "first.png")
    with pytest.raises(BadPrompt, match="4 clips are asked for, it names 3"):
        read_control_clips(example / "cond.json", example / "first.png", num_clips=4)

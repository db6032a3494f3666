"""The contact sheet shows the right frames of the right takes, whatever the captions and lengths."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageFont

from workers.config import VideoConfig
from workers.video.contact_sheet import SheetLayout, make_contact_sheet, shortened, spread
from workers.video.encode import encode_segment


def make_take(path, colours, width=128, height=128):
    frames = [np.full((height, width, 3), colour, np.uint8) for colour in colours]
    encode_segment(path, frames, VideoConfig(width=width, height=height, preset="ultrafast"))
    return path


def test_frames_are_spread_from_first_to_last():
    assert spread(97, 5) == [0, 24, 48, 72, 96]
    assert spread(3, 6) == [0, 1, 2]
    assert (spread(1, 6), spread(10, 1)) == ([0], [0])


def test_each_row_shows_its_take_over_time(tmp_path):
    red_to_blue = make_take(tmp_path / "a.mp4", [(220, 0, 0)] * 5 + [(0, 0, 220)] * 5)
    green = make_take(tmp_path / "b.mp4", [(0, 200, 0)] * 3)
    size = make_contact_sheet(
        [("red to blue", red_to_blue), ("green", green)], tmp_path / "sheet.png", SheetLayout(2, 100, columns=1)
    )
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    assert size == (8 + 2 * 108, 2 * 128) == sheet.shape[1::-1]
    for (x, y), colour in {
        (58, 70): (220, 0, 0),
        (166, 70): (0, 0, 220),
        (58, 198): (0, 200, 0),
        (166, 198): (0, 200, 0),
    }.items():
        assert np.abs(sheet[y, x] - colour).max() < 8


def test_caption_is_drawn(tmp_path):
    take = make_take(tmp_path / "a.mp4", [(0, 0, 0)])
    for name, caption in (("with", "a caption"), ("without", "")):
        make_contact_sheet([(caption, take)], tmp_path / f"{name}.png")
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("with", "without")]
    assert pictures[0][:19].max() > 150 > pictures[1][:19].max()


def test_hostile_captions_and_other_shapes_do_not_break_it(tmp_path):
    wide = make_take(tmp_path / "wide.mp4", [(9, 9, 9)] * 4, width=256)
    tall = make_take(tmp_path / "tall.mp4", [(9, 9, 9)] * 4, height=256)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_contact_sheet([("x" * 4000, wide), ("Ωmega\n\t\x00 日本 🎬", tall), ("", wide)], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_long_caption_is_cut_to_the_width():
    font = ImageFont.load_default(13)
    cut = shortened("a very long prompt " * 50, 300, font)
    assert cut.startswith("a very long")
    assert cut.endswith("...")
    assert 250 < font.getlength(cut) <= 300
    assert shortened("short\n  words", 300, font) == "short words"


def test_takes_stand_side_by_side_and_a_damaged_one_leaves_its_place_empty(tmp_path):
    red, blue = (make_take(tmp_path / f"{n}.mp4", [c] * 4) for n, c in (("r", (220, 0, 0)), ("b", (0, 0, 220))))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(red.read_bytes()[:200])
    takes = [("red", red), ("broken", broken), ("blue", blue)]
    assert make_contact_sheet(takes, tmp_path / "sheet.png", SheetLayout(2, 100)) == (8 + 4 * 108, 2 * 128)
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(sheet[70, 58] - (220, 0, 0)).max() < 8
    assert np.abs(sheet[198, 58] - (0, 0, 220)).max() < 8
    assert sheet[30:128, 230:].max() < 60  # nothing but background where the damaged take would be
    assert sheet[3:18, 224:].max() > 150  # but it is named


def test_nothing_to_show_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        make_contact_sheet([], tmp_path / "sheet.png")

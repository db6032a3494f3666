"""One PNG that shows a night at a glance: a row of small pictures over time for each take, with a caption.

Only decodes and draws: which takes are shown, and where their files come from, is the report's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from workers.video.decode import decode_frames, indexed_num_frames

MARGIN = 8  # pixels around each picture
CAPTION_HEIGHT = 20
FONT_SIZE = 13
BACKGROUND, INK, FAINT = (24, 24, 27), (244, 244, 245), (161, 161, 170)


@dataclass(frozen=True)
class SheetLayout:
    """How many pictures, and how large."""

    frames_per_take: int = 6
    picture_width: int = 160  # pixels; the height follows from the first take's shape


def make_contact_sheet(
    videos: Sequence[tuple[str, Path]], out_png: Path, layout: SheetLayout | None = None
) -> tuple[int, int]:
    """Draw one row per video: frames evenly spaced from the first to the last, the caption above them.

    Args:
        videos: Caption and local file of each take, in the order of the rows; at least one.
        out_png: Overwritten.
    Returns:
        Width and height of the sheet in pixels.
    Raises:
        ValueError: No videos.
        EncodeFailed: A file is no video, or is damaged where it was read.
    """
    if not videos:
        raise ValueError("a contact sheet needs at least one video")
    layout = layout or SheetLayout()
    sheet: Image.Image | None = None
    for row_index, (caption, path) in enumerate(videos):
        pictures = _pictures(path, layout)
        if sheet is None:
            sheet = _blank_sheet(pictures[0].height, len(videos), layout)
            row_height = sheet.height // len(videos)
        _draw_row(sheet, row_index * row_height, row_height, caption, pictures)
    assert sheet is not None
    sheet.save(out_png, format="PNG", optimize=True)
    return sheet.size


def spread(num_frames: int, num_pictures: int) -> list[int]:
    """Frame indices from the first to the last, evenly spaced; fewer than asked for when there are not as many."""
    count = min(num_frames, num_pictures)
    if count <= 1:
        return [0] * count
    return [round(index * (num_frames - 1) / (count - 1)) for index in range(count)]


def _pictures(path: Path, layout: SheetLayout) -> list[Image.Image]:
    frames_THWC = decode_frames(path, spread(indexed_num_frames(path), layout.frames_per_take))
    height, width = frames_THWC.shape[1:3]
    size = (layout.picture_width, max(1, round(layout.picture_width * height / width)))
    return [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames_THWC]


def _blank_sheet(picture_height: int, num_rows: int, layout: SheetLayout) -> Image.Image:
    width = MARGIN + layout.frames_per_take * (layout.picture_width + MARGIN)
    return Image.new("RGB", (width, num_rows * (CAPTION_HEIGHT + picture_height + MARGIN)), BACKGROUND)


def _draw_row(sheet: Image.Image, top: int, height: int, caption: str, pictures: list[Image.Image]) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, top + 3), shortened(caption, sheet.width - 2 * MARGIN, font), fill=INK, font=font)
    room = height - CAPTION_HEIGHT - MARGIN
    for picture_index, picture in enumerate(pictures):
        left = MARGIN + picture_index * (picture.width + MARGIN)
        if picture.height > room:  # a take of another shape than the first one
            picture = picture.crop((0, (picture.height - room) // 2, picture.width, (picture.height + room) // 2))
        sheet.paste(picture, (left, top + CAPTION_HEIGHT))
        draw.rectangle(
            (left - 1, top + CAPTION_HEIGHT - 1, left + picture.width, top + CAPTION_HEIGHT + picture.height),
            outline=FAINT,
        )


def shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text on one line, cut with an ellipsis so that it fits into so many pixels."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line
    low, high = 0, len(line)
    while low < high:  # the longest beginning that fits
        middle = (low + high + 1) // 2
        if font.getlength(line[:middle].rstrip() + "...") <= width:
            low = middle
        else:
            high = middle - 1
    return line[:low].rstrip() + "..."

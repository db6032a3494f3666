"""One PNG that shows a night at a glance: small pictures over time for each take, with a caption.

Only decodes and draws: which takes are shown, and where their files come from, is the report's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from workers.errors import EncodeFailed
from workers.video.decode import decode_frames, indexed_num_frames

MARGIN = 8  # pixels around each picture
CAPTION_HEIGHT = 20
FONT_SIZE = 13
BACKGROUND, INK, FAINT = (24, 24, 27), (244, 244, 245), (161, 161, 170)


@dataclass(frozen=True)
class SheetLayout:
    """How many pictures, and how large."""

    frames_per_take: int = 5
    picture_width: int = 128  # pixels; the height follows from the first take's shape
    columns: int = 2  # takes side by side


def make_contact_sheet(
    videos: Sequence[tuple[str, Path]], out_png: Path, layout: SheetLayout | None = None
) -> tuple[int, int]:
    """Draw every video: frames evenly spaced from the first to the last, the caption above them.

    A damaged file gets its caption with a remark and no pictures: the sheet is for looking at what went wrong, too.

    Args:
        videos: Caption and local file of each take, in reading order; at least one.
        out_png: Overwritten.
    Returns:
        Width and height of the sheet in pixels.
    Raises:
        ValueError: No videos.
    """
    if not videos:
        raise ValueError("a contact sheet needs at least one video")
    layout = layout or SheetLayout()
    takes = [_read_take(caption, path, layout) for caption, path in videos]
    heights = [pictures[0].height for _, pictures in takes if pictures]
    picture_height = heights[0] if heights else layout.picture_width
    columns = min(layout.columns, len(takes))
    take_width = layout.frames_per_take * (layout.picture_width + MARGIN)
    take_height = CAPTION_HEIGHT + picture_height + MARGIN
    num_rows = -(-len(takes) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * take_width, num_rows * take_height), BACKGROUND)
    for index, (caption, pictures) in enumerate(takes):
        corner = (MARGIN + index % columns * take_width, index // columns * take_height)
        _draw_take(sheet, corner, (take_width, take_height), caption, pictures)
    sheet.save(out_png, format="PNG", optimize=True)
    return sheet.size


def spread(num_frames: int, num_pictures: int) -> list[int]:
    """Frame indices from the first to the last, evenly spaced; fewer than asked for when there are not as many."""
    count = min(num_frames, num_pictures)
    if count <= 1:
        return [0] * count
    return [round(index * (num_frames - 1) / (count - 1)) for index in range(count)]


def _read_take(caption: str, path: Path, layout: SheetLayout) -> tuple[str, list[Image.Image]]:
    try:
        return caption, _pictures(path, layout)
    except EncodeFailed:
        return f"damaged file: {caption}", []


def _pictures(path: Path, layout: SheetLayout) -> list[Image.Image]:
    frames_THWC = decode_frames(path, spread(indexed_num_frames(path), layout.frames_per_take))
    height, width = frames_THWC.shape[1:3]
    size = (layout.picture_width, max(1, round(layout.picture_width * height / width)))
    return [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames_THWC]


def _draw_take(
    sheet: Image.Image, corner: tuple[int, int], size: tuple[int, int], caption: str, pictures: list[Image.Image]
) -> None:
    font = ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(sheet)
    left, top = corner
    draw.text((left, top + 3), shortened(caption, size[0] - MARGIN, font), fill=INK, font=font)
    top += CAPTION_HEIGHT
    room = size[1] - CAPTION_HEIGHT - MARGIN
    for picture in pictures:
        if picture.height > room:  # a take of another shape than the first one
            picture = picture.crop((0, (picture.height - room) // 2, picture.width, (picture.height + room) // 2))
        sheet.paste(picture, (left, top))
        draw.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=FAINT)
        left += picture.width + MARGIN


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

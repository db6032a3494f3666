"""Control inputs of LongVie 2 in the form of its public examples: prompts, depth and track videos, clip by clip.

A JSON list with one object per clip: `text`, `depth`, `track`. Paths stand relative to the list's folder; where there
is no such file its bare name is looked for there, because the public lists carry paths of the repository that they
came from. Everything is checked before anything is rendered: each video is decoded to its end, pictures are read later,
when their clip is due. Resized as published: whole, bicubic, the aspect ignored.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from workers.errors import BadPrompt, EncodeFailed
from workers.video.decode import VideoProbe, each_picture, probe
from workers.video.encode import Frames

logger = logging.getLogger(__name__)

CLIP_PICTURES = 81
"""21 latent frames; clip j shows the pictures 80 j to 80 j + 80, so neighbours share one."""


class _Entry(BaseModel):
    """One object of the list."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    text: str = Field(min_length=1)
    depth: str = Field(min_length=1)
    track: str = Field(min_length=1)


_ENTRIES = TypeAdapter(list[_Entry])


@dataclass(frozen=True)
class ControlClip:
    """One clip whose files are known to be there and to fit."""

    index: int
    text: str
    depth: Path
    track: Path
    notes: tuple[str, ...] = ()
    """What is odd but harmless."""

    def read_depth(self, width: int, height: int) -> Frames:
        """Depth pictures [81, height, width, 3]."""
        return read_resized(self.depth, width, height)

    def read_track(self, width: int, height: int) -> Frames:
        """Pictures of the tracked points [81, height, width, 3]."""
        return read_resized(self.track, width, height)


@dataclass(frozen=True)
class ControlClips:
    """A whole video's inputs."""

    first_picture: Path
    clips: tuple[ControlClip, ...]

    def read_first(self, width: int, height: int) -> Frames:
        """The picture that the video begins with, [height, width, 3]."""
        with Image.open(self.first_picture) as image:
            return _resized(image.convert("RGB"), width, height)


def read_control_clips(clip_list: Path, first_picture: Path, num_clips: int | None = None) -> ControlClips:
    """Check the first `num_clips` clips of a list (all, if None) and the picture that they begin with.

    Raises:
        BadPrompt: The list is not such a list, names too few clips, or a file is missing, damaged, of another size than
            the first picture, or not of 81 pictures; the message says which clip.
    """
    entries = _read_entries(clip_list)
    if num_clips is not None and len(entries) < num_clips:
        raise BadPrompt(f"{clip_list.name}: {num_clips} clips are asked for, it names {len(entries)}")
    size = _picture_size(first_picture)
    clips = tuple(_check_clip(index, entry, clip_list.parent, size) for index, entry in enumerate(entries[:num_clips]))
    for clip in clips:
        for note in clip.notes:
            logger.info("%s", note)
    return ControlClips(first_picture, clips)


def read_resized(path: Path, width: int, height: int) -> Frames:
    """All pictures of a video, each resized by itself."""
    return np.stack([_resized(Image.fromarray(picture), width, height) for picture in each_picture(path)])


def _read_entries(clip_list: Path) -> list[_Entry]:
    try:
        entries = _ENTRIES.validate_json(clip_list.read_bytes())
    except OSError as error:
        raise BadPrompt(f"{clip_list}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        clip = f"clip {first['loc'][0]}: " if first["loc"] else ""
        raise BadPrompt(f"{clip_list.name}: {clip}{place or 'list'}: {first['msg']}") from error
    if not entries:
        raise BadPrompt(f"{clip_list.name}: names no clip")
    return entries


def _picture_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            image.load()
            return image.size
    except OSError as error:
        raise BadPrompt(f"first picture {path}: {error.strerror or error}") from error


def _check_clip(index: int, entry: _Entry, folder: Path, size: tuple[int, int]) -> ControlClip:
    depth, depth_probe = _check_video(f"clip {index}: depth", entry.depth, folder, size)
    track, track_probe = _check_video(f"clip {index}: track", entry.track, folder, size)
    notes: tuple[str, ...] = ()
    if depth_probe.fps != track_probe.fps:
        notes = (
            f"clip {index}: depth says {depth_probe.fps:g} pictures a second, track {track_probe.fps:g};"
            " only their number counts",
        )
    return ControlClip(index, entry.text, depth, track, notes)


def _check_video(what: str, named: str, folder: Path, size: tuple[int, int]) -> tuple[Path, VideoProbe]:
    path = next((p for p in (folder / named, folder / Path(named).name) if p.is_file()), None)
    if path is None:
        raise BadPrompt(f"{what}: no file {named!r}, neither from {folder} nor by its bare name there")
    try:
        found = probe(path)
    except EncodeFailed as error:
        raise BadPrompt(f"{what}: {error}") from error
    if (found.width, found.height) != size:
        raise BadPrompt(
            f"{what}: {path.name} is {found.width}x{found.height}, the first picture is {size[0]}x{size[1]}"
        )
    if found.num_frames != CLIP_PICTURES:
        raise BadPrompt(f"{what}: {path.name} has {found.num_frames} pictures, a clip has {CLIP_PICTURES}")
    return path, found


def _resized(image: Image.Image, width: int, height: int) -> Frames:
    return np.array(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.uint8)

"""One row of a prompt list: raw columns in, a `Prompt` or a `Rejected` out. Pure; knows no file formats.

A bad row never stops the others: whatever is wrong with it becomes a kind and a sentence for the quarantine.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, Literal

from workers.task import PromptSegment, prompt_text

RejectKind = Literal[
    "duplicate_id",
    "empty_prompt",
    "wrong_type",
    "prompt_too_long",
    "bad_id",
    "bad_utf8",
    "bad_json",
    "bad_csv",
    "bad_value",
    "row_too_long",
]
Scalar = str | int | float | bool | None

KNOWN_COLUMNS = ("prompt", "id", "seed", "samples", "frames", "negative_prompt")
MAX_ID_CHARS = 128
MAX_EXTRA_CHARS = 65_536
"""A longer extra value would make journal entries and manifest rows unwieldy."""

# Dots would split a sample's name in webdataset, slashes move an object, a leading "_" hides it from readers.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")
_RESERVED_IDS = frozenset({"con", "prn", "aux", "nul"} | {f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10)})
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A good row. `line` counts from 1: the physical line (txt, jsonl, csv) or the row (parquet)."""

    item_id: str
    line: int
    segments: tuple[PromptSegment, ...]
    negative_prompt: str = ""
    seed: int | None = None
    samples: int | None = None
    num_frames: int | None = None
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    control: str | None = None
    """Folder of control videos; stands in `extra` too, so that the manifest names it."""

    @property
    def text(self) -> str:
        """What stands in the manifest; `segments_of` is the way back."""
        return prompt_text(self.segments)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A bad row: where it stands, what kind of fault, and a sentence that names field and fix."""

    line: int
    kind: RejectKind
    reason: str
    item_id: str | None = None
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class RowLimits:
    """What a row may hold at most."""

    max_prompt_chars: int = 20_000
    max_frames: int = 1_000_000
    max_samples: int = 10_000


class RowError(Exception):
    """Internal to the readers: a row is bad; carries the kind."""

    def __init__(self, kind: RejectKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: RejectKind = kind


def read_row(line: int, row: Mapping[str, Any], limits: RowLimits) -> Prompt | Rejected:
    """Check one row.

    Args:
        line: Where it stands, for the message.
        row: Column name to value as the file gave it; a column that is None or missing takes its default.
        limits: Bounds of length and number.
    """
    try:
        return _checked(line, row, limits)
    except RowError as fault:
        raw_id, raw_prompt = row.get("id"), row.get("prompt")
        return Rejected(
            line,
            fault.kind,
            str(fault),
            item_id=raw_id if isinstance(raw_id, str) and _ID.match(raw_id) and len(raw_id) <= MAX_ID_CHARS else None,
            prompt=_CONTROL.sub("?", raw_prompt)[:200] if isinstance(raw_prompt, str) else None,
        )


def _checked(line: int, row: Mapping[str, Any], limits: RowLimits) -> Prompt:
    if row.get("prompt") is None:
        found = ", ".join(ascii(name)[1:-1] for name in itertools.islice(row, 5)) or "nothing"
        raise RowError("empty_prompt", f"prompt is missing (found: {found[:200]})")
    segments = _segments(row["prompt"], limits)
    negative = row.get("negative_prompt")
    negative = "" if negative is None else _text(negative, "negative_prompt", limits)
    seed = _integer(row.get("seed"), "seed", 0, 2**63 - 1)
    samples = _integer(row.get("samples"), "samples", 1, limits.max_samples)
    num_frames = _integer(row.get("frames"), "frames", 1, limits.max_frames)
    control = _control(row.get("control"))
    item_id = _item_id(row.get("id")) or content_id(segments, negative, seed, num_frames, control)
    extra = {name: _extra(name, value) for name, value in row.items() if name not in KNOWN_COLUMNS}
    return Prompt(item_id, line, segments, negative, seed, samples, num_frames, extra, control)


def content_id(
    segments: tuple[PromptSegment, ...],
    negative_prompt: str,
    seed: int | None,
    num_frames: int | None,
    control: str | None = None,
) -> str:
    """The id of a row that names none: 20 hex digits of the SHA-256 of what it asks for.

    `samples` and extra columns stay out: asking for one sample more must not render the others again.
    """
    asked = [[[s.frame, s.prompt] for s in segments], negative_prompt, seed, num_frames]
    if control is not None:
        asked.append(control)
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()[:20]


def _item_id(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RowError("wrong_type", f"id must be a string or an integer, not {type(value).__name__}")
    if len(value) > MAX_ID_CHARS:
        raise RowError("bad_id", f"id has {len(value)} characters; the limit is {MAX_ID_CHARS}")
    if not _ID.match(value):
        raise RowError("bad_id", f"id {ascii(value)[:80]} must be letters, digits, '_' or '-', beginning with neither")
    if value.lower() in _RESERVED_IDS:
        raise RowError("bad_id", f"id {value!r} is a device name on some systems and cannot be a file name there")
    return value


def _control(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise RowError("wrong_type", f"control must be the path of a folder, not {type(value).__name__}")
    if not PurePosixPath(value).is_absolute():  # actors have working directories of their own
        raise RowError("bad_value", f"control must be an absolute path, not {ascii(value)[:80]}")
    return value


def _segments(value: Any, limits: RowLimits) -> tuple[PromptSegment, ...]:
    if isinstance(value, str):
        return (PromptSegment(frame=0, prompt=_prompt_text(value, limits)),)
    if not isinstance(value, list):
        raise RowError("wrong_type", f"prompt must be a string or a list of segments, not {type(value).__name__}")
    if not value:
        raise RowError("empty_prompt", "prompt is an empty list")
    segments = tuple(_segment(index, part, limits) for index, part in enumerate(value))
    if segments[0].frame != 0:
        raise RowError("bad_value", f"the first segment must begin at frame 0, not {segments[0].frame}")
    if any(b.frame <= a.frame for a, b in itertools.pairwise(segments)):
        raise RowError("bad_value", "segments must be in order of frame, each later than the one before")
    if sum(len(s.prompt) for s in segments) > limits.max_prompt_chars:
        raise RowError("prompt_too_long", f"the segments together exceed {limits.max_prompt_chars} characters")
    return segments


def _segment(index: int, part: Any, limits: RowLimits) -> PromptSegment:
    if not isinstance(part, dict) or set(part) != {"frame", "prompt"}:
        raise RowError("wrong_type", f"segment {index} must have exactly the fields frame and prompt")
    if not isinstance(part["prompt"], str):
        raise RowError("wrong_type", f"segment {index}: prompt must be a string")
    frame = _integer(part["frame"], f"segment {index}: frame", 0, limits.max_frames - 1)
    if frame is None:
        raise RowError("wrong_type", f"segment {index}: frame is missing")
    return PromptSegment(frame=frame, prompt=_prompt_text(part["prompt"], limits))


def _prompt_text(value: str, limits: RowLimits) -> str:
    text = _text(value, "prompt", limits).strip()
    if not text:
        raise RowError("empty_prompt", "prompt is empty")
    return text


def _text(value: Any, name: str, limits: RowLimits) -> str:
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{name} must be a string, not {type(value).__name__}")
    if len(value) > limits.max_prompt_chars:
        raise RowError("prompt_too_long", f"{name} has {len(value)} characters; the limit is {limits.max_prompt_chars}")
    if _CONTROL.search(value):
        raise RowError("bad_value", f"{name} holds control characters or broken Unicode")
    return value


def _integer(value: Any, name: str, low: int, high: int) -> int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,20}\s*", value, re.ASCII):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes an integer column with gaps as floats
    if isinstance(value, bool) or not isinstance(value, int):
        raise RowError("wrong_type", f"{name} must be an integer, not {ascii(value)[:40]}")
    if not low <= value <= high:
        raise RowError("bad_value", f"{name} is {value}; it must be between {low} and {high}")
    return value


def _extra(name: str, value: Any) -> Scalar:
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else str(value)
    if isinstance(value, datetime | date | time):
        text = value.isoformat()
    elif isinstance(value, bytes):
        text = base64.b64encode(value).decode()
    elif isinstance(value, Decimal | timedelta):
        text = str(value)
    elif isinstance(value, str):
        text = value
    else:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str, separators=(",", ":"))
    if len(text) > MAX_EXTRA_CHARS:
        raise RowError("row_too_long", f"column {name!r} has {len(text)} characters; the limit is {MAX_EXTRA_CHARS}")
    if re.search(r"[\ud800-\udfff]", text):
        raise RowError("bad_value", f"column {name!r} holds broken Unicode")
    return text

"""Raw rows of a prompt file, one format each: a generator of (line, columns), or the error of that line.

Memory is constant: a text file is read line by line, Parquet batch by batch. What is wrong with one line is that line's
`RowError`; what makes the whole file unusable is a `PromptsError`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import PromptsError
from jobs.prompt_row import RowError

Format = Literal["txt", "jsonl", "csv", "parquet"]
RawRow = tuple[int, dict[str, Any] | RowError]

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_CSV_RECORD_LINES = 200
"""A quoted field that is still open after so many lines is a lost quote, not a prompt."""

_SUFFIXES: dict[str, Format] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_UTF8_BOM = b"\xef\xbb\xbf"
_OTHER_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip", b"PK": "zip"}


def format_of(name: str) -> Format:
    """The format that a file name promises."""
    suffix = Path(name).suffix.lower()
    if suffix in _SUFFIXES:
        return _SUFFIXES[suffix]
    raise PromptsError(
        f"{name}: cannot tell the format from {suffix!r}; name it with --prompts-format txt|jsonl|csv|parquet"
    )


def raw_rows(path: Path, file_format: Format, label: str) -> Iterator[RawRow]:
    """All rows of a local file.

    Args:
        path: Where the bytes are.
        file_format: How to read them.
        label: The file's name as the user gave it, for messages.
    """
    if file_format == "parquet":
        yield from _parquet_rows(path, label)
        return
    readers: dict[str, Callable[[BinaryIO, str], Iterator[RawRow]]] = {
        "txt": _txt_rows,
        "jsonl": _jsonl_rows,
        "csv": _csv_rows,
    }
    try:
        with path.open("rb") as file:
            _skip_bom(file, label)
            yield from readers[file_format](file, label)
    except OSError as error:
        raise PromptsError(f"{label}: cannot be read: {error.strerror or error}") from error


def _skip_bom(file: BinaryIO, label: str) -> None:
    head = file.read(4)
    for magic, name in _OTHER_BOMS.items():
        if head.startswith(magic):
            raise PromptsError(f"{label}: line 1: this is a {name} file; save it as plain UTF-8 text")
    if head == b"PAR1":
        raise PromptsError(
            f"{label}: line 1: this is a Parquet file; name it .parquet or give --prompts-format parquet"
        )
    file.seek(3 if head.startswith(_UTF8_BOM) else 0)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | RowError]]:
    """Physical lines without their end; an overlong one is passed over in constant memory."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line.rstrip(b"\r\n")
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield number, RowError("row_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")


def _decoded(line: bytes) -> str | RowError:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowError("bad_utf8", f"byte {error.start + 1} of the line is not UTF-8")


def _txt_rows(file: BinaryIO, label: str) -> Iterator[RawRow]:
    for number, line in _lines(file):
        text = line if isinstance(line, RowError) else _decoded(line)
        if isinstance(text, RowError):
            yield number, text
        elif text.strip():  # an empty line separates prompts in hand-written lists; it asks for nothing
            yield number, {"prompt": text}


def _jsonl_rows(file: BinaryIO, label: str) -> Iterator[RawRow]:
    for number, line in _lines(file):
        text = line if isinstance(line, RowError) else _decoded(line)
        if isinstance(text, RowError):
            yield number, text
        elif text.strip():
            yield number, _json_row(text)


def _json_row(text: str) -> dict[str, Any] | RowError:
    try:
        row = _DECODER.decode(text)
    except RowError as error:
        return error
    except json.JSONDecodeError as error:
        return RowError("bad_json", f"not JSON at column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:
        return RowError("bad_json", f"not usable JSON: {error}"[:200])
    if not isinstance(row, dict):
        return RowError("wrong_type", f"a line must be a JSON object, not {type(row).__name__}")
    return row


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RowError("bad_json", "a field stands twice in one object")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_fields)


def _csv_rows(file: BinaryIO, label: str) -> Iterator[RawRow]:
    records = _csv_records(file)
    number, header = next(records, (1, []))
    if isinstance(header, RowError):
        raise PromptsError(f"{label}: line {number}: the header cannot be read: {header}")
    names = [name.strip() for name in header]
    _check_columns(names, label)
    for number, record in records:
        if isinstance(record, RowError):
            yield number, record
        elif len(record) != len(names):
            yield number, RowError("bad_csv", f"{len(record)} fields where the header has {len(names)}")
        else:
            yield number, _csv_columns(dict(zip(names, record, strict=True)))


def _csv_columns(row: dict[str, str]) -> dict[str, Any]:
    prompt = row["prompt"].strip()
    if prompt.startswith("[") and prompt.endswith("]"):
        parsed = _json_row('{"prompt":' + prompt + "}")
        segments = parsed["prompt"] if isinstance(parsed, dict) else None
        if segments and all(isinstance(s, dict) and set(s) == {"frame", "prompt"} for s in segments):
            return {**row, "prompt": segments}
    return {name: value if value or name == "prompt" else None for name, value in row.items()}


def _csv_records(file: BinaryIO) -> Iterator[tuple[int, list[str] | RowError]]:
    """Records with the number of their first line.

    A record that never closes its quote costs its first line only: the lines after it are read again on their own.
    """
    source = _lines(file)
    waiting: list[tuple[int, bytes | RowError]] = []
    while True:
        head = waiting.pop(0) if waiting else next(source, None)
        if head is None:
            return
        number, line = head
        if isinstance(line, RowError):
            yield number, line
            continue
        taken: list[tuple[int, bytes | RowError]] = []
        record = _csv_record(line)
        while record is None and len(taken) < MAX_CSV_RECORD_LINES:
            following = waiting.pop(0) if waiting else next(source, None)
            if following is None:
                break
            taken.append(following)
            if isinstance(following[1], RowError):
                break
            line += b"\n" + following[1]
            record = _csv_record(line)
        if record is None:
            waiting[:0] = taken
            record = RowError("bad_csv", 'a quote (") is opened and never closed; double it ("") inside a field')
        elif isinstance(record, RowError):
            waiting[:0] = taken
        if record != []:
            yield number, record


def _csv_record(line: bytes) -> list[str] | RowError | None:
    """Fields of one record, or None while a quoted field is still open."""
    text = _decoded(line)
    if isinstance(text, RowError):
        return text
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None
        return RowError("bad_csv", f"CSV quoting: {error}")
    return (
        rows[0] if len(rows) == 1 else ([] if not rows else RowError("bad_csv", "a lone carriage return in the line"))
    )


def _parquet_rows(path: Path, label: str) -> Iterator[RawRow]:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow.names, label)
            _check_prompt_type(file.schema_arrow.field("prompt").type, label)
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise PromptsError(f"{label}: cannot be read as Parquet: {error}"[:500]) from error


def _check_prompt_type(kind: pa.DataType, label: str) -> None:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
    if not (text or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise PromptsError(
            f"{label}: column 'prompt' has type {kind}; it must be string or list<struct<frame, prompt>>"
        )


def _check_columns(names: list[str], label: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PromptsError(f"{label}: line 1: column {twice[0]!r} stands twice; rename one")
    if "prompt" not in names:
        near = get_close_matches("prompt", names, 1, 0.6)
        near += [name for name in names if name.lower().strip() in {"prompt", "text", "caption"}]
        hint = f"; rename {near[0]!r} to 'prompt'" if near else ""
        if len(names) == 1 and any(mark in names[0] for mark in ";\t|"):
            hint = "; the fields must be separated by commas"
        found = ", ".join(names[:10]) or "none"
        raise PromptsError(f"{label}: line 1: no column 'prompt' (found: {found}){hint}")

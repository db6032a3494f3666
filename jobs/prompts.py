"""A prompt list as a stream of `Prompt` and `Rejected`: txt, jsonl, csv or parquet, local or s3://.

One pass holds one row in memory besides the ids seen so far. `scan_prompts` is the pass before a job starts: it counts,
fingerprints the input and settles the type of every extra column, so that all manifest parts share one schema.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.errors import AccessDenied, NotFound, StoreError
from cluster.object_store import open_store
from jobs.errors import PromptsError
from jobs.id_set import IdSet
from jobs.prompt_files import Format, format_of, raw_rows
from jobs.prompt_row import MAX_ID_CHARS, Prompt, Rejected, RowError, RowLimits, Scalar, read_row
from jobs.rows import rejected_id
from jobs.shards import TaskDefaults, task_id_at

ColumnType = Literal["bool", "int64", "float64", "string"]
MAX_EXTRA_COLUMNS = 256


@dataclass(frozen=True)
class PromptSource:
    """Where the list is and how to read it."""

    url: str
    file_format: Format | Literal["auto"] = "auto"
    limits: RowLimits = field(default_factory=RowLimits)

    @property
    def resolved_format(self) -> Format:
        return format_of(self.url) if self.file_format == "auto" else self.file_format


@dataclass(frozen=True)
class PromptScan:
    """What one pass over a list found."""

    num_rows: int
    num_items: int
    num_tasks: int
    num_frames: int
    rejected: Mapping[str, int]
    first_rejected: tuple[Rejected, ...]
    columns: Mapping[str, ColumnType] = field(default_factory=dict)
    sha256: str = ""
    longest_frames: int = 0
    num_open: int = 0
    """Tasks and rejected lines that the job's record does not know yet."""

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())


def read_prompts(source: PromptSource, seen: IdSet | None = None) -> Iterator[Prompt | Rejected]:
    """Every row of the list, in file order; the second row of an id is rejected.

    Args:
        source: The list.
        seen: Ids so far; a compact set made for the purpose unless given.
    Raises:
        PromptsError: The file as a whole cannot be used; names file, line and fix.
    """
    seen = seen if seen is not None else IdSet()
    with local_copy(source.url) as path:
        for line, raw in raw_rows(path, source.resolved_format, source.url):
            if isinstance(raw, RowError):
                yield Rejected(line, raw.kind, str(raw))
                continue
            row = read_row(line, raw, source.limits)
            if isinstance(row, Prompt) and not seen.add(row.item_id):
                row = _duplicate(row, has_id=raw.get("id") not in (None, ""))
            yield row


def scan_prompts(
    source: PromptSource,
    defaults: TaskDefaults,
    *,
    is_settled: Callable[[str], bool] = lambda task_id: False,
    num_examples: int = 20,
) -> PromptScan:
    """Read the whole list once, keep only counts.

    Args:
        source: The list.
        defaults: What a row that does not say otherwise gets.
        is_settled: What the job's ledger says of an id; for `num_open`.
        num_examples: How many rejected rows to keep.
    Raises:
        PromptsError: The file cannot be used, or holds not a single good row.
    """
    counts: Counter[str] = Counter()
    num_items = num_tasks = num_frames = longest = num_open = 0
    examples: list[Rejected] = []
    columns: dict[str, ColumnType | None] = {}
    digest = hashlib.sha256()
    for row in read_prompts(source):
        if isinstance(row, Rejected):
            counts[row.kind] += 1
            num_open += not is_settled(rejected_id(row.line, row.kind))
            digest.update(f"{row.line}\0{row.kind}\n".encode())
            if len(examples) < num_examples:
                examples.append(row)
            continue
        num_items += 1
        samples, frames = row.samples or defaults.samples, row.num_frames or defaults.num_frames
        num_tasks += samples
        num_open += sum(not is_settled(task_id_at(row.item_id, index)) for index in range(samples))
        num_frames += samples * frames
        longest = max(longest, frames)
        digest.update(f"{row.item_id}\0{samples}\n".encode())
        _widen(columns, row.extra, row.line, source.url)
    if not num_items:
        first = f"; first: line {examples[0].line}: {examples[0].reason}" if examples else ""
        raise PromptsError(f"{source.url}: no usable prompt in it ({sum(counts.values())} bad rows){first}")
    return PromptScan(
        num_rows=num_items + sum(counts.values()),
        num_items=num_items,
        num_tasks=num_tasks,
        num_frames=num_frames,
        rejected=dict(counts),
        first_rejected=tuple(examples),
        columns={name: kind or "string" for name, kind in columns.items()},
        sha256=digest.hexdigest(),
        longest_frames=longest,
        num_open=num_open,
    )


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The file itself when it is local, else a temporary copy that is removed afterwards.

    Raises:
        PromptsError: It does not exist or may not be read.
    """
    if "://" not in url or url.startswith("file://"):
        path = Path(url.removeprefix("file://")).expanduser()
        if path.is_dir():
            raise PromptsError(f"{url}: is a directory; name one file in it")
        if not path.exists():
            raise PromptsError(f"{url}: no such file")
        yield path
        return
    parent, _, name = url.rpartition("/")
    if not url.startswith("s3://") or not name or parent in {"s3:/", "s3:"}:
        raise PromptsError(f"{url}: give a local path or s3://bucket/key")
    with tempfile.TemporaryDirectory(prefix="longtake-") as folder:
        path = Path(folder) / "prompts"
        try:
            open_store(parent).get_file(name, path)
        except NotFound as error:
            raise PromptsError(f"{url}: no such object") from error
        except AccessDenied as error:
            raise PromptsError(f"{url}: access denied; check the credentials ({error})") from error
        except StoreError as error:
            raise PromptsError(f"{url}: cannot be read: {error}") from error
        yield path


def _duplicate(row: Prompt, *, has_id: bool) -> Rejected:
    if has_id:
        reason = f"id {row.item_id!r} stands on an earlier line; ids must differ"
    else:
        reason = "the same prompt stands on an earlier line; ask for `samples`, or give the rows different ids or seeds"
    return Rejected(row.line, "duplicate_id", reason, row.item_id, row.text[:200])


def _widen(columns: dict[str, ColumnType | None], extra: Mapping[str, Scalar], line: int, url: str) -> None:
    """Settle a type per extra column that holds every value seen so far."""
    for name, value in extra.items():
        if name not in columns and len(columns) >= MAX_EXTRA_COLUMNS:
            raise PromptsError(f"{url}: line {line}: more than {MAX_EXTRA_COLUMNS} extra columns; put them into one")
        if not name.strip() or len(name) > MAX_ID_CHARS or not name.isprintable():
            raise PromptsError(f"{url}: line {line}: {ascii(name)[:80]} cannot be a column name; rename the field")
        if value is None:
            columns.setdefault(name, None)
            continue
        kind: ColumnType = "string"
        if isinstance(value, bool):
            kind = "bool"
        elif isinstance(value, int):
            kind = "int64"
        elif isinstance(value, float):
            kind = "float64"
        old = columns.get(name) or kind
        if old == kind:
            columns[name] = kind
        else:
            columns[name] = "float64" if {old, kind} == {"int64", "float64"} else "string"

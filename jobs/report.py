"""What a job delivered: counts, time and cost by cause, failures by kind, and a contact sheet of its takes.

Made from the store alone; the sheet is written to `report/contact-sheet.png` below the job's root.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.object_store import ObjectStore, open_store
from jobs.consume import committed_tables
from jobs.progress import duration_text, size_text
from jobs.quarantine import read_quarantine
from jobs.replay import Replay
from jobs.status import JobStatus, read_status
from workers.task import segments_of
from workers.video.contact_sheet import make_contact_sheet

SHEET_KEY = "report/contact-sheet.png"
MAX_SHEET_TAKES = 24
MAX_EXAMPLES = 3
SUMMED = ("num_frames", "duration_s", "bytes", "gpu_seconds", "wasted_gpu_seconds", "usd")
SHOWN = ("item_id", "sample_index", "prompt", "file_name")


@dataclass(frozen=True)
class FailureGroup:
    """Failed tasks or rejected rows of one kind."""

    kind: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class JobReport:
    """The figures of a report; seconds and bytes. `gpu_seconds_by_cause` is None before the first run has ended."""

    status: JobStatus
    num_videos: int
    num_frames: int
    video_s: float
    num_bytes: int
    gpu_s: float
    wasted_gpu_s: float
    usd: float | None
    gpu_seconds_by_cause: dict[str, float] | None
    frames_per_gpu_s: float | None
    slowest: tuple[str, ...]
    failures: tuple[FailureGroup, ...]
    contact_sheet: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"status": self.status.as_dict()}


def make_report(url: str | Path, *, with_sheet: bool = True) -> JobReport:
    """Read a job's rows and, if asked, draw its contact sheet.

    Raises:
        SpecError: There is no job.
    """
    store = open_store(url)
    status = read_status(url)
    totals: dict[str, float] = defaultdict(float)
    shown = _Sample(MAX_SHEET_TAKES)
    slowest: list[tuple[float, str]] = []
    for table in committed_tables(store, (*SUMMED, *SHOWN)):
        totals["videos"] += table.num_rows
        for column in SUMMED:
            totals[column] += pc.sum(table[column]).as_py() or 0
        totals["priced"] += table.num_rows - table["usd"].null_count
        slowest = _slowest(table, slowest)
        shown.add(table)
    result = status.last_result or {}
    busy = totals["gpu_seconds"]
    return JobReport(
        status=status,
        num_videos=int(totals["videos"]),
        num_frames=int(totals["num_frames"]),
        video_s=totals["duration_s"],
        num_bytes=int(totals["bytes"]),
        gpu_s=busy,
        wasted_gpu_s=totals["wasted_gpu_seconds"],
        usd=totals["usd"] if totals["priced"] else None,
        gpu_seconds_by_cause=result.get("gpu_seconds"),
        frames_per_gpu_s=totals["num_frames"] / busy if busy else None,
        slowest=tuple(f"{task_id}: {seconds * 1000:.1f} ms a frame" for seconds, task_id in slowest),
        failures=_failures(store),
        contact_sheet=_draw_sheet(store, shown.rows) if with_sheet and shown.rows else None,
    )


def report_text(report: JobReport) -> str:
    """The report for a terminal."""
    status = report.status
    lines = [
        f"job {status.job_id}: {status.state}",
        f"  {report.num_videos} of {status.num_tasks} videos, {status.num_failed} failed, "
        f"{status.num_rejected} rows rejected",
        f"  {report.num_frames} frames, {duration_text(report.video_s)} of video, {size_text(report.num_bytes)}",
    ]
    if report.frames_per_gpu_s:
        lines.append(
            f"  {duration_text(report.gpu_s)} of actor time in videos ({report.frames_per_gpu_s:.1f} frames/s), "
            f"{duration_text(report.wasted_gpu_s)} in attempts that were lost"
        )
    if report.gpu_seconds_by_cause:
        held = sum(report.gpu_seconds_by_cause.values())
        parts = (f"{name} {100 * s / held:.1f}%" for name, s in report.gpu_seconds_by_cause.items() if held and s)
        lines.append(f"  last run held actors for {duration_text(held)}: {', '.join(parts)}")
    if report.usd is not None and report.video_s:
        lines.append(f"  ${report.usd:.2f}, ${report.usd / report.video_s:.4f} per second of video")
    lines += [f"  slow: {text}" for text in report.slowest]
    for group in report.failures:
        lines.append(f"  {group.count} x {group.kind}")
        lines += [f"      {example}" for example in group.examples]
    if report.contact_sheet:
        lines.append(f"  contact sheet: {report.contact_sheet}")
    return "\n".join(lines)


class _Sample:
    """At most `size` rows, spread evenly over a stream of unknown length, the first one always among them."""

    def __init__(self, size: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._size = size
        self._stride = 1
        self._seen = 0

    def add(self, table: pa.Table) -> None:
        """The next rows of the stream."""
        index = -self._seen % self._stride
        while index < table.num_rows:
            self.rows += table.slice(index, 1).to_pylist()
            index += self._stride
            if len(self.rows) > self._size:  # keep every second one, and go on at twice the distance
                self.rows = self.rows[::2]
                self._stride *= 2
                index += -(self._seen + index) % self._stride
        self._seen += table.num_rows


def _slowest(table: pa.Table, before: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """The takes that cost most per frame, of these rows and those found before."""
    per_frame = pc.divide(table["gpu_seconds"], pc.cast(table["num_frames"], pa.float64()))
    found = list(before)
    for index in pc.sort_indices(per_frame, [("", "descending")])[:MAX_EXAMPLES].to_pylist():
        name = f"{table['item_id'][index]}-{table['sample_index'][index]}"
        found.append((per_frame[index].as_py(), name))
    return sorted(found, reverse=True)[:MAX_EXAMPLES]


def _failures(store: ObjectStore) -> tuple[FailureGroup, ...]:
    """By kind, the commonest first; a task that was reopened and has succeeded since is not among them."""
    replay = Replay(store, "")
    latest: dict[str, tuple[str, str]] = {}
    for row in read_quarantine(store, replay):
        if row["status"] == "rejected":
            key = f"line {row['input_row']}"
            latest[key] = (f"rejected: {row['reject_kind']}", f"{key}: {row['error_message']}")
        elif not replay.ledger.has_succeeded(key := f"{row['item_id']}-{row['sample_index']}"):
            latest.pop(key, None)
            if row["status"] == "failed":
                latest[key] = (str(row["error_type"]), f"{key}: {row['error_message']}")
    groups: dict[str, list[str]] = defaultdict(list)
    for kind, example in latest.values():
        groups[kind].append(example)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return tuple(FailureGroup(kind, len(all_of), tuple(all_of[:MAX_EXAMPLES])) for kind, all_of in ordered)


def _draw_sheet(store: ObjectStore, rows: list[dict[str, Any]]) -> str:
    with tempfile.TemporaryDirectory(prefix="longtake-report-") as folder:
        videos = []
        for index, row in enumerate(rows):
            path = Path(folder) / f"{index}.mp4"
            store.get_file(row["file_name"], path)
            prompts = " -> ".join(segment.prompt for segment in segments_of(row["prompt"]))
            videos.append((f"{row['item_id']}-{row['sample_index']}: {prompts}", path))
        sheet = Path(folder) / "sheet.png"
        make_contact_sheet(videos, sheet)
        store.put_file(SHEET_KEY, sheet)
    return f"{store.url}/{SHEET_KEY}"

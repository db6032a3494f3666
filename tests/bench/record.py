"""What every bench shares: say what it ran on, print a table, and keep it as JSON beside the others.

A bench calls `report(name, rows, notes)` once, last. `python -m tests.bench.table` makes docs/results.md of all files.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """CPU model and count, memory, and the GPU if torch is loaded and sees one."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = f"{os.cpu_count()} x {model}, {gib:.0f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text


def load_text() -> str:
    """How busy the machine was, for the notes of a bench whose numbers depend on it."""
    return (
        f"Load of the {os.cpu_count()} CPUs over the last five minutes, this bench included: {os.getloadavg()[1]:.1f}. "
    )


def commit() -> str:
    """Short commit of the working tree, `+` behind it when tracked files differ, or `unknown` outside git.

    LONGTAKE_COMMIT wins: a copy of the files does not know the commit that it was made of.
    """
    if said := os.environ.get("LONGTAKE_COMMIT"):
        return said
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        diff = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if diff.returncode else "")


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and half the distance between the extremes."""
    return statistics.median(values), (max(values) - min(values)) / 2


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order of their first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def keep(name: str, rows: Sequence[dict[str, Any]], notes: str = "", folder: Path | None = None) -> dict[str, Any]:
    """Write `<folder>/<name>.json` (device, date, command, commit, rows) and return it; without a folder into RESULTS.

    A long bench calls it after every row, so that what is measured survives whatever ends the bench.
    """
    record = {
        "name": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": hardware(),
        "command": "python -m " + shlex.join([_module(), *sys.argv[1:]]),
        "commit": commit(),
        "python": platform.python_version(),
        "notes": notes,
        "rows": list(rows),
    }
    write_record(record, folder)
    return record


def write_record(record: dict[str, Any], folder: Path | None = None) -> Path:
    """Write a record as `<folder>/<its name>.json`, whole or not at all."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['name']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
    return path


def report(name: str, rows: Sequence[dict[str, Any]], notes: str = "", folder: Path | None = None) -> Path:
    """Print the table and write `<folder>/<name>.json`."""
    record = keep(name, rows, notes, folder)
    print(f"\n{name}: {record['device']}; {record['command']}; commit {record['commit']}")
    print(format_table(rows))
    if notes:
        print(notes)
    return (folder or RESULTS) / f"{name}.json"


def _module() -> str:
    return "tests.bench." + Path(sys.argv[0]).stem


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

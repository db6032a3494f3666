"""`python -m tests.bench.table`: docs/results.md from all result files; no figure there is typed by hand."""

from __future__ import annotations

import json
from typing import Any

from tests.bench.record import RESULTS, ROOT, format_table

HEAD = """# Measured results

Made by `python -m tests.bench.table` from `tests/bench/results/*.json`; every table names its command and machine.
"""


def by_part(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of each part of a bench, without what is said once for all; the commit stays where rows are of several."""
    parts: dict[str, list[dict[str, Any]]] = {}
    is_of_several = len({row["commit"] for row in rows if row.get("commit")}) > 1
    apart = ("command", "device") if is_of_several else ("command", "commit", "device")
    for row in rows:
        shown = {name: value for name, value in row.items() if name not in apart or value is None}
        parts.setdefault(row.get("part", ""), []).append(shown)
    return list(parts.values())


def main() -> None:
    """Write docs/results.md."""
    parts = [HEAD]
    files = sorted(RESULTS.glob("*.json"))
    for path in files:
        record = json.loads(path.read_text())
        parts.append(f"## {record.get('name', path.stem)}\n")
        parts.append(f"{record['date']}, {record['device']}, commit {record['commit']}: `{record['command']}`\n")
        for rows in by_part(record["rows"]):
            parts.append(format_table(rows) + "\n")
        apart = sorted({(row["command"], row.get("device")) for row in record["rows"] if "command" in row})
        parts += [f"Rows were measured by `{one}`{f', {where}' if where else ''}\n" for one, where in apart]
        if record.get("notes"):
            parts.append(record["notes"] + "\n")
    target = ROOT / "docs" / "results.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(parts))
    print(f"wrote {target.relative_to(ROOT)}: {len(files)} tables")


if __name__ == "__main__":
    main()

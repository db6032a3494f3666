"""`python -m tests.bench.table`: docs/results.md from all result files; no figure there is typed by hand."""

from __future__ import annotations

import json

from tests.bench.record import RESULTS, ROOT, format_table

HEAD = """# Measured results

Made by `python -m tests.bench.table` from `tests/bench/results/*.json`; every table names its command and machine.
"""


def main() -> None:
    """Write docs/results.md."""
    parts = [HEAD]
    files = sorted(RESULTS.glob("*.json"))
    for path in files:
        record = json.loads(path.read_text())
        parts.append(f"## {record.get('name', path.stem)}\n")
        parts.append(f"{record['date']}, {record['device']}, commit {record['commit']}: `{record['command']}`\n")
        parts.append(format_table(record["rows"]) + "\n")
        if record.get("notes"):
            parts.append(record["notes"] + "\n")
    target = ROOT / "docs" / "results.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text("\n".join(parts))
    print(f"wrote {target.relative_to(ROOT)}: {len(files)} tables")


if __name__ == "__main__":
    main()

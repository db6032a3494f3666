"""Log lines of a driver: plain text for eyes, or one JSON object a line with job, shard, item and attempt."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def facts_of(record: logging.LogRecord) -> dict[str, object]:
    """What a line was given with `extra=`: task, item, shard, attempt, actor, node, why ..."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, job_id: str = "") -> None:
        super().__init__()
        self._job_id = job_id

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._job_id:
            line["job"] = self._job_id
        line |= facts_of(record)
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """`22:00:01 WARNING message [task x, attempt y]`."""

    def format(self, record: logging.LogRecord) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in facts_of(record).items())
        text = (
            f"{datetime.fromtimestamp(record.created).astimezone():%H:%M:%S} {record.levelname} {record.getMessage()}"
        )
        text += f" [{facts}]" if facts else ""
        return text + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def set_up_logging(*, json_lines: bool, job_id: str = "", verbose: bool = False) -> None:
    """Send our own loggers to stderr; those of libraries stay as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(job_id) if json_lines else TextFormatter())
    for name in ("jobs", "cluster", "workers"):
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.propagate = False
        log.setLevel(logging.DEBUG if verbose else logging.INFO if json_lines else logging.WARNING)

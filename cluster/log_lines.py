"""Log lines of drivers and actors: plain text for eyes, or one JSON object a line with job, shard, task and attempt."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime

OURS = ("jobs", "cluster", "workers")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_NO_FACTS: Mapping[str, object] = {}
_facts: ContextVar[Mapping[str, object]] = ContextVar("log_facts", default=_NO_FACTS)


@contextlib.contextmanager
def log_facts(**facts: object) -> Iterator[None]:
    """Every line that this thread writes meanwhile says these too: task, attempt ..."""
    token = _facts.set({**_facts.get(), **facts})
    try:
        yield
    finally:
        _facts.reset(token)


def facts_of(record: logging.LogRecord) -> dict[str, object]:
    """What a line was given by `log_facts` and with `extra=`: task, item, shard, attempt, actor, node, why ..."""
    # Ray gives every record of its process a private field; so may other libraries.
    given = {name: value for name, value in vars(record).items() if name not in _STANDARD and name[0] != "_"}
    return {**_facts.get(), **given}


class JsonFormatter(logging.Formatter):
    """One JSON object a line.

    Args:
        facts: What stands in every line, such as the job.
    """

    def __init__(self, facts: Mapping[str, object] = _NO_FACTS) -> None:
        super().__init__()
        self._facts = facts

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= self._facts
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


def set_up_logging(*, json_lines: bool, verbose: bool = False, facts: Mapping[str, object] = _NO_FACTS) -> None:
    """Send our own loggers to stderr; those of libraries stay as they are.

    Args:
        facts: What stands in every line of this process; JSON only.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(facts) if json_lines else TextFormatter())
    for name in OURS:
        log = logging.getLogger(name)
        log.handlers = [handler]
        log.propagate = False
        log.setLevel(logging.DEBUG if verbose else logging.INFO if json_lines else logging.WARNING)

"""Log lines say whose work they are about, in every thread on its own."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from cluster.log_lines import JsonFormatter, TextFormatter, log_facts, set_up_logging


def line_of(text: str = "hello", **extra: object) -> dict[str, object]:
    record = logging.makeLogRecord({"name": "workers.actor", "msg": text, "levelname": "INFO", **extra})
    line: dict[str, object] = json.loads(JsonFormatter({"job": "night", "actor": "actor-1"}).format(record))
    return line


def test_facts_of_the_process_the_thread_and_the_call_stand_in_one_line() -> None:
    with log_facts(task="a-0", attempt="e1a1"):
        line = line_of(why="because")
    assert line.items() >= {
        "job": "night", "actor": "actor-1", "task": "a-0", "attempt": "e1a1", "why": "because"
    }.items()  # fmt: skip
    assert "task" not in line_of()


def test_two_threads_do_not_share_their_facts() -> None:
    barrier = threading.Barrier(2)
    seen: dict[str, object] = {}

    def work(name: str) -> None:
        with log_facts(task=name):
            barrier.wait()
            seen[name] = line_of()["task"]
            barrier.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"a": "a", "b": "b"}


def test_text_shows_the_facts_behind_the_message() -> None:
    record = logging.makeLogRecord({"msg": "lost", "levelname": "WARNING"})
    with log_facts(task="a-0"):
        assert TextFormatter().format(record).endswith("WARNING lost [task a-0]")


def test_set_up_once_more_replaces_and_does_not_double(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("workers")
    before = (log.handlers, log.propagate, log.level)
    others = {name: vars(logging.getLogger(name)).copy() for name in ("jobs", "cluster")}
    try:
        for _ in range(2):
            set_up_logging(json_lines=True, facts={"job": "night"})
        logging.getLogger("workers.actor").info("loaded")
        (line,) = capsys.readouterr().err.splitlines()
        assert json.loads(line)["job"] == "night"
    finally:
        log.handlers, log.propagate = before[0], before[1]
        log.setLevel(before[2])
        for name, values in others.items():
            other = logging.getLogger(name)
            other.handlers, other.propagate = values["handlers"], values["propagate"]
            other.setLevel(values["level"])

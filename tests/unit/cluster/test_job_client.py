"""A head that takes a question and never answers it is asked once more, and then said to be unreachable."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster import job_client
from cluster.errors import ClusterUnreachable
from cluster.job_client import JobClient

VERSION = b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}'


@contextlib.contextmanager
def head_that_answers_from(first: int) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the questions that came; those before the `first`-th hang until the end of the block."""
    asked: list[str] = []
    is_over = threading.Event()

    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if len(asked) < first:
                is_over.wait()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(VERSION)))
            self.end_headers()
            self.wfile.write(VERSION)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Head) as server:
        server.daemon_threads = True
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            is_over.set()
            server.shutdown()
            serving.join()


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_client, "ANSWER_TIMEOUT_S", 1.0)


def test_a_head_that_answers_the_second_question_is_there() -> None:
    with head_that_answers_from(2) as (address, asked):
        JobClient(address)
    assert asked[:2] == ["/api/version", "/api/version"]


def test_a_head_that_never_answers_is_unreachable() -> None:
    with head_that_answers_from(99) as (address, asked), pytest.raises(ClusterUnreachable, match="no job API there"):
        JobClient(address)
    assert len(asked) == 2

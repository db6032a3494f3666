"""Notices of the end, from signals and from real HTTP endpoints on loopback."""

from __future__ import annotations

import datetime
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.preemption import Ec2Spot, GceSpot, Notice, PreemptionWatch, on_termination
from tests.servers import silent_port

PATIENCE_S = 60.0  # the server is a thread of this busy process
Answers = dict[tuple[str, str], tuple[int, str]]


@pytest.fixture
def metadata_server() -> Iterator[tuple[str, Answers]]:
    """A metadata service: answers to (verb, path); a PUT for a token is needed before EC2's paths are told."""
    answers: Answers = {("PUT", "/latest/api/token"): (200, "the-token")}

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            status, text = answers.get((self.command, self.path), (404, ""))
            needs_token = self.path.startswith("/latest/meta-data")
            if needs_token and self.headers.get("X-aws-ec2-metadata-token") != "the-token":
                status, text = 401, ""
            if self.path.startswith("/computeMetadata") and self.headers.get("Metadata-Flavor") != "Google":
                status, text = 403, ""
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", answers
    server.shutdown()
    thread.join()
    server.server_close()


def test_ec2_tells_action_and_time_left(metadata_server: tuple[str, Answers]) -> None:
    url, answers = metadata_server
    source = Ec2Spot(url, PATIENCE_S)
    assert source.notice() is None
    ends_at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    body = json.dumps({"action": "stop", "time": ends_at.strftime("%Y-%m-%dT%H:%M:%SZ")})
    answers["GET", "/latest/meta-data/spot/instance-action"] = (200, body)
    notice = source.notice()
    assert notice is not None
    assert (notice.source, notice.action) == ("ec2", "stop")
    assert notice.seconds_left is not None
    assert 100 - PATIENCE_S < notice.seconds_left <= 100


def test_an_unreadable_notice_is_still_a_notice(metadata_server: tuple[str, Answers]) -> None:
    url, answers = metadata_server
    answers["GET", "/latest/meta-data/spot/instance-action"] = (200, "soon")
    assert Ec2Spot(url, PATIENCE_S).notice() == Notice("ec2", "unknown")


def test_gce_tells_true(metadata_server: tuple[str, Answers]) -> None:
    url, answers = metadata_server
    path = "/computeMetadata/v1/instance/preempted"
    answers["GET", path] = (200, "FALSE")
    assert GceSpot(url, PATIENCE_S).notice() is None
    answers["GET", path] = (200, "TRUE")
    assert GceSpot(url, PATIENCE_S).notice() == Notice("gce", "terminate", 30.0)


@pytest.mark.parametrize("make", [Ec2Spot, GceSpot])
def test_nobody_there_is_no_notice(make: Callable[[str], Ec2Spot | GceSpot]) -> None:
    with silent_port() as port:
        assert make(f"http://127.0.0.1:{port}").notice() is None


def test_sigterm_is_a_notice_once_and_the_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with on_termination() as source:
        assert source.notice() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert source.notice() == Notice("signal", "SIGTERM")
        assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_watch_tells_once_and_leaves_no_thread(metadata_server: tuple[str, Answers]) -> None:
    url, answers = metadata_server
    told: list[Notice] = []
    with PreemptionWatch([Ec2Spot(url, PATIENCE_S), GceSpot(url, PATIENCE_S)], told.append, interval_s=0.02):
        time.sleep(0.1)
        assert told == []
        answers["GET", "/computeMetadata/v1/instance/preempted"] = (200, "TRUE")
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
    assert [notice.source for notice in told] == ["gce"]
    assert "preemption" not in {thread.name for thread in threading.enumerate()}

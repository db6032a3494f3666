"""An HTTP proxy that misbehaves on request: it stands between our S3 client and a real S3 server.

It forwards everything unchanged (also the Host header, which S3's signature covers), keeps a record of each request,
and applies the first armed fault whose predicate holds.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

FaultKind = Literal[
    "reset_before",  # the connection breaks before the server has heard of it
    "lost_answer",  # the server obeys, the connection breaks before its answer
    "cut_answer",  # half of the answer's body, then the connection breaks
    "slow_down",  # 503 SlowDown, the server has heard nothing
    "late_503",  # the server obeys, a gateway says 503
    "conflict",  # 409 ConditionalRequestConflict, the server has heard nothing
    "unconditional",  # If-None-Match is dropped on the way, as a server that does not know it would
    "slow",  # the answer comes after `delay_s`
]
ERRORS = {
    "slow_down": (503, "SlowDown"),
    "late_503": (503, "SlowDown"),
    "conflict": (409, "ConditionalRequestConflict"),
}
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}


@dataclass(frozen=True)
class SeenRequest:
    """One request as the client sent it; `key` is the path after the bucket."""

    verb: str
    key: str
    query: str
    is_conditional: bool


@dataclass
class Fault:
    """What to do to the next `times` requests for which `when` holds."""

    kind: FaultKind
    when: Callable[[SeenRequest], bool]
    times: int = 1
    delay_s: float = 0.0


@dataclass
class FaultProxy:
    """Runs in threads of the test process; use as a context manager."""

    upstream_url: str
    seen: list[SeenRequest] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    sockets: set[socket.socket] = field(default_factory=set)

    def __enter__(self) -> FaultProxy:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = _QuietServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        with self.lock:
            for open_socket in self.sockets:
                with contextlib.suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)
        self.server.server_close()

    def arm(
        self,
        kind: FaultKind,
        when: Callable[[SeenRequest], bool] = lambda _: True,
        *,
        times: int = 1,
        delay_s: float = 0.0,
    ) -> Fault:
        """Apply `kind` to the next `times` requests for which `when` holds."""
        fault = Fault(kind, when, times, delay_s)
        with self.lock:
            self.faults.append(fault)
        return fault

    def count(self, verb: str, key_part: str = "") -> int:
        """How many requests with this verb (or any, with "") had `key_part` in their key."""
        with self.lock:
            return sum(verb in ("", seen.verb) and key_part in seen.key for seen in self.seen)

    def forget(self) -> None:
        """Start counting anew, with no fault armed."""
        with self.lock:
            self.seen.clear()
            self.faults.clear()

    def take_fault(self, request: SeenRequest) -> Fault | None:
        with self.lock:
            self.seen.append(request)
            for fault in self.faults:
                if fault.times > 0 and fault.when(request):
                    fault.times -= 1
                    return fault
        return None


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # broken connections are this server's trade


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.upstream = HTTPConnection(urlsplit(self.proxy.upstream_url).netloc, timeout=60)
        with self.proxy.lock:
            self.proxy.sockets.add(self.connection)

    def finish(self) -> None:
        self.upstream.close()
        with self.proxy.lock:
            self.proxy.sockets.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def serve(self) -> None:
        path = urlsplit(self.path)
        key = unquote(path.path).lstrip("/").partition("/")[2]
        seen = SeenRequest(self.command, key, path.query, "If-None-Match" in self.headers)
        body = self._read_body()
        fault = self.proxy.take_fault(seen)
        kind = fault.kind if fault else None
        if kind == "reset_before":
            self._reset()
        elif kind in ("slow_down", "conflict"):
            self._refuse(*ERRORS[kind])
        else:
            if kind == "unconditional":
                del self.headers["If-None-Match"]
            status, headers, answer = self._forward(body)
            if kind == "lost_answer":
                self._reset()
            elif kind == "late_503":
                self._refuse(*ERRORS[kind])
            else:
                if fault and kind == "slow":
                    time.sleep(fault.delay_s)
                self._answer(status, headers, answer, cut=kind == "cut_answer")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = serve

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while num_bytes := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(num_bytes))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        for last_try in (False, True):
            try:
                self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in HOP_HEADERS:
                        self.upstream.putheader(name, value)
                self.upstream.endheaders(body or None)
                answer = self.upstream.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            except (HTTPException, OSError):  # an idle connection that the server has closed
                self.upstream.close()
                if last_try:
                    raise
        raise AssertionError

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool) -> None:
        self.send_response_only(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            if name.lower() not in HOP_HEADERS:
                self.send_header(name, value)
        if "content-length" not in names and status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._reset()

    def _refuse(self, status: int, code: str) -> None:
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>by the fault proxy</Message></Error>'.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """Break the connection with a TCP reset, as a dying machine or a firewall does."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        pass

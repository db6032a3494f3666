"""Who tells us that this machine will vanish, and when: SIGTERM, or the cloud's metadata service.

Off by default: the job turns on what its place offers. Each source answers one question, `notice()`, without blocking
for longer than its own short timeout; PreemptionWatch asks them in a thread of its own and calls back once.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import logging
import signal
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """This machine (or process) will be taken away; `seconds_left` if known."""

    source: str
    action: str
    seconds_left: float | None = None


class NoticeSource(Protocol):
    """Something that may know of the end."""

    def notice(self) -> Notice | None:
        """The notice, or None as long as there is none or nobody answers."""
        ...


@dataclass(frozen=True)
class Ec2Spot:
    """Amazon EC2's interruption notice (IMDSv2), which comes about 120 s before the end."""

    endpoint: str = "http://169.254.169.254"
    timeout_s: float = 1.0

    def notice(self) -> Notice | None:
        token = _ask(self, "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        if token is None:
            return None
        answer = _ask(self, "GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
        if answer is None:
            return None
        try:
            told = json.loads(answer)
            ends_at = datetime.datetime.fromisoformat(told["time"])
        except (ValueError, KeyError, TypeError):
            log.warning("EC2 gave a notice that we cannot read: %.200s", answer)
            return Notice("ec2", "unknown")
        left_s = (ends_at - datetime.datetime.now(datetime.UTC)).total_seconds()
        return Notice("ec2", str(told.get("action", "terminate")), max(0.0, left_s))


@dataclass(frozen=True)
class GceSpot:
    """Google Compute Engine's preemption flag, which turns TRUE about 30 s before the end."""

    endpoint: str = "http://169.254.169.254"
    timeout_s: float = 1.0
    notice_s: float = 30.0

    def notice(self) -> Notice | None:
        answer = _ask(self, "GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return Notice("gce", "terminate", self.notice_s) if answer is not None and answer.strip() == "TRUE" else None


class TerminationSignal:
    """SIGTERM (or others) as a source; made by `on_termination`."""

    def __init__(self) -> None:
        self._received: int | None = None

    def notice(self) -> Notice | None:
        if self._received is None:
            return None
        return Notice("signal", signal.Signals(self._received).name)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        self._received = number


@contextlib.contextmanager
def on_termination(*numbers: signal.Signals) -> Iterator[TerminationSignal]:
    """Catch the signals (SIGTERM by default) until left; only in the main thread.

    A second one of the same kind takes the ordinary way: who asks twice means it.
    """
    source = TerminationSignal()
    before = {number: signal.getsignal(number) for number in numbers or (signal.SIGTERM,)}

    def receive(number: int, frame: FrameType | None) -> None:
        source.receive(number, frame)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, receive)
    try:
        yield source
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class PreemptionWatch:
    """Asks the sources every `interval_s` in a daemon thread and calls `tell` once, with the first notice."""

    def __init__(
        self, sources: Sequence[NoticeSource], tell: Callable[[Notice], None], *, interval_s: float = 5.0
    ) -> None:
        self._sources = sources
        self._tell = tell
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="preemption", daemon=True)

    def __enter__(self) -> PreemptionWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            for source in self._sources:
                if (notice := source.notice()) is not None:
                    log.warning("this machine will be taken away: %s", notice)
                    self._tell(notice)
                    return
            self._stopped.wait(self._interval_s)


def _ask(source: Ec2Spot | GceSpot, verb: str, path: str, headers: dict[str, str]) -> str | None:
    """The body of a 200 answer; None for every other answer, and when nobody is there."""
    address = urllib.parse.urlsplit(source.endpoint)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=source.timeout_s)
    try:
        connection.request(verb, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read(64 * 1024)
        return body.decode(errors="replace") if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()

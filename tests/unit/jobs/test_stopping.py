"""Signals: before the first take they end the command at once, later they are counted and the loop asks."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from jobs.errors import StoppedBeforeStart
from jobs.stopping import StopSwitch, stopped_at_once

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@BOTH
def test_before_the_start_a_signal_ends_the_command_with_four(number: signal.Signals) -> None:
    switch, before = StopSwitch(), signal.getsignal(number)
    with switch.on_signals():
        with pytest.raises(StoppedBeforeStart, match=number.name) as caught, stopped_at_once():
            os.kill(os.getpid(), number)
        assert switch.num_requests == 0
        os.kill(os.getpid(), number)
        assert (switch.num_requests, switch.reason) == (1, number.name)
    assert caught.value.exit_code == 4
    assert signal.getsignal(number) is before


@BOTH
def test_a_library_that_swallows_the_signal_only_delays_the_stop(number: signal.Signals) -> None:
    with pytest.raises(StoppedBeforeStart, match=number.name), stopped_at_once(), contextlib.suppress(BaseException):
        os.kill(os.getpid(), number)


def test_in_another_thread_nothing_changes() -> None:
    found: list[object] = []

    def look() -> None:
        with stopped_at_once():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]

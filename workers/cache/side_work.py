"""Jobs beside a loop, one after another, on a GPU on a stream of their own: who must wait waits on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from workers.streams import stream_for

Wait = Callable[[], None]
"""Lets all that the caller begins from now on wait; returns at once."""


class SideWork(Protocol):
    """A queue of jobs."""

    def run(self, job: Callable[[], None]) -> Wait:
        """Queue a job that begins when all is done that its caller has begun so far, and every job before it."""
        ...

    def finish(self) -> None:
        """Wait, on the host, until all jobs are done."""
        ...


class InTurn:
    """Each job at once: for devices without streams."""

    def run(self, job: Callable[[], None]) -> Wait:
        job()
        return lambda: None

    def finish(self) -> None:
        return


class OnStream:
    """On a CUDA stream of the lowest priority there is: the one that streams have unless they ask for more.

    Args:
        device: Where.
        purpose: All work for one purpose shares a stream.
    """

    def __init__(self, device: torch.device, purpose: str = "beside a loop") -> None:
        self.stream = stream_for(purpose, device)

    def run(self, job: Callable[[], None]) -> Wait:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            job()
            done = self.stream.record_event()
        return lambda: torch.cuda.current_stream(self.stream.device).wait_event(done)

    def finish(self) -> None:
        self.stream.synchronize()


def make_side_work(device: torch.device, purpose: str) -> SideWork:
    return OnStream(device, purpose) if device.type == "cuda" else InTurn()

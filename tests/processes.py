"""Processes that tests have started: found below their parents, ended by their pids."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable

import psutil


def children_of(pids: Iterable[int]) -> list[psutil.Process]:
    """All descendants, in the order of their pids."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            found |= {child.pid: child for child in psutil.Process(pid).children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return [found[pid] for pid in sorted(found)]


def is_alive(process: psutil.Process) -> bool:
    """Not merely waiting to be reaped by whoever has inherited it."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL, and wait."""
    alive = [process for process in processes if is_alive(process)]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    deadline = time.monotonic() + 120
    while any(is_alive(process) for process in alive):
        assert time.monotonic() < deadline, "a killed process lives"
        time.sleep(0.02)


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""

"""WorkerHost: what runs in an actor's process around the worker class; and who that process is on its machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster.log_lines import set_up_logging


@dataclass(frozen=True)
class ProcessIdentity:
    """One process of one machine, safe against pids that are used again."""

    machine: str  # boot id and pid namespace: equal only where a signal can reach
    pid: int
    started: str  # kernel ticks since boot
    node_id: str = ""

    def kill_if_here(self) -> bool:
        """SIGKILL it, if it is on this machine and still the same process."""
        here = identify(self.pid)
        if here is None or (here.machine, here.started) != (self.machine, self.started):
            return False
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended since we looked: Ray kills it, too
            return False
        return True


@dataclass(frozen=True)
class Loaded:
    """What load() of the worker said, and how long the process needed to get there."""

    info: Any
    identity: ProcessIdentity
    load_s: float


def identify(pid: int, node_id: str = "") -> ProcessIdentity | None:
    """Identity of a living process on this machine, None if there is none or /proc does not tell."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else ProcessIdentity(machine, pid, fields[19], node_id)


class WorkerHost:
    """Runs in the actor's process. Calls arrive in three concurrency groups, each with its own threads:

    `load` one, `run` as many as may be in flight, `control` two: so progress() is answered while run() works.

    Args:
        log_facts: What stands in every line that the process logs, as JSON, to its stderr: a file of Ray's.
    """

    def __init__(self, worker_class: type, setup: Any, log_facts: Mapping[str, str]) -> None:
        set_up_logging(json_lines=True, facts=log_facts)
        self._born_at = time.monotonic()
        self._worker_class = worker_class
        self._setup = setup
        self._worker: Any = None

    def identify(self) -> ProcessIdentity:
        node_id = ray.get_runtime_context().get_node_id()
        return identify(os.getpid(), node_id) or ProcessIdentity("unknown", os.getpid(), "", node_id)

    def load(self) -> Loaded:
        worker = self._worker_class(self._setup)
        info = worker.load()
        self._worker = worker
        return Loaded(info, self.identify(), time.monotonic() - self._born_at)

    def run(self, payload: Any) -> Any:
        return self._worker.run(payload)

    def progress(self) -> Any:
        return self._worker.progress()

    def withdraw(self, payload: Any) -> None:
        self._worker.withdraw(payload)

    def drain(self) -> None:
        self._worker.drain()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()

"""The lease: which driver acts for a job. It saves work; safety never rests on it (that is the journal's `begin`).

Epochs are numbered keys decided by put_if_absent. No clock is ever compared between machines: a challenger watches the
holder's counter with its own monotonic clock and takes over when it stands still for `ttl_s`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from cluster.errors import NotFound, OutcomeUnknown
from cluster.object_store import ObjectStore
from jobs.errors import LeaseHeld, LeaseLost

logger = logging.getLogger(__name__)

PREFIX = "_state/leases/"
POLLS_PER_TTL = 6  # a beat is due every third of a ttl: two looks per beat see every change


class Clock(Protocol):
    """Time as the driver sees it; tests have a manual one."""

    def monotonic(self) -> float: ...

    def utc_now(self) -> datetime: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """Real time."""

    def monotonic(self) -> float:
        return time.monotonic()

    def utc_now(self) -> datetime:
        return datetime.now(UTC)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True)
class Owner:
    """Who holds a lease: a driver process, recognisable from another process of the same machine."""

    nonce: str
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    process_start: str

    @classmethod
    def current(cls) -> Owner:
        """This process; every call makes another nonce, so one process may hold several jobs."""
        return cls(
            nonce=uuid.uuid4().hex,
            host=platform.node(),
            boot_id=_read("/proc/sys/kernel/random/boot_id"),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
        )

    def is_dead(self, seen_by: Owner) -> bool:
        """True only if `seen_by` can know it: same boot, same process table, and the process is gone."""
        same_machine = (self.host, self.boot_id, self.pid_namespace) == (
            seen_by.host,
            seen_by.boot_id,
            seen_by.pid_namespace,
        )
        if not same_machine or not self.boot_id or not self.process_start:
            return False
        return _process_start(self.pid) != self.process_start


@dataclass
class Lease:
    """A lease that this process holds."""

    store: ObjectStore
    epoch: int
    owner: Owner
    _beats: int = field(default=0)

    def beat(self) -> None:
        """Show that we live.

        Raises:
            LeaseLost: A later epoch exists.
        """
        self._beats += 1
        self.store.put(_key(self.epoch, "beat"), json.dumps({"beats": self._beats}).encode())
        if self.store.size(_key(self.epoch + 1, "json")) is not None:
            raise LeaseLost(f"another driver holds epoch {self.epoch + 1} of {self.store.url}; ours was {self.epoch}")

    def release(self) -> None:
        """A clean end: the next driver need not wait."""
        self.store.put(_key(self.epoch, "released"), json.dumps({"nonce": self.owner.nonce}).encode())


def acquire(
    store: ObjectStore, owner: Owner, *, clock: Clock, ttl_s: float, takeover: bool = False, min_epoch: int = 1
) -> Lease:
    """Become the driver of the job.

    Args:
        store: The job's root.
        owner: Us.
        clock: Only its monotonic time is used to judge others.
        ttl_s: How long the holder's counter must stand still before it counts as gone.
        takeover: Do not wait for a living holder; it will be fenced by our `begin` entry.
        min_epoch: Lowest epoch to take; above every epoch that a manifest part names, in case `_state/` was deleted.
    Raises:
        LeaseHeld: Another driver lives.
    """
    while True:
        last = last_epoch(store)
        if last and not takeover and not _is_free(store, last, owner):
            _wait_until_silent(store, last, clock, ttl_s)
            if last_epoch(store) != last:
                continue
        epoch = max(last + 1, min_epoch)
        body = asdict(owner) | {"epoch": epoch, "started_at": clock.utc_now().astimezone(UTC).isoformat()}
        if _put(store, _key(epoch, "json"), json.dumps(body).encode()):
            logger.info("lease acquired", extra={"epoch": epoch})
            return Lease(store, epoch, owner)
        takeover = False  # somebody was faster: forcing was meant for the old holder, not for this one


def last_epoch(store: ObjectStore) -> int:
    """The newest epoch that anybody has taken; 0 if none."""
    epochs = [_epoch_of(info.key) for info in store.list(PREFIX) if info.key.endswith(".json")]
    return max(epochs, default=0)


def read_holder(store: ObjectStore) -> dict[str, object] | None:
    """For `status`: the newest lease with `released` added; None before the first."""
    epoch = last_epoch(store)
    if not epoch:
        return None
    body: dict[str, object] = json.loads(store.get(_key(epoch, "json")))
    return body | {"released": store.size(_key(epoch, "released")) is not None, "beats": _beats(store, epoch)}


def _put(store: ObjectStore, key: str, data: bytes) -> bool:
    """put_if_absent until the outcome is known; the bytes carry our nonce, so asking again is safe."""
    while True:
        with contextlib.suppress(OutcomeUnknown):
            return store.put_if_absent(key, data) or store.get(key) == data


def _is_free(store: ObjectStore, epoch: int, challenger: Owner) -> bool:
    if store.size(_key(epoch, "released")) is not None:
        return True
    body = json.loads(store.get(_key(epoch, "json")))
    holder = Owner(**{name: body[name] for name in Owner.__dataclass_fields__})
    return holder.is_dead(challenger)


def _wait_until_silent(store: ObjectStore, epoch: int, clock: Clock, ttl_s: float) -> None:
    """Return after `ttl_s` without a new beat or with a release; raise LeaseHeld on a beat."""
    beats = _beats(store, epoch)
    begun = clock.monotonic()
    while clock.monotonic() - begun < ttl_s:
        clock.sleep(ttl_s / POLLS_PER_TTL)
        if store.size(_key(epoch, "released")) is not None:
            return
        if _beats(store, epoch) != beats:
            body = json.loads(store.get(_key(epoch, "json")))
            raise LeaseHeld(
                f"the job at {store.url} is being rendered by process {body['pid']} on {body['host']} "
                f"(epoch {epoch}, since {body['started_at']}); stop it, or force with --takeover"
            )


def _beats(store: ObjectStore, epoch: int) -> int:
    try:
        return int(json.loads(store.get(_key(epoch, "beat")))["beats"])
    except NotFound:
        return 0


def _key(epoch: int, suffix: str) -> str:
    return f"{PREFIX}{epoch:06d}.{suffix}"


def _epoch_of(key: str) -> int:
    return int(key.removeprefix(PREFIX).split(".")[0])


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # not Linux: then a dead holder is recognised by its silence only
        return ""


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks since boot, or "" if there is none; a reused pid has another."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if not fields or fields[0] in ("Z", "X"):  # a zombie process acts no more
        return ""
    return fields[19]

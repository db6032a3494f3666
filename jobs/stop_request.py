"""The wish that a job stops, as an object that its driver looks for: works from any machine that reaches the store.

A request is meant for one epoch, the driver at work; a later run of the job does not see it.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

from cluster.object_store import ObjectStore
from jobs.lease import last_epoch

PREFIX = "_state/stop/"


def request_stop(store: ObjectStore, reason: str = "longtake cancel") -> int:
    """Ask the driver at work to stop; returns its epoch, 0 if the job never had one."""
    epoch = last_epoch(store)
    if epoch:
        body = {"reason": reason, "at": datetime.now(UTC).isoformat()}
        store.put(_key(epoch), json.dumps(body).encode())
    return epoch


def is_stop_requested(store: ObjectStore, epoch: int) -> bool:
    """Has somebody asked the driver of this epoch to stop?"""
    return store.size(_key(epoch)) is not None


def _key(epoch: int) -> str:
    return f"{PREFIX}{epoch:06d}.json"

"""`longtake doctor`: is everything there that a render needs? Looks, tries, and says what to do."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cluster.errors import ClusterError
from cluster.object_store import open_store, probe_conditional_writes
from cluster.start import connect
from jobs.weights import WEIGHTS_CARD
from workers.config import BUNDLED_WEIGHTS

PACKAGES = ("ray", "torch", "av", "pyarrow", "boto3")
MIN_FREE_GB = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    is_good: bool
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(url: str | None = None, address: str | None = None) -> list[Finding]:
    """Look at this machine and, if named, try the store that a job would write to, and the cluster it would run on."""
    findings = [
        Finding("python", sys.version_info >= (3, 11), f"{platform.python_version()}, needed: 3.11 or newer"),
        *(_package(name) for name in PACKAGES),
        _weights(),
        _disk(),
    ]
    if url is not None:
        findings.append(_tried("store", lambda: _probe(url)))
    if address is not None:
        findings.append(_tried("cluster", lambda: _offers(address)))
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, version(name))
    except PackageNotFoundError:
        return Finding(name, False, "not installed; run `make install`")


def _weights() -> Finding:
    card = BUNDLED_WEIGHTS / WEIGHTS_CARD
    return Finding("bundled weights", card.exists(), str(BUNDLED_WEIGHTS))


def _disk() -> Finding:
    free = shutil.disk_usage("/tmp" if sys.platform != "win32" else ".").free / 1e9  # noqa: S108  (Ray's own place)
    return Finding("temporary disk", free > MIN_FREE_GB, f"{free:.1f} GB free, wanted: {MIN_FREE_GB}")


def _probe(url: str) -> str:
    probe_conditional_writes(open_store(url))
    return f"{url} honours conditional writes"


def _offers(address: str) -> str:
    with connect(address) as cluster:
        found = cluster.resources()
    return f"{address} offers {found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs now"


def _tried(name: str, act: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, act())
    except (ClusterError, ValueError, OSError) as error:
        return Finding(name, False, str(error))

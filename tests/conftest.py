"""What every test gets: one torch thread, the same random numbers, no real credentials, and hypothesis profiles."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import random
import sys
from collections.abc import Iterator

# Before torch or Ray is imported anywhere: on a shared machine two threads are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Clusters that tests start: at Ray's own niceness of 15 an actor stands still while anything else is busy, and when the
# machine's memory is full, of whatever else runs on it, Ray would kill actors.
os.environ |= {"RAY_worker_niceness": "0", "RAY_memory_monitor_refresh_ms": "0"}

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from cluster.log_lines import OURS

SLOW_TIMEOUT_S = 1200
_sessions: list[pytest.Session] = []


@atexit.register  # before Ray and the servers of tests register theirs: it runs when they have
def _leave_without_teardown() -> None:
    """Native threads live on when all tests have passed; one may crash while the interpreter is taken down under it,
    and the run would end with 139.
    """
    if _sessions:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(_sessions[0].exitstatus))


def pytest_sessionstart(session: pytest.Session) -> None:
    _sessions.append(session)
    gc.disable()


def pytest_collection_finish() -> None:
    """What the tests have imported stays to the end: half a million objects that no search for garbage need walk again,
    of which there are dozens, half a second each. While they come, there is no garbage worth a search at all.
    """
    gc.freeze()
    gc.enable()


settings.register_profile(
    "quick", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("thorough", parent=settings.get_profile("quick"), max_examples=1000, derandomize=False)
settings.load_profile(os.environ.get("LONGTAKE_HYPOTHESIS", "quick"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes minutes where nothing else runs may take four times as long elsewhere."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same numbers in every run, whichever tests the same worker has run before: fixtures draw after this, too."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_real_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test can never reach a real account: the default chain finds only these."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """Commands that run inside a test set up logging for their process; the next test must not inherit it."""
    before = {name: (log.handlers, log.propagate, log.level) for name in OURS if (log := logging.getLogger(name))}
    yield
    for name, (handlers, propagate, level) in before.items():
        log = logging.getLogger(name)
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)

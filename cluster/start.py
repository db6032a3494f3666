"""Connect to the Ray cluster we were told of, or start a local one; the only reader of environment variables.

A local cluster is ours alone: its token, logs and sockets live in one short temporary folder (that of a killed driver
is removed by the next start), nothing is written to the user's home, no telemetry is sent. Ray's servers listen on all
interfaces whatever they are told, so a token is not optional.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import RayError

from cluster.errors import ClusterUnreachable
from cluster.owned_folder import OwnedFolder

log = logging.getLogger(__name__)

AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
# Ray starts actors at niceness 15, where a render yields to whatever wakes up on the machine, Ray's own daemons first.
SAME_PRIORITY = {"RAY_worker_niceness": "0"}
AUTH_HINT = (
    "If that cluster asks for a token (Ray turns this on by itself after any local run), "
    "`export RAY_AUTH_MODE=token` and try again"
)
CONNECT_TIMEOUT_S = 5.0  # Ray itself would try for 122 s and then end the process
FOLDER_PREFIX = "lt-"
SHORT_TMP = Path("/tmp")  # noqa: S108  (Ray's socket paths must fit in 107 bytes)
TOKEN_FILE = "token"  # noqa: S105  (its name)


@dataclass(frozen=True)
class LocalSize:
    """What a local cluster offers. None leaves it to Ray, which counts the real cores and GPUs.

    `num_gpus` may exceed the real ones: they are then only a way to place actors.
    """

    num_cpus: float | None = None
    num_gpus: float | None = None
    object_store_bytes: int = 128 << 20  # rows and ids pass through it, never frames


class _StartTimedOut(ClusterUnreachable):
    pass


class RayCluster:
    """A connection to be closed. What we have started ends then; what we have found stays."""

    def __init__(self, address: str, folder: OwnedFolder | None, restore: contextlib.ExitStack) -> None:
        self.address = address
        self._folder = folder
        self._restore = restore

    @property
    def temp_folder(self) -> Path | None:
        """Where Ray's logs, sockets and the token of a cluster of ours are."""
        return None if self._folder is None else self._folder.path

    @property
    def is_ours(self) -> bool:
        return self._folder is not None

    def resources(self) -> dict[str, float]:
        """What all nodes together offer now, by Ray's names: CPU, GPU, memory ..."""
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        return total

    def close(self, *, keep_logs: bool = False) -> None:
        """Disconnect; end a cluster of ours and remove its folder, unless its logs are wanted."""
        ray.shutdown()
        self._restore.close()
        if self._folder is not None and keep_logs:
            (self._folder.path / TOKEN_FILE).unlink(missing_ok=True)
            self._folder.keep()
            log.warning("Ray's logs are kept in %s", self._folder.path)
        elif self._folder is not None:
            self._folder.remove()

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(keep_logs=isinstance(error, Exception))


def connect(address: str | None = None, *, local: LocalSize | None = None, with_dashboard: bool = False) -> RayCluster:
    """Connect to `address`, else to RAY_ADDRESS, else start a local cluster (always with address "local").

    Raises:
        ClusterUnreachable: Nobody answers there, or not to our token; the message says what to do.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    if target.startswith(("http://", "https://")):
        raise ClusterUnreachable(
            f"{target} is the address of the job API, not of a cluster: send the work there with "
            "`ray job submit --address ...`, or give HOST:6379 of the head node"
        )
    if target.startswith("ray://"):
        raise ClusterUnreachable(f"{target}: Ray Client addresses are not supported; run on the head node instead")
    if target == "local":
        return _start_local(local or LocalSize(), with_dashboard)
    _check_somebody_listens(target)
    with contextlib.ExitStack() as undo:
        undo.enter_context(_environment(QUIET))
        return RayCluster(_init(target, address=target), None, undo.pop_all())


def ray_job_id() -> str | None:
    """Submission id of the Ray job that this process is the driver of, or None when it was not submitted.

    Its working folder is then a copy inside Ray's session folder: relative output paths would vanish with it.
    """
    config = os.environ.get(JOB_CONFIG)
    if not config:
        return None
    return str(json.loads(config).get("metadata", {}).get("job_submission_id", "unknown"))


@contextlib.contextmanager
def private_token(folder: Path) -> Iterator[None]:
    """Until left, Ray clusters that this process starts want a token which only a file in `folder` (mode 0600) holds.

    An explicit RAY_AUTH_MODE and a token that the environment brings are respected.
    """
    wanted: dict[str, str] = {}
    if AUTH_MODE not in os.environ:
        wanted[AUTH_MODE] = "token"
    is_on = os.environ.get(AUTH_MODE, "token").lower() == "token"
    if is_on and AUTH_TOKEN not in os.environ and AUTH_TOKEN_PATH not in os.environ:
        token = folder / TOKEN_FILE
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        wanted[AUTH_TOKEN_PATH] = str(token)
    try:
        with _environment(wanted):
            _reread_auth()
            yield
    finally:
        _reread_auth()


def _reread_auth() -> None:
    """Ray reads RAY_AUTH_MODE once, when it is imported: let it look again.

    Private to Ray (2.60 does the same where it turns tokens on by itself); tests/integration/test_start.py fails when
    it moves. The mode is read first: a thread that still talks must not miss a token that it thinks it needs.
    """
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _start_local(size: LocalSize, with_dashboard: bool) -> RayCluster:
    """Twice, because Ray gives its own processes 30 s to come up, which a busy machine may not keep."""
    try:
        return _start_once(size, with_dashboard)
    except _StartTimedOut as error:
        log.warning("%s; once more", error)
        return _start_once(size, with_dashboard)


def _start_once(size: LocalSize, with_dashboard: bool) -> RayCluster:
    start = time.monotonic()
    folder = OwnedFolder(FOLDER_PREFIX, SHORT_TMP if SHORT_TMP.is_dir() else None)
    try:
        with contextlib.ExitStack() as undo:
            undo.enter_context(_environment(QUIET | SAME_PRIORITY))
            undo.enter_context(private_token(folder.path))
            address = _init(
                "a local cluster",
                address="local",
                num_cpus=size.num_cpus,
                num_gpus=size.num_gpus,
                object_store_memory=size.object_store_bytes,
                include_dashboard=with_dashboard,
                dashboard_host="127.0.0.1",
                _temp_dir=str(folder.path),
            )
            log.info("local Ray cluster started in %.1f s; its logs are in %s", time.monotonic() - start, folder.path)
            return RayCluster(address, folder, undo.pop_all())
    except BaseException:  # a signal, too, may end the wait
        ray.shutdown()
        folder.remove()
        raise


def _init(what: str, **options: Any) -> str:
    """ray.init; returns the address of the cluster's head."""
    try:
        ray.init(log_to_driver=False, configure_logging=False, **options)
    except (ConnectionError, RayError, RuntimeError, ValueError, OSError, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:  # Ray has put its own handler before ours
            raise KeyboardInterrupt from error
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ClusterUnreachable(f"cannot connect to {what}: {first_line}. {AUTH_HINT}") from error
    except Exception as error:
        if type(error) is not Exception:  # Ray has no type of its own for "timed out during startup"
            raise
        raise _StartTimedOut(f"cannot start {what}: {error}") from error
    return str(ray.get_runtime_context().gcs_address)


def _check_somebody_listens(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto", or something that Ray explains quickly
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"nobody answers at {address} ({error}); is the head node up, and is this its GCS address (port 6379)?"
        ) from error

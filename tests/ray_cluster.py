"""Real Ray clusters on this machine for tests, ended by their pids: several nodes with logical GPUs, or a user's head.

Ray gives its processes 30 s to come up, which a busy machine may not keep, and takes ports by number, which somebody
else may have taken meanwhile; so what does not come up is begun anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.start import private_token
from tests.processes import end, title_of
from tests.servers import free_port, somebody_listens

T = TypeVar("T")
NUM_TRIES = 3
PATIENCE_S = 240.0
RAY_PROGRAM = str(Path(sys.executable).with_name("ray"))


@contextlib.contextmanager
def ray_cluster(num_nodes: int = 2, *, gpus_per_node: float = 1, cpus_per_node: float = 2) -> Iterator[Cluster]:
    """A connected cluster: a head without CPUs, and `num_nodes` nodes. Nothing of it outlives the block."""
    folder = Path(tempfile.mkdtemp(prefix="ltr-", dir="/tmp"))
    (folder / "ray").mkdir()
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        undo.callback(lambda: end(processes_of(folder, "ray::", str(folder))))
        patch = undo.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("RAY_TMPDIR", str(folder))  # temp_dir alone leaves Ray's address file in the common /tmp/ray
        patch.setenv("RAY_gcs_server_port_wait_time_s", f"{PATIENCE_S:g}")
        undo.enter_context(private_token(folder))
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
        cluster = again_if_late(lambda: Cluster(initialize_head=True, head_node_args=head))
        undo.callback(cluster.shutdown)
        undo.callback(ray.shutdown)
        for _ in range(num_nodes):
            add_node(cluster, gpus_per_node=gpus_per_node, cpus_per_node=cpus_per_node)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        cluster.wait_for_nodes(PATIENCE_S)
        yield cluster


def add_node(cluster: Cluster, *, gpus_per_node: float = 1, cpus_per_node: float = 2, **more: Any) -> Any:
    """One more node, which the cluster knows by now."""
    folder = Path(os.environ["RAY_TMPDIR"])
    before = {raylet.pid for raylet in processes_of(folder, "raylet/raylet ")}

    def start() -> Any:
        try:
            return cluster.add_node(
                wait=False,  # Ray waits already, for longer
                num_cpus=cpus_per_node,
                num_gpus=gpus_per_node,
                object_store_memory=80 << 20,
                **more,
            )
        except BaseException:  # it may yet come up, and nobody would know of it
            end(raylet for raylet in processes_of(folder, "raylet/raylet ") if raylet.pid not in before)
            raise

    return again_if_late(start)


def again_if_late(start: Callable[[], T]) -> T:
    """What has come up, at the third try at the latest."""
    for _ in range(NUM_TRIES - 1):
        try:
            return start()
        except Exception as error:
            is_late = isinstance(error, TimeoutError | RuntimeError) or type(error) is Exception  # Ray has no own type
            if not is_late:
                raise
    return start()


@contextlib.contextmanager
def ray_head(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """`ray start --head` as a user would; its GCS address and the URL of its job API. Ended by its pids."""
    for number in range(NUM_TRIES):
        folder = Path(tempfile.mkdtemp(prefix="lth-", dir="/tmp"))  # short: Ray's socket paths must fit in 107 bytes
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            undo.callback(lambda folder=folder: end(processes_of(folder)))
            try:
                addresses = _start_head(folder, environment)
            except (subprocess.SubprocessError, TimeoutError):
                if number == NUM_TRIES - 1:
                    raise
                continue
            yield addresses
            return


def _start_head(folder: Path, environment: Mapping[str, str]) -> tuple[str, str]:
    port, dashboard_port = free_port(), free_port()
    command = [
        RAY_PROGRAM, "start", "--head", "--port", str(port), "--dashboard-host", "127.0.0.1",
        "--dashboard-port", str(dashboard_port), "--num-cpus", "2", "--disable-usage-stats",
        "--temp-dir", str(folder), "--object-store-memory", str(80 << 20),
        # The default is one port for the whole machine: beside another head, this one would come up without job API.
        "--dashboard-agent-listen-port", str(free_port()),
    ]  # fmt: skip
    variables = {**environment, "RAY_TMPDIR": str(folder)}
    subprocess.run(command, env=variables, check=True, capture_output=True, timeout=PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while not somebody_listens(dashboard_port):
        if time.monotonic() > deadline:
            raise TimeoutError("the job API did not come up")
        time.sleep(0.1)
    return f"{socket.gethostbyname(socket.gethostname())}:{port}", f"http://127.0.0.1:{dashboard_port}"


def processes_of(folder: Path, *words: str) -> list[psutil.Process]:
    """Those that were started with this folder as Ray's, and have one of the words (or any) in their command.

    Workers whose raylet was killed belong to nobody, and `ray stop` would end those of everybody.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_TMPDIR") == str(folder):
                command = title_of(process)
                if not words or any(word in command for word in words):
                    found.append(process)
    return found

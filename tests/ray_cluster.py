"""A real Ray cluster of several nodes on this machine, with logical GPUs, for tests; ended by its own pids."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.start import private_token


@contextlib.contextmanager
def ray_cluster(num_nodes: int = 2, *, gpus_per_node: float = 1, cpus_per_node: float = 2) -> Iterator[Cluster]:
    """A connected cluster: a head without CPUs, and `num_nodes` nodes. Nothing of it outlives the block."""
    folder = Path(tempfile.mkdtemp(prefix="ltr-", dir="/tmp"))
    (folder / "ray").mkdir()
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        undo.callback(kill_ray_processes_of, folder)
        patch = undo.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("RAY_TMPDIR", str(folder))  # temp_dir alone leaves Ray's address file in the common /tmp/ray
        undo.enter_context(private_token(folder))
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        undo.callback(cluster.shutdown)
        undo.callback(ray.shutdown)
        for _ in range(num_nodes):
            add_node(cluster, gpus_per_node=gpus_per_node, cpus_per_node=cpus_per_node)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        cluster.wait_for_nodes()
        yield cluster


def add_node(cluster: Cluster, *, gpus_per_node: float = 1, cpus_per_node: float = 2) -> object:
    return cluster.add_node(num_cpus=cpus_per_node, num_gpus=gpus_per_node, object_store_memory=80 << 20)


def kill_ray_processes_of(folder: Path) -> None:
    """Workers whose raylet was killed belong to nobody; they are known by the folder in their environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if process.environ().get("RAY_TMPDIR") == str(folder) and ("ray::" in command or str(folder) in command):
                process.kill()

"""Real S3 servers for tests: moto in its own process, and a one-node Ceph gateway where radosgw is installed.

`shared_moto()` and `shared_ceph()` start theirs once per test process and end it, by its pids, when that ends.
The fault proxy that can stand before either is in `fault_proxy.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3.session
import pytest
from botocore.config import Config

from tests.fault_proxy import FaultProxy

ACCESS_KEY, SECRET_KEY = "test", "testsecret"
PATIENCE_S = 240.0
"""How long a server may take to come up on a machine with other things to do."""
MOTO_LISTENS = re.compile(r"Running on (http://127\.0\.0\.1:\d+)\b")
CEPH_PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "monmaptool", "ceph")
CEPH_MARKS = [
    pytest.mark.ceph,
    pytest.mark.slow,  # 13 s to come up, and 600 MB, in each process that runs tests
    pytest.mark.skipif(not all(map(shutil.which, CEPH_PROGRAMS)), reason="radosgw is not installed"),
]


class EndedEarly(RuntimeError):
    """A server's process is over before it was used."""


@dataclass
class S3Server:
    """A running server; `stop` ends the processes that it consists of, and nothing else."""

    name: str
    url: str
    processes: list[subprocess.Popen[bytes]]
    folder: Path

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_bucket(self) -> str:
        """A bucket nobody else uses."""
        bucket = f"longtake-{secrets.token_hex(4)}"
        client_of(self.url).create_bucket(Bucket=bucket)
        return bucket


@functools.cache
def client_of(url: str) -> Any:
    """A plain boto3 client, which costs a fifth of a second to make."""
    session = boto3.session.Session(aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY)
    client = session.client("s3", endpoint_url=url, region_name="us-east-1", config=path_style())
    atexit.register(client.close)
    return client


def path_style() -> Config:
    return Config(s3={"addressing_style": "path"})


def use_endpoint(monkeypatch: pytest.MonkeyPatch, server: S3Server | FaultProxy) -> None:
    """Let everything that reads AWS's variables in this test talk to the server (or the proxy before it)."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)


@functools.cache
def shared_moto() -> S3Server:
    server = start_moto()
    atexit.register(server.stop)
    return server


@functools.cache
def shared_ceph() -> S3Server:
    server = start_ceph()
    atexit.register(server.stop)
    return server


def start_moto() -> S3Server:
    """The kernel gives it a port that it says: one that we had picked could be somebody else's by now."""
    folder = Path(tempfile.mkdtemp(prefix="lt-moto-"))
    log = folder / "out"
    process = _spawn([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"], log)
    server = S3Server("moto", "", [process], folder)
    _wait_until(lambda: _is_alive(server) and MOTO_LISTENS.search(log.read_text(errors="replace")) is not None)
    listens = MOTO_LISTENS.search(log.read_text(errors="replace"))
    assert listens is not None
    server.url = listens[1]
    return server


def start_ceph() -> S3Server:
    """Monitor, one in-memory OSD and radosgw on loopback: 12 s, 600 MB; no root, no configuration outside `folder`."""
    folder = Path(tempfile.mkdtemp(prefix="lt-ceph-", dir="/tmp"))  # short: its sockets' paths have 107 bytes
    port, monitor_port = free_port(), free_port()
    cluster_id, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
    conf = folder / "ceph.conf"
    for name in ("mon", "osd", "rgw", "run", "log"):
        (folder / name).mkdir()
    conf.write_text(_ceph_conf(folder, cluster_id, port, monitor_port))
    server = S3Server("ceph", f"http://127.0.0.1:{port}", [], folder)

    def tool(*command: str) -> str:
        env = _ceph_env(conf)
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def daemon(*command: str) -> None:
        server.processes.append(_spawn([*command, "-f", "--conf", str(conf)], folder / "log" / command[0], conf))

    try:
        address = f"[v2:127.0.0.1:{monitor_port}]"
        tool("monmaptool", "--create", "--addv", "a", address, "--fsid", cluster_id, str(folder / "monmap"))
        tool("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"), "--conf", str(conf))
        daemon("ceph-mon", "-i", "a")
        _wait_until(lambda: "mon:" in tool("ceph", "-s", "--connect-timeout", "5"))
        tool("ceph", "osd", "new", osd_id)
        tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id, "--conf", str(conf))
        daemon("ceph-osd", "-i", "0")
        _wait_until(lambda: "1 up" in tool("ceph", "osd", "stat"))
        daemon("radosgw", "-n", "client.rgw")
        _wait_until(lambda: _is_alive(server) and somebody_listens(port))
        tool(
            "radosgw-admin", "user", "create", "--uid=test", "--display-name=test",
            f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}",
        )  # fmt: skip
    except BaseException:
        server.stop()
        raise
    return server


def _ceph_conf(folder: Path, cluster_id: str, port: int, monitor_port: int) -> str:
    return f"""
[global]
fsid={cluster_id}
mon_host=[v2:127.0.0.1:{monitor_port}/0]
public_network=127.0.0.0/8
auth_cluster_required=none
auth_service_required=none
auth_client_required=none
osd_pool_default_size=1
osd_pool_default_min_size=1
osd_pool_default_pg_num=8
osd_pool_default_pg_autoscale_mode=off
osd_crush_chooseleaf_type=0
mon_allow_pool_size_one=true
mon_data_avail_crit=1
run_dir={folder}/run
admin_socket={folder}/run/$cluster-$name.asok
log_file={folder}/log/$name.log
mon_data={folder}/mon
osd_data={folder}/osd
osd_objectstore=memstore
memstore_device_bytes=2147483648
osd_class_load_list=*
osd_class_default_list=*
rgw_frontends=beast endpoint=127.0.0.1:{port}
rgw_thread_pool_size=32
rgw_enable_usage_log=false
rgw_dns_name=
ms_bind_ipv4=true
ms_mon_client_mode=crc
ms_client_mode=crc
"""


def _ceph_env(conf: Path) -> dict[str, str]:
    return {**os.environ, "CEPH_CONF": str(conf), "CEPH_ARGS": f"--conf {conf}"}


def free_port() -> int:
    """A port that is free at this moment; for servers that cannot be told to pick one themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def silent_port() -> Iterator[int]:
    """A port on which nobody listens and, for the time of the block, nobody can."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def somebody_listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _spawn(command: list[str], log_path: Path, ceph_conf: Path | None = None) -> subprocess.Popen[bytes]:
    """A child that also ends when the test process is killed, where util-linux can arrange it."""
    with_parent = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    env = _ceph_env(ceph_conf) if ceph_conf else dict(os.environ)
    with log_path.open("wb") as log:
        return subprocess.Popen([*with_parent, *command], stdout=log, stderr=subprocess.STDOUT, env=env)


def _is_alive(server: S3Server) -> bool:
    if (code := server.processes[-1].poll()) is not None:
        raise EndedEarly(f"{server.name} ended with {code}; see its output in {server.folder}")
    return True


def _wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if is_true():
                return
            error = None
        except EndedEarly:
            raise
        except (RuntimeError, subprocess.TimeoutExpired) as raised:
            error = raised
        if time.monotonic() > deadline:
            raise TimeoutError("the server did not come up") from error
        time.sleep(0.1)

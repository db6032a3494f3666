"""Starting, finding and submitting to real Ray clusters: whose token, whose home, and what is said when it fails."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from cluster.errors import ClusterUnreachable, NotFound
from cluster.job_client import JobClient, Submission
from cluster.start import LocalSize, connect, private_token, ray_job_id
from cluster.telemetry import Telemetry
from tests.ray_cluster import ray_head
from tests.servers import silent_port

AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of our own, and no word of Ray in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in AUTH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def test_a_local_cluster_keeps_to_its_own_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    with connect(local=LocalSize(num_cpus=1, num_gpus=3)) as cluster:
        folder = cluster.temp_folder
        assert cluster.is_ours
        assert folder is not None
        assert len(str(folder)) < 30
        token = folder / "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert len(token.read_text()) == 64
        assert cluster.resources()["GPU"] == 3
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert ray.get(ray.remote(niceness).remote()) == os.nice(0), "work on a local cluster yields to nobody"
        check_metrics_are_exported()
    assert list(home.iterdir()) == []
    assert not folder.exists()
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.alone
def test_the_folder_of_a_killed_driver_is_removed_by_the_next_start(home: Path) -> None:
    code = (
        "import os; from cluster.start import LocalSize, connect\n"
        "print(connect(local=LocalSize(num_cpus=1)).temp_folder, flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    assert killed.returncode == -9
    left = Path(killed.stdout.strip())
    assert (left / "token").exists()
    with connect(local=LocalSize(num_cpus=1)) as cluster:
        assert not left.exists()
        assert cluster.temp_folder is not None
    assert not cluster.temp_folder.exists()


def niceness() -> int:
    return os.nice(0)


def check_metrics_are_exported() -> None:
    """What ray.util.metrics makes of our names, as a Prometheus server would read it."""
    telemetry = Telemetry(job="j1", model="tiny")
    telemetry.count("longtake_videos_total", 3, status="succeeded")
    telemetry.gauge("longtake_queue_items", 7)
    telemetry.observe("longtake_chunk_seconds", 0.2)
    port = next(node["MetricsExportPort"] for node in ray.nodes())
    address = next(node["NodeManagerAddress"] for node in ray.nodes())
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}:{port}/metrics") as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_longtake_")]
            if any(line.startswith("ray_longtake_queue_items") for line in lines):
                break
        assert time.monotonic() < deadline, "no metric of ours was exported"
        time.sleep(0.5)
    text = "\n".join(lines)
    assert 'job="j1"' in text
    assert 'status="succeeded"' in text
    assert any(line.startswith("ray_longtake_videos_total{") and line.endswith(" 3.0") for line in lines), text
    assert any(line.startswith("ray_longtake_chunk_seconds_bucket") for line in lines)


def test_an_address_without_a_cluster_is_refused_in_seconds(home: Path) -> None:
    start = time.monotonic()
    with silent_port() as port:
        for address in (f"127.0.0.1:{port}", "no address", "ray://127.0.0.1:10001", "http://127.0.0.1:8265"):
            with pytest.raises(ClusterUnreachable):
                connect(address)
    assert time.monotonic() - start < 120  # Ray itself would try for 122 s, for each


def test_ray_address_is_taken_when_none_is_given(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with silent_port() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(ClusterUnreachable, match=f"127.0.0.1:{port}"):
            connect()


def test_outside_a_ray_job_there_is_no_job_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert ray_job_id() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    assert ray_job_id() == "raysubmit_1"


def test_nobody_at_the_job_api_is_unreachable(home: Path) -> None:
    with silent_port() as port, pytest.raises(ClusterUnreachable, match="job API"):
        JobClient(f"http://127.0.0.1:{port}")


@pytest.mark.slow
@pytest.mark.alone
def test_a_users_head_takes_jobs_and_drivers_with_its_token_only(home: Path) -> None:
    with private_token(home), ray_head(environment()) as (address, api):
        for script in (
            f"from cluster.start import connect; connect({address!r}).close()",
            f"from cluster.job_client import JobClient; JobClient({api!r})",
        ):
            run = [sys.executable, "-c", script]
            without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
            refused = subprocess.run(run, env=without, capture_output=True, text=True, timeout=240, check=False)
            assert refused.returncode == 1
            assert "ClusterUnreachable" in refused.stderr
            assert "export RAY_AUTH_MODE=token" in refused.stderr
            subprocess.run(run, capture_output=True, timeout=240, check=True)
        check_jobs(api)


def environment() -> dict[str, str]:
    """Ours, with the interpreter of these tests in front."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def check_jobs(api: str) -> None:
    client = JobClient(api)
    script = "import os, json; print(json.loads(os.environ['RAY_JOB_CONFIG_JSON_ENV_VAR'])['metadata'])"
    first = client.submit(Submission(f'python -c "{script}"', metadata={"longtake_job": "night"}))
    wait_until_over(client, first)
    assert client.status(first).status == "succeeded"
    assert f"'job_submission_id': '{first}'" in client.logs(first)
    second = client.submit(Submission("sleep 600", submission_id="longtake-chosen"))
    assert second == "longtake-chosen"
    assert client.stop(second)
    wait_until_over(client, second)
    assert client.status(second).status == "stopped"
    with pytest.raises(NotFound):
        client.status("no-such-job")


def wait_until_over(client: JobClient, submission_id: str) -> None:
    deadline = time.monotonic() + 180
    while not client.status(submission_id).is_over:
        assert time.monotonic() < deadline
        time.sleep(0.3)

"""`ray job submit` against a real head: the same command, the manifest at the end, no output lost in Ray's folder."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import longtake
from tests.bench.first_video import has_success
from tests.ray_cluster import RAY_PROGRAM, ray_head

ROOT = Path(__file__).parents[2]
RENDER = ["-m", "jobs.render", "--model", "tiny-test", "--width", "64", "--height", "32", "--frames", "24"]
Done = subprocess.CompletedProcess[str]
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(2400)]


@dataclass
class Head:
    """A Ray head of our own, with its environment for those who talk to it."""

    address: str
    environment: dict[str, str]

    def submit(self, *arguments: str, timeout_s: float = 1200) -> Done:
        """Submit and wait; tries again while the head's agent is still coming up (it answers 500 then)."""
        return self._submit([], arguments, timeout_s)

    def start(self, submission_id: str, *arguments: str) -> None:
        """Submit and come back."""
        done = self._submit(["--no-wait", "--submission-id", submission_id], arguments, 600)
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self, submission_id: str) -> str:
        """`ray job stop`, which waits until the job is over; what it prints."""
        return self._ray("job", "stop", "--address", self.address, submission_id, timeout_s=600).stdout

    def _submit(self, options: list[str], arguments: tuple[str, ...], timeout_s: float) -> Done:
        command = ["job", "submit", "--address", self.address, "--working-dir", ".", *options, "--", "python"]
        for _ in range(24):
            done = self._ray(*command, *arguments, timeout_s=timeout_s)
            if "No available agent" not in done.stdout + done.stderr:
                return done
            time.sleep(5)
        return done

    def _ray(self, *arguments: str, timeout_s: float) -> Done:
        return subprocess.run(
            [RAY_PROGRAM, *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    token = tmp_path_factory.mktemp("secret") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # from SIGTERM to SIGKILL; infra/kuberay/rayjob.yaml sets it too
    }
    with ray_head(environment) as (_, api):
        yield Head(api, environment)


def test_a_submitted_job_renders_and_a_relative_out_is_refused(head: Head, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a meadow", "id": "a"}\n{"prompt": "a desert", "id": "b", "mood": "dry"}\n')
    refused = head.submit(*RENDER, str(prompts), "--out", "out")
    assert refused.returncode == 1  # Ray's client says 1 for whatever the driver said
    assert "out: 'out' is relative" in refused.stdout + refused.stderr

    done = head.submit(*RENDER, str(prompts), "--out", str(tmp_path / "out"), "--job-id", "night", "--actors", "2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "to go on after a stop or a crash: python -m jobs.render" in done.stdout
    table = longtake.open_manifest(tmp_path / "out" / "night").to_table().sort_by("item_id")
    assert table["item_id"].to_pylist() == ["a", "b"]
    assert table["mood"].to_pylist() == [None, "dry"]
    assert longtake.verify(tmp_path / "out" / "night").is_good

    again = head.submit(*RENDER, str(prompts), "--out", str(tmp_path / "out"), "--job-id", "night")
    assert again.returncode == 0
    assert longtake.read_status(tmp_path / "out" / "night").num_parts == 1


def test_a_stopped_job_says_so_and_the_same_command_goes_on(head: Head, tmp_path: Path) -> None:
    names = [f"take{index:02d}" for index in range(10)]
    prompts, job = tmp_path / "p.jsonl", tmp_path / "out" / "night"
    prompts.write_text("".join(json.dumps({"prompt": f"a meadow {name}", "id": name}) + "\n" for name in names))
    command = [*RENDER, str(prompts), "--out", str(tmp_path / "out"), "--job-id", "night", "--actors", "1"]
    command[command.index("--frames") + 1] = "480"
    head.start("longtake-night", *command)
    deadline = time.monotonic() + 600
    while not has_success(job):
        assert time.monotonic() < deadline, "nothing was committed"
        time.sleep(0.05)
    assert "was stopped" in head.stop("longtake-night")

    result = json.loads((job / "_result.json").read_text())
    assert (result["status"], result["exit_code"], result["is_resumable"]) == ("stopped", 4, True)
    assert "SIGTERM" in result["reason"]
    assert not (job / "_SUCCESS").exists()
    stopped_at = longtake.open_manifest(job).count_rows()
    assert 1 <= stopped_at < len(names), "what was finished is published, the rest is not lost but missing"

    again = head.submit(*command)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    table = longtake.open_manifest(job).to_table(columns=["item_id", "epoch"]).to_pylist()
    assert sorted(row["item_id"] for row in table) == names
    assert sum(row["epoch"] == 1 for row in table) == stopped_at, "what was committed is not rendered again"
    assert longtake.verify(job).is_good

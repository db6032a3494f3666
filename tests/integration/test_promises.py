"""Promises that hold over whole jobs: placement never shows in the frames, requests stay few, seconds add up."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import longtake
from tests.bench.requests import GOAL_PER_VIDEO, NUM_SEGMENTS, count_requests
from tests.killed_jobs import actors_of
from tests.servers import shared_moto

ROOT = Path(__file__).parents[2]
TINY = ["--model", "tiny-test", "--width", "64", "--height", "32", "--actors-cpus-per-actor", "0.25", "--no-sheet"]
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(2400)]
NUM_TRIES = 4


def start(prompts: Path, out: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.render", str(prompts), "--out", out, "--job-id", "night", *TINY, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(driver: subprocess.Popen[str]) -> str:
    text, _ = driver.communicate(timeout=1000)
    assert driver.returncode == 0, text[:3000] + text[-3000:]
    return text


def write_prompts(path: Path, num_items: int, *, shuffle_seed: int | None = None) -> Path:
    lines = [json.dumps({"id": f"take-{n}", "prompt": f"a meadow number {n}", "samples": 2}) for n in range(num_items)]
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(lines)
    path.write_text("\n".join(lines) + "\n")
    return path


def frame_hashes(job: Path | str) -> dict[tuple[str, int], str]:
    columns = ["item_id", "sample_index", "frames_sha256"]
    rows = longtake.open_manifest(job).to_table(columns=columns).to_pylist()
    hashes = {(row["item_id"], row["sample_index"]): row["frames_sha256"] for row in rows}
    assert len(hashes) == len(rows)
    return hashes


def kill_some_actors(driver: subprocess.Popen[str], num_kills: int) -> int:
    """SIGKILL to processes that are inside `run` (Ray shows it in their title), one after the other."""
    killed: set[int] = set()
    while len(killed) < num_kills and driver.poll() is None:
        for actor in actors_of([driver.pid], doing=".run"):
            if actor.pid not in killed:
                with contextlib.suppress(psutil.NoSuchProcess):
                    actor.kill()
                    killed.add(actor.pid)
                break
        time.sleep(0.05)
    return len(killed)


def test_frames_do_not_depend_on_actors_order_or_kills(tmp_path: Path) -> None:
    plain = write_prompts(tmp_path / "plain.jsonl", 6)
    shuffled = write_prompts(tmp_path / "shuffled.jsonl", 6, shuffle_seed=3)
    finish(start(plain, f"{tmp_path}/one", "--frames", "60", "--actors", "1"))
    expected = frame_hashes(tmp_path / "one/night")
    assert len(expected) == 12
    assert len(set(expected.values())) == 12  # every take is another one

    finish(start(shuffled, f"{tmp_path}/two", "--frames", "60", "--actors", "2"))
    assert frame_hashes(tmp_path / "two/night") == expected

    for number in range(NUM_TRIES):  # where this process is starved, a job may end before anybody was killed
        out = f"{tmp_path}/four-{number}"
        driver = start(shuffled, out, "--frames", "60", "--actors", "4")
        num_killed = kill_some_actors(driver, 2)
        finish(driver)
        assert frame_hashes(f"{out}/night") == expected
        assert longtake.verify(f"{out}/night", sweep=True).is_good
        if num_killed:
            return
    raise AssertionError("each time the job had ended before anybody was killed")


def test_requests_per_video_are_few_and_nothing_is_listed_meanwhile() -> None:
    counts = count_requests(shared_moto())
    assert counts.all_per_video <= GOAL_PER_VIDEO + NUM_SEGMENTS, counts
    assert counts.per_video("LIST") == 0


def test_gpu_seconds_by_cause_add_up_to_the_time_held(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 4)
    driver = start(prompts, str(tmp_path), "--frames", "60", "--actors", "2")
    kill_some_actors(driver, 1)
    finish(driver)
    result = json.loads((tmp_path / "night/_result.json").read_text())
    assert sum(result["gpu_seconds"].values()) == pytest.approx(result["held_s"], rel=0.01)
    assert result["gpu_seconds"]["useful"] > 0
    assert result["gpu_seconds"]["load"] > 0

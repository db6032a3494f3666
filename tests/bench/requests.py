"""How many requests a video costs on S3, counted by a proxy before a real server; real renders of 2 and of 10 takes.

    python -m tests.bench.requests

What a job costs once (preflight, lease, closing records, report) cancels out in the difference. Beats of the lease come
by the clock, not by the video, and are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.bench.record import ROOT, report
from tests.fault_proxy import FaultProxy, SeenRequest
from tests.servers import ACCESS_KEY, SECRET_KEY, S3Server, shared_moto

NUM_FRAMES, NUM_SEGMENTS, SAMPLES = 60, 2, 2  # the first chunk, then up to 48 frames
ITEMS = (1, 5)
GOAL_PER_VIDEO = 12
VERBS = ("PUT", "GET", "HEAD", "POST", "DELETE", "LIST")
TINY = ["--model", "tiny-test", "--width", "64", "--height", "32", "--actors-cpus-per-actor", "0.25", "--no-sheet"]


@dataclass(frozen=True)
class Counts:
    """Requests of two jobs by verb; the second one has so many videos more."""

    small: Mapping[str, int]
    large: Mapping[str, int]
    more_videos: int = (ITEMS[1] - ITEMS[0]) * SAMPLES

    def per_video(self, verb: str) -> float:
        return (self.large.get(verb, 0) - self.small.get(verb, 0)) / self.more_videos

    @property
    def all_per_video(self) -> float:
        return sum(self.per_video(verb) for verb in VERBS)


def main() -> None:
    counts = count_requests(shared_moto())
    rows: list[dict[str, object]] = [
        {
            "request": verb,
            f"{ITEMS[0] * SAMPLES} videos": counts.small.get(verb, 0),
            f"{ITEMS[1] * SAMPLES} videos": counts.large.get(verb, 0),
            "per video": counts.per_video(verb),
        }
        for verb in VERBS
    ]
    rows.append({"request": "all", "per video": counts.all_per_video, "goal": GOAL_PER_VIDEO + NUM_SEGMENTS})
    report("s3_requests", rows, f"{NUM_FRAMES} frames a video, {NUM_SEGMENTS} segments of it; heartbeats left out.")


def count_requests(server: S3Server) -> Counts:
    """Render two jobs into the server and count."""
    found = []
    with FaultProxy(server.url) as proxy, tempfile.TemporaryDirectory(prefix="longtake-bench-") as folder:
        for num_items in ITEMS:
            prompts = Path(folder) / f"{num_items}.jsonl"
            lines = [
                json.dumps({"id": f"take-{n}", "prompt": f"meadow {n}", "samples": SAMPLES}) for n in range(num_items)
            ]
            prompts.write_text("\n".join(lines) + "\n")
            proxy.forget()
            render(prompts, f"s3://{server.new_bucket()}/x", proxy.url)
            found.append(Counter(kind_of(request) for request in proxy.seen if not request.key.endswith(".beat")))
    return Counts(*found)


def render(prompts: Path, out: str, endpoint: str) -> None:
    """One real job, one actor."""
    command = [sys.executable, "-m", "jobs.render", str(prompts), "--out", out, "--job-id", "night", *TINY]
    command += ["--frames", str(NUM_FRAMES), "--actors", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
        "OMP_NUM_THREADS": "1",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": endpoint,
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1000, check=False)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def kind_of(request: SeenRequest) -> str:
    return "LIST" if request.verb == "GET" and "list-type" in request.query else request.verb


if __name__ == "__main__":
    main()

"""How long after the README's command the first video is committed, with everything installed.

`python -m tests.bench.first_video --rounds 3`

The command of `make demo`; the clock starts with its process and stops when the journal names a finished video. The run
is ended then, as by Ctrl-C. The target is 40 s.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.record import ROOT, load_text, median_and_spread, report

TARGET_S = 40.0
PATIENCE_S = 600.0
LOOK_S = 0.05


@dataclass(frozen=True)
class FirstVideo:
    """Seconds from the start of the process."""

    job_s: float
    """Until `job.json` exists: the list was read and the store was tried."""
    segment_s: float
    """Until the first bytes of a video are in the store."""
    committed_s: float


def main() -> None:
    """Run it a few times, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    runs = [wait_for_first_video() for _ in range(args.rounds)]
    rows: list[dict[str, Any]] = []
    for name, values in (
        ("job accepted", [run.job_s for run in runs]),
        ("first segment stored", [run.segment_s for run in runs]),
        ("first video committed", [run.committed_s for run in runs]),
    ):
        median, spread = median_and_spread(values)
        rows.append({"until": name, "seconds": median, "+-": spread})
    reached = "reached" if rows[-1]["seconds"] <= TARGET_S else "NOT reached"
    each = ", ".join(f"{run.committed_s:.1f}" for run in runs)
    report("first_video", rows, f"{load_text()}Target {TARGET_S:g} s: {reached}. First commit of each round: {each} s.")


def wait_for_first_video() -> FirstVideo:
    """Run the command until its first video is committed, then stop it."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "demo"
        command = [sys.executable, "-m", "jobs.cli", "render", "jobs/samples/prompts.jsonl"]
        command += ["--out", folder, "--job-id", "demo"]
        begun = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            seconds = {}
            for name, is_there in STAGES.items():
                while not is_there(job):
                    _look_again(process, begun)
                seconds[name] = time.monotonic() - begun
            return FirstVideo(seconds["job"], seconds["segment"], seconds["committed"])
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def has_success(job: Path) -> bool:
    """Does the journal name a finished video?"""
    entries = (json.loads(path.read_text()) for path in sorted(job.glob("_state/journal/*.json")))
    return any(row["status"] == "succeeded" for entry in entries for row in entry.get("rows", ()))


STAGES: dict[str, Callable[[Path], bool]] = {
    "job": lambda job: (job / "job.json").exists(),
    "segment": lambda job: any(job.glob("_state/segments/*/*.mp4")),
    "committed": has_success,
}


def _look_again(process: subprocess.Popen[bytes], begun: float) -> None:
    """Wait a moment."""
    seconds = time.monotonic() - begun
    if process.poll() is not None or seconds > PATIENCE_S:
        raise SystemExit(f"no video after {seconds:.0f} s; exit code {process.poll()}")
    time.sleep(LOOK_S)


if __name__ == "__main__":
    main()

"""A million prompts pass through the reader without being held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

READ = """
import sys
from jobs.prompts import PromptSource, scan_prompts
from jobs.shards import TaskDefaults

def peak_kb():  # ru_maxrss would begin at what the parent process held
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

defaults = TaskDefaults(seed=0, samples=1, num_frames=96)
scan_prompts(PromptSource(sys.argv[1]), defaults)
before = peak_kb()
scan = scan_prompts(PromptSource(sys.argv[2]), defaults)
after = peak_kb()
print(scan.num_items, (after - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt"])
def test_rss_grows_less_than_50_mb_from_10_thousand_to_a_million_prompts(tmp_path: Path, suffix: str) -> None:
    small, large = tmp_path / f"small.{suffix}", tmp_path / f"large.{suffix}"
    for path, count in ((small, 10_000), (large, 1_000_000)):
        write(path, count)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(small), str(large)], capture_output=True, text=True, check=True, timeout=1000
    )
    num_items, grown_mb = map(int, done.stdout.split())
    assert num_items == 1_000_000
    assert grown_mb < 50


def write(path: Path, count: int) -> None:
    text = "an aerial shot of a green meadow with red houses, the camera drifts north, number"
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as writer:
            for start in range(0, count, 10_000):
                writer.write_table(pa.table({"prompt": [f"{text} {i}" for i in range(start, start + 10_000)]}))
        return
    line = {".jsonl": '{{"prompt": "{0} {1}", "n": {1}}}\n', ".csv": '"{0} {1}",{1}\n', ".txt": "{0} {1}\n"}[
        path.suffix
    ]
    with path.open("w") as file:
        if path.suffix == ".csv":
            file.write("prompt,n\n")
        file.writelines(line.format(text, i) for i in range(count))

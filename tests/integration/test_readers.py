"""One prefix, every reader: the real libraries read a job's output without options, on local files and over HTTP.

Each reader runs in a process of its own: they keep background threads, and two of them warn at exit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.outputs import make_output
from tests.servers import CEPH_MARKS, S3Server, shared_ceph, shared_moto, use_endpoint

NUM_ROWS = 4
PYARROW = """
import pyarrow.dataset as ds
table = ds.dataset(f"{root}/manifest").to_table()
print(table.num_rows, table["rank"].to_pylist() and sum(table["rank"].to_pylist()))
"""
DUCKDB = """
import duckdb
print(*duckdb.sql(f"select count(*), sum(rank) from '{root}/manifest/part-*.parquet'").fetchall()[0])
"""
POLARS = """
import polars as pl
frame = pl.scan_parquet(f"{root}/manifest/part-*.parquet").collect()
print(frame.height, frame["rank"].sum())
"""
POLARS_FOLDER = """
import polars as pl
frame = pl.scan_parquet(f"{root}/manifest/").collect()
print(frame.height, frame["rank"].sum())
"""
PANDAS = """
import pandas as pd
frame = pd.read_parquet(f"{root}/manifest")
print(len(frame), frame["rank"].sum())
"""
HF_ROOT = """
import datasets
rows = datasets.load_dataset(root, split="train", cache_dir=cache)
print(len(rows), sum(rows["rank"]))
"""
HF_VIDEOFOLDER = """
import datasets
from jobs.export import export
export(root, cache + "/export", "videofolder")
rows = datasets.load_dataset("videofolder", data_dir=cache + "/export", split="train", cache_dir=cache)
rows = rows.cast_column("video", datasets.Video(decode=False))
assert all(video["path"].endswith(".mp4") for video in rows["video"])
print(len(rows), sum(rows["rank"]))
"""
WEBDATASET = """
import json, webdataset
from jobs.export import export
export(root, cache + "/export", "webdataset")
rows = [json.loads(s["json"]) for s in webdataset.WebDataset(cache + "/export/shard-00000.tar", shardshuffle=False)]
print(len(rows), sum(row["rank"] for row in rows))
"""
RAY_DATA = """
import os
os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=cache[:60], object_store_memory=80 << 20)
rows = ray.data.read_parquet(f"{root}/manifest").take_all()
print(len(rows), sum(row["rank"] for row in rows))
"""
LONGTAKE = """
import longtake
table = longtake.open_manifest(root).to_table()
print(table.num_rows, sum(table["rank"].to_pylist()))
"""
DUCKDB_S3 = """
import duckdb, fsspec.implementations.arrow, pyarrow.fs
class S3X(fsspec.implementations.arrow.ArrowFSWrapper):
    protocol = "s3x"
    def _strip_protocol(self, path):
        return path.removeprefix("s3x://")
filesystem, path = pyarrow.fs.FileSystem.from_uri(root)
connection = duckdb.connect()
connection.register_filesystem(S3X(filesystem))
print(*connection.sql(f"select count(*), sum(rank) from read_parquet('s3x://{path}/manifest/part-*.parquet')").fetchall()[0])
"""
LOCAL = {
    "pyarrow.dataset": PYARROW,
    "duckdb": DUCKDB,
    "polars": POLARS,
    "polars on the folder": POLARS_FOLDER,
    "pandas": PANDAS,
    "datasets on the job's root": HF_ROOT,
    "datasets videofolder": HF_VIDEOFOLDER,
    "webdataset": WEBDATASET,
    "longtake": LONGTAKE,
}
OVER_S3 = {"pyarrow.dataset": PYARROW, "polars": POLARS, "duckdb": DUCKDB_S3, "longtake": LONGTAKE}


def run_reader(script: str, root: str, cache: Path) -> tuple[int, int]:
    cache.mkdir(exist_ok=True)
    code = f"root = {root!r}\ncache = {str(cache)!r}\n{script}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    num_rows, total = done.stdout.split()[-2:]
    return int(num_rows), int(float(total))


@pytest.fixture(scope="module")
def job_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job whose neighbour is called night-test, with everything around the manifest that readers could trip over."""
    out = tmp_path_factory.mktemp("out")
    make_output(out / "night", NUM_ROWS, num_parts=2)
    make_output(out / "night-test", 1, num_parts=1)
    return str(out / "night")


@pytest.mark.parametrize(
    "reader", [pytest.param(name, marks=pytest.mark.slow if name == "webdataset" else ()) for name in LOCAL]
)
def test_reader_sees_every_row_once_on_local_files(reader: str, job_root: str, tmp_path: Path) -> None:
    assert run_reader(LOCAL[reader], job_root, tmp_path / "cache") == (NUM_ROWS, sum(range(NUM_ROWS)))


@pytest.mark.slow
def test_ray_data_sees_every_row_once(job_root: str) -> None:
    assert run_ray_data(job_root) == (NUM_ROWS, sum(range(NUM_ROWS)))


def run_ray_data(root: str) -> tuple[int, int]:
    folder = Path(f"/tmp/lt-rd-{os.getpid()}")  # Ray's socket paths must be short
    try:
        return run_reader(RAY_DATA, root, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("start", [shared_moto, pytest.param(shared_ceph, marks=CEPH_MARKS)])
@pytest.mark.parametrize("reader", [*OVER_S3, pytest.param("ray data", marks=pytest.mark.slow)])
def test_reader_sees_every_row_once_over_s3(
    reader: str, start: Callable[[], S3Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    use_endpoint(monkeypatch, server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    root = f"s3://{server.new_bucket()}/out/night"
    make_output(root, NUM_ROWS, with_videos=False, num_parts=2)
    if reader == "ray data":
        assert run_ray_data(root) == (NUM_ROWS, sum(range(NUM_ROWS)))
    else:
        assert run_reader(OVER_S3[reader], root, tmp_path / "cache") == (NUM_ROWS, sum(range(NUM_ROWS)))

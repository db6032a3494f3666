"""Weight files of a folder or bucket: hashes checked, downloaded once per machine, resumed after a killed process."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.object_store import open_store
from tests.servers import S3Server, shared_moto, use_endpoint
from workers.checkpoints.fetch import file_sha256, open_folder
from workers.errors import CheckpointMismatch

ROOT = Path(__file__).resolve().parents[4]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").mkdir()
    save_file({"a": torch.randn(1000)}, str(tmp_path / "weights" / "a.safetensors"))
    return tmp_path / "weights"


def test_local_files_are_used_where_they_are(folder: Path, tmp_path: Path) -> None:
    weights = open_folder(folder, tmp_path / "cache")
    assert weights.sizes == {"a.safetensors": (folder / "a.safetensors").stat().st_size}
    assert weights.fetch("a.safetensors") == folder / "a.safetensors"
    assert weights.hashes == {"a.safetensors": sha256(folder / "a.safetensors")}
    assert weights.num_bytes_downloaded == 0
    one = open_folder(folder / "a.safetensors", tmp_path / "cache")
    assert one.only == "a.safetensors"
    one.fetch("a.safetensors")
    assert one.revision == weights.revision


@pytest.mark.parametrize("form", ["sums", "star", "card", "hugging-face"])
def test_an_altered_file_is_refused_with_both_hashes(folder: Path, tmp_path: Path, form: str) -> None:
    path = folder / "a.safetensors"
    good = sha256(path)
    if form == "card":
        (folder / "card.json").write_text(f'{{"files": {{"a.safetensors": "{good}"}}}}')
    elif form == "hugging-face":
        note = folder / ".cache" / "huggingface" / "download" / "a.safetensors.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"9737cba9737cba9737cba9737cba9737cba9737c\n{good}\n1717.5\n")
    else:
        (folder / "SHA256SUMS").write_text(f"{good} {'*' if form == 'star' else ' '}a.safetensors\n")
    open_folder(folder, tmp_path / "cache").fetch("a.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointMismatch, match=r"altered or cut off.*fetch it again") as caught:
        open_folder(folder, tmp_path / "cache").fetch("a.safetensors")
    assert good in str(caught.value)
    assert sha256(path) in str(caught.value)


def test_a_hash_is_computed_once_until_the_file_is_touched(folder: Path, tmp_path: Path) -> None:
    path, cache = folder / "a.safetensors", tmp_path / "cache"
    os.utime(path, (0, 0))
    first = file_sha256(path, cache)
    change_within_a_tick(path)  # the same size, time and inode: what is remembered answers
    assert file_sha256(path, cache) == first
    os.utime(path)
    assert file_sha256(path, cache) == sha256(path) != first


def test_a_file_that_was_just_written_is_not_trusted_to_stay(folder: Path, tmp_path: Path) -> None:
    path, cache = folder / "a.safetensors", tmp_path / "cache"
    os.utime(path, (time.time() + 3600,) * 2)  # a moment ago, however slow this machine is
    first = file_sha256(path, cache)
    change_within_a_tick(path)
    assert file_sha256(path, cache) == sha256(path) != first


def change_within_a_tick(path: Path) -> None:
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"gs://bucket/x: .*only s3://"):
        open_folder("gs://bucket/x", tmp_path)
    with pytest.raises(CheckpointMismatch, match="no such file"):
        open_folder(tmp_path, tmp_path / "cache").fetch("b.safetensors")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> S3Server:
    server = shared_moto()
    use_endpoint(monkeypatch, server)
    return server


@pytest.fixture
def url(server: S3Server, folder: Path) -> str:
    url = f"s3://{server.new_bucket()}/models/wan"
    save_file({"b": torch.randn(2_000_000)}, str(folder / "b.safetensors"))
    store = open_store(url)
    for path in folder.iterdir():
        store.put_file(f"sub/{path.name}", path)
    return url


FETCH = """
import sys
from pathlib import Path
from workers.checkpoints.fetch import open_folder
folder = open_folder(sys.argv[1], Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
path = folder.fetch("sub/b.safetensors")
print(folder.num_bytes_downloaded, path, folder.hashes["sub/b.safetensors"])
"""


def start(url: str, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, url, str(cache)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_processes_of_one_machine_download_once(url: str, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    processes = [start(url, cache) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=600)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    size = (folder / "b.safetensors").stat().st_size
    assert sorted(int(answer[0]) for answer in answers) == [0, 0, 0, size]
    assert {answer[1] for answer in answers} == {str(next(cache.rglob("b.safetensors")))}
    assert {answer[2] for answer in answers} == {sha256(folder / "b.safetensors")}
    assert not list(cache.rglob("*.part"))


@pytest.mark.slow
def test_a_killed_download_is_begun_again(url: str, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(url, cache)
    # The lock is held here, as by a process in the middle of its download: the other one waits.
    holder = "import fcntl, pathlib, sys, time\npath = pathlib.Path(sys.argv[1])\npath.parent.mkdir(parents=True)\n"
    holder += "file = path.open('w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
    holder += "path.with_name('b.safetensors.part').write_bytes(b'half')\nprint('held', flush=True)\ntime.sleep(600)\n"
    lock = cache / "s3" / hashlib.sha256(url.encode()).hexdigest()[:16] / "sub" / "b.safetensors.lock"
    with subprocess.Popen([sys.executable, "-c", holder, str(lock)], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "held\n"
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        time.sleep(0.5)
        assert process.poll() is None
        os.kill(killed.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=600)
    assert int(output.split()[0]) == (folder / "b.safetensors").stat().st_size
    assert sha256(Path(output.split()[1])) == sha256(folder / "b.safetensors")


def test_a_damaged_copy_and_a_new_upload_are_fetched_again(url: str, folder: Path, tmp_path: Path) -> None:
    cache, name = tmp_path / "cache", "sub/b.safetensors"
    copy = open_folder(url, cache).fetch(name)
    good = copy.read_bytes()
    copy.write_bytes(good[:-4] + b"oops")
    weights = open_folder(url, cache)
    assert weights.fetch(name).read_bytes() == good
    assert weights.num_bytes_downloaded == len(good)
    assert open_folder(f"{url}/{name}", cache).only == "b.safetensors"
    open_store(url).put(name, good + b"more")
    weights = open_folder(url, cache)
    assert weights.fetch(name).read_bytes() == good + b"more"


def test_an_upload_that_is_not_what_was_published_is_refused(url: str, tmp_path: Path) -> None:
    open_store(url).put("SHA256SUMS", f"{'0' * 64}  sub/b.safetensors\n".encode())
    with pytest.raises(CheckpointMismatch, match=rf"{url}/sub/b\.safetensors: altered.*expected 0000"):
        open_folder(url, tmp_path / "cache").fetch("sub/b.safetensors")
    with pytest.raises(CheckpointMismatch, match="no such object"):
        open_folder(url, tmp_path / "cache").fetch("sub/c.safetensors")
    with pytest.raises(CheckpointMismatch, match="nothing there"):
        _ = open_folder(f"{url}/nowhere", tmp_path / "cache").sizes

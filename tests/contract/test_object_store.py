"""The promises of ObjectStore, kept by every store: a folder, moto, Ceph, and both behind a proxy that misbehaves.

What is stored is checked by raw access (boto3, the file system), so that the code under test does not vouch for itself.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest

from cluster.errors import NotFound
from cluster.local_store import LocalStore
from cluster.object_store import ObjectStore, probe_conditional_writes
from cluster.s3_store import MIB, S3Settings, S3Store
from tests.fault_proxy import FaultKind, FaultProxy
from tests.servers import CEPH_MARKS, S3Server, client_of, shared_ceph, shared_moto, use_endpoint

SETTINGS = S3Settings(deadline_s=120, read_timeout_s=60, multipart_above_bytes=6 * MIB, part_bytes=5 * MIB)
HARMLESS: set[FaultKind] = {"unconditional", "slow"}  # not part of the storm: the first is a defect, the second idle
RawGet = Callable[[str], bytes | None]
Place = tuple[ObjectStore, RawGet]


@contextlib.contextmanager
def weather(server: S3Server, kind: str) -> Iterator[S3Server | FaultProxy]:
    """The server itself, or a proxy where every third request meets one of the faults in turn."""
    if kind == "calm":
        yield server
        return
    faults = itertools.cycle(sorted(set(get_args(FaultKind)) - HARMLESS))
    with FaultProxy(server.url) as proxy:
        for position in range(3, 3000, 3):
            proxy.arm(next(faults), lambda _, at=position: len(proxy.seen) >= at)
        yield proxy


def raw_s3_get(server: S3Server, bucket: str, key: str) -> bytes | None:
    client = client_of(server.url)
    try:
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()
    except client.exceptions.NoSuchKey:
        return None


def raw_file_get(root: Path, key: str) -> bytes | None:
    path = root / key
    return path.read_bytes() if path.is_file() else None


@pytest.fixture(
    params=[
        "local",
        "moto-calm",
        "moto-storm",
        pytest.param("ceph-calm", marks=CEPH_MARKS),
        pytest.param("ceph-storm", marks=CEPH_MARKS),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "local":
        root = tmp_path / "store"
        yield LocalStore(root), lambda key: raw_file_get(root, key)
        return
    name, kind = request.param.split("-")
    server = {"moto": shared_moto, "ceph": shared_ceph}[name]()
    bucket = server.new_bucket()
    with weather(server, kind) as endpoint:
        use_endpoint(monkeypatch, endpoint)
        yield S3Store(bucket, "some/prefix", SETTINGS), lambda key: raw_s3_get(server, bucket, f"some/prefix/{key}")


class TestObjectStore:
    def test_put_writes_and_overwrites(self, place: Place) -> None:
        store, raw = place
        store.put("a/b.json", b"old")
        store.put("a/b.json", b"new")
        assert store.get("a/b.json") == b"new" == raw("a/b.json")
        assert store.size("a/b.json") == 3

    def test_put_if_absent_keeps_the_first_bytes(self, place: Place) -> None:
        store, raw = place
        assert store.put_if_absent("lease/1", b"first")
        assert not store.put_if_absent("lease/1", b"second")
        assert raw("lease/1") == b"first"

    def test_exactly_one_of_16_concurrent_writers_wins(self, place: Place) -> None:
        store, raw = place
        for key in ("round/1", "round/2"):
            bodies = [f"{writer} {secrets.token_hex(500)}".encode() for writer in range(16)]
            with ThreadPoolExecutor(16) as threads:
                wins = list(threads.map(lambda body, key=key: store.put_if_absent(key, body), bodies))
            assert wins.count(True) == 1
            assert raw(key) == bodies[wins.index(True)]

    def test_what_does_not_exist_is_not_found(self, place: Place, tmp_path: Path) -> None:
        store, _ = place
        assert store.size("no/thing") is None
        with pytest.raises(NotFound):
            store.get("no/thing")
        with pytest.raises(NotFound):
            store.get_file("no/thing", tmp_path / "copy")
        assert list(store.list("no/")) == []

    def test_listing_is_in_key_order_within_prefix_and_after_a_key(self, place: Place) -> None:
        store, _ = place
        keys = ["j/10", "j/9", "j-x", "j/a/2", "j/a/1", "j/a.x", "ja", "k/1", "j/ä"]
        for key in keys:
            store.put(key, key.encode())
        found = [(info.key, info.num_bytes) for info in store.list()]
        assert found == [(key, len(key.encode())) for key in sorted(keys)]
        assert [info.key for info in store.list("j/")] == ["j/10", "j/9", "j/a.x", "j/a/1", "j/a/2", "j/ä"]
        assert [info.key for info in store.list("j/a")] == ["j/a.x", "j/a/1", "j/a/2"]
        assert [info.key for info in store.list("j/", start_after="j/a.x")] == ["j/a/1", "j/a/2", "j/ä"]
        assert [info.key for info in store.list("j/", start_after="j/a/1")] == ["j/a/2", "j/ä"]
        assert [info.key for info in store.list("j/", start_after="z")] == []

    @pytest.mark.parametrize("num_bytes", [0, 70_000, 11 * MIB + 1])
    def test_files_go_up_and_come_down_unchanged(self, place: Place, tmp_path: Path, num_bytes: int) -> None:
        store, raw = place
        (tmp_path / "up").write_bytes(data := secrets.token_bytes(num_bytes))
        store.put_file("videos/00/x.mp4", tmp_path / "up")
        store.get_file("videos/00/x.mp4", tmp_path / "down")
        assert (tmp_path / "down").read_bytes() == data == raw("videos/00/x.mp4")

    def test_delete_removes_and_passes_over_what_is_gone(self, place: Place) -> None:
        store, raw = place
        for key in ("d/1", "d/2", "e/1"):
            store.put(key, b"x")
        store.delete(["d/1", "d/never", "d/2"])
        store.delete([])
        assert [info.key for info in store.list()] == ["e/1"]
        assert raw("d/1") is None
        assert store.put_if_absent("d/1", b"again")

    @pytest.mark.slow
    def test_listing_and_deleting_cross_the_limit_of_one_page(self, place: Place) -> None:
        store, _ = place
        keys = [f"many/{number:05d}" for number in range(1003)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda key: store.put(key, b""), keys))
        assert [info.key for info in store.list("many/")] == keys
        store.delete(keys)
        assert list(store.list()) == []

    def test_a_hostile_key_is_refused_before_anything_happens(self, place: Place) -> None:
        store, _ = place
        actions = (store.get, store.size, lambda k: store.put(k, b""), lambda k: store.put_if_absent(k, b""))
        for key in ("", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a\\b", "a\nb", "x" * 1025):
            for action in (*actions, lambda k: store.delete([k])):
                with pytest.raises(ValueError, match="object key"):
                    action(key)

    def test_conditional_writes_pass_the_probe_and_leave_nothing(self, place: Place) -> None:
        store, _ = place
        probe_conditional_writes(store)
        assert list(store.list()) == []

    def test_a_pickled_store_works_and_carries_no_secret(self, place: Place) -> None:
        store, raw = place
        store.put("a", b"1")  # the client exists by now
        pickled = pickle.dumps(store)
        assert b"testsecret" not in pickled
        other = pickle.loads(pickled)  # noqa: S301
        assert not other.put_if_absent("a", b"2")
        assert raw("a") == b"1"
        assert other.url == store.url

"""What only the local store promises, and how a URL becomes a store."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import AccessDenied, NotFound, StoreUnsuitable
from cluster.local_store import STALE_TMP_S, LocalStore
from cluster.object_store import local_path, open_store, put_in_order, split_s3_url
from cluster.s3_store import S3Store


@pytest.mark.parametrize(
    ("url", "bucket", "prefix"),
    [
        ("s3://bkt", "bkt", ""),
        ("s3://bkt/", "bkt", ""),
        ("s3://bkt/a/b/", "bkt", "a/b"),
        ("s3://bkt/a b#c%20", "bkt", "a b#c%20"),
    ],
)
def test_an_s3_url_is_bucket_and_prefix(url: str, bucket: str, prefix: str) -> None:
    assert split_s3_url(url) == (bucket, prefix)
    assert isinstance(open_store(url), S3Store)


@pytest.mark.parametrize("url", ["s3://", "s3:///a", "s3://host:9000/b", "s3://b/../c", "gs://b/c", ""])
def test_what_is_no_store_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        open_store(url)


def test_secrets_in_a_url_are_refused_and_not_repeated() -> None:
    for url in ("s3://user:hunter2@b/c", "s3://b/c?secret=hunter2", "https://user:hunter2@host/b?x=hunter2"):
        with pytest.raises(ValueError, match=r".") as caught:
            open_store(url)
        assert "hunter2" not in str(caught.value)


def test_local_urls_become_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("out/x").url == str(tmp_path / "out/x")
    assert open_store(tmp_path / "y").url == str(tmp_path / "y")
    assert local_path("file:///data/a%20b") == Path("/data/a b")
    with pytest.raises(ValueError, match="file:///"):
        local_path("file://host/data")


def test_opening_a_store_creates_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path / "new")
    assert list(store.list()) == []
    assert store.size("a") is None
    assert not (tmp_path / "new").exists()


def test_readers_never_see_a_half_written_object(tmp_path: Path) -> None:
    """A reader that globs while writers write finds whole objects only."""
    store = LocalStore(tmp_path)
    body, done, torn = os.urandom(1 << 20), threading.Event(), []

    def read() -> None:
        while not done.is_set():
            torn.extend(path for path in tmp_path.glob("*/part-*") if path.stat().st_size != len(body))

    reader = threading.Thread(target=read)
    reader.start()
    (tmp_path / "source").write_bytes(body)
    for number in range(20):
        store.put_if_absent(f"a/part-{number}", body)
        store.put(f"b/part-{number % 3}", body)
        store.put_file(f"c/part-{number}", tmp_path / "source")
    done.set()
    reader.join()
    assert not torn
    assert len(list(tmp_path.glob("*/part-*"))) == 43
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_the_tmp_folder_is_no_place_for_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="belongs to the store"):
        LocalStore(tmp_path).put(".tmp/x", b"")


def test_leavings_of_killed_writers_are_removed_after_a_day(tmp_path: Path) -> None:
    (tmp_path / ".tmp").mkdir()
    for name, age_s in (("old", STALE_TMP_S + 60), ("young", 60)):
        path = tmp_path / ".tmp" / name
        path.write_bytes(b"x")
        os.utime(path, (path.stat().st_atime - age_s, path.stat().st_mtime - age_s))
    LocalStore(tmp_path).put_if_absent("k", b"")
    assert [path.name for path in (tmp_path / ".tmp").iterdir()] == ["young"]


def test_a_file_system_without_links_is_unsuitable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what link() says on vfat and some network mounts

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreUnsuitable, match="hard links"):
        LocalStore(tmp_path).put_if_absent("k", b"")


def test_empty_folders_go_with_their_last_object(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b/c", b"")
    store.put("a/d", b"")
    store.delete(["a/b/c"])
    assert sorted(path.name for path in tmp_path.glob("a/*")) == ["d"]


def test_a_folder_in_the_way_of_a_key_is_reported(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/b", b"")
    assert store.size("a") is None
    with pytest.raises(NotFound):
        store.get("a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_access_denied(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(AccessDenied):
        LocalStore(tmp_path / "locked" / "store").put("k", b"")


def test_without_unnamed_files_a_named_one_decides_just_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    store = LocalStore(tmp_path)
    assert store.put_if_absent("a/k", b"first")
    assert not store.put_if_absent("a/k", b"second")
    assert store.get("a/k") == b"first"
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("is_unnamed", [True, False])
def test_of_many_writers_of_one_key_one_wins(is_unnamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    store = LocalStore(tmp_path)
    for number in range(5):
        with ThreadPoolExecutor(8) as threads:
            bodies = [b"%d" % writer for writer in range(8)]
            wins = list(threads.map(lambda body, key=f"k{number}": store.put_if_absent(key, body), bodies))
        assert wins.count(True) == 1
        assert store.get(f"k{number}") == bodies[wins.index(True)]


def test_items_are_written_in_order_up_to_the_first_name_that_is_taken(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    items = [(f"deep/folder/{n}", f"item {n}".encode()) for n in range(6)]
    assert store.put_if_absent("deep/folder/4", b"older")
    assert put_in_order(store, items) == 4
    assert [store.get(key) for key, _ in items[:5]] == [b"item 0", b"item 1", b"item 2", b"item 3", b"older"]
    assert store.size("deep/folder/5") is None
    assert put_in_order(store, items[:1]) == 0
    assert put_in_order(store, []) == 0


def test_of_writers_of_the_same_items_each_item_has_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def write(who: int) -> int:
        done = 0
        while done < 40:
            items = [(f"j/{n:04d}", f"{who} {n}".encode()) for n in range(done, 40)]
            count = put_in_order(store, items[:7])
            won.extend([who] * count)
            done += max(count, 1)
        return done

    won: list[int] = []
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(write, range(8))) == [40] * 8
    assert len(won) == len(list(store.list("j/"))) == 40

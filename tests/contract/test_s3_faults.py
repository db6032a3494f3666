"""What S3Store makes of a network and a server that fail at the worst moment; each fault on moto and on Ceph."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import AccessDenied, NotFound, OutcomeUnknown, StoreUnavailable, StoreUnsuitable
from cluster.object_store import open_store, probe_conditional_writes
from cluster.s3_store import MIB, S3Settings, S3Store
from tests.fault_proxy import FaultKind, FaultProxy, SeenRequest
from tests.servers import CEPH_MARKS, S3Server, shared_ceph, shared_moto, silent_port, use_endpoint

# A busy server is not a lost answer: where a request is counted, nobody gives up waiting for one.
WAITING = {"read_timeout_s": 60.0, "connect_timeout_s": 60.0}
PATIENT = S3Settings(deadline_s=120, multipart_above_bytes=6 * MIB, part_bytes=5 * MIB, **WAITING)
HASTY = S3Settings(deadline_s=1.0, **WAITING)


@pytest.fixture(params=["moto", pytest.param("ceph", marks=CEPH_MARKS)])
def server(request: pytest.FixtureRequest) -> S3Server:
    return {"moto": shared_moto, "ceph": shared_ceph}[request.param]()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(server.url) as proxy:
        use_endpoint(monkeypatch, proxy)
        yield proxy


@pytest.fixture
def bucket(server: S3Server) -> str:
    return server.new_bucket()


@pytest.fixture
def store(bucket: str, proxy: FaultProxy) -> S3Store:
    return S3Store(bucket, "p", PATIENT)


def is_put(request: SeenRequest) -> bool:
    return request.verb == "PUT"


def completes_upload(request: SeenRequest) -> bool:
    return request.verb == "POST" and "uploadId" in request.query


class TestPutIfAbsent:
    def test_costs_one_request(self, store: S3Store, proxy: FaultProxy) -> None:
        assert store.put_if_absent("k", b"mine")
        assert [(seen.verb, seen.is_conditional) for seen in proxy.seen] == [("PUT", True)]

    @pytest.mark.parametrize("kind", ["lost_answer", "late_503", "reset_before", "slow_down", "conflict", "cut_answer"])
    def test_the_true_writer_wins_through_every_fault(self, store: S3Store, proxy: FaultProxy, kind: FaultKind) -> None:
        fault = proxy.arm(kind, is_put, times=2)
        assert store.put_if_absent("k", b"mine")
        assert fault.times == 0 or kind in ("lost_answer", "late_503", "cut_answer")
        assert store.get("k") == b"mine"
        assert not store.put_if_absent("k", b"other")

    @pytest.mark.parametrize("kind", ["lost_answer", "late_503", "reset_before", "slow_down", "conflict"])
    def test_a_loser_is_told_so_through_every_fault(self, store: S3Store, proxy: FaultProxy, kind: FaultKind) -> None:
        assert store.put_if_absent("k", b"first")
        proxy.arm(kind, is_put)
        assert not store.put_if_absent("k", b"second")
        assert store.get("k") == b"first"

    def test_an_answer_slower_than_the_timeout_still_counts(self, bucket: str, proxy: FaultProxy) -> None:
        store = S3Store(bucket, "p", S3Settings(deadline_s=120, read_timeout_s=1.0))
        store.put("warm", b"")
        store.retries.clear()
        proxy.arm("slow", is_put, delay_s=1.5)
        assert store.put_if_absent("k", b"mine")
        assert store.retries["ReadTimeoutError"] >= 1

    def test_outcome_is_unknown_when_no_answer_came_before_the_deadline(self, bucket: str, proxy: FaultProxy) -> None:
        proxy.arm("lost_answer", is_put)
        proxy.arm("reset_before", times=10_000)
        with pytest.raises(OutcomeUnknown):
            S3Store(bucket, "p", HASTY).put_if_absent("k", b"mine")
        proxy.forget()
        assert S3Store(bucket, "p", PATIENT).get("k") == b"mine"

    def test_store_is_unavailable_when_every_answer_was_a_refusal(self, bucket: str, proxy: FaultProxy) -> None:
        proxy.arm("conflict", is_put, times=10_000)
        with pytest.raises(StoreUnavailable, match="ConditionalRequestConflict"):
            S3Store(bucket, "p", HASTY).put_if_absent("k", b"mine")
        proxy.forget()
        assert S3Store(bucket, "p", PATIENT).size("k") is None


class TestReadsAndFiles:
    def test_a_cut_answer_is_fetched_again(self, store: S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
        store.put("k", data := bytes(range(256)) * 1000)
        proxy.arm("cut_answer", lambda seen: seen.verb == "GET", times=2)
        assert store.get("k") == data
        proxy.arm("cut_answer", lambda seen: seen.verb == "GET")
        store.get_file("k", tmp_path / "k")
        assert (tmp_path / "k").read_bytes() == data

    def test_a_small_file_costs_one_request(self, store: S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
        (tmp_path / "v").write_bytes(b"x" * MIB)
        store.put_file("videos/v.mp4", tmp_path / "v")
        assert proxy.count("") == 1

    def test_a_lost_answer_to_complete_is_a_success(self, store: S3Store, proxy: FaultProxy, tmp_path: Path) -> None:
        (tmp_path / "v").write_bytes(b"x" * (11 * MIB))
        proxy.arm("lost_answer", completes_upload)
        store.put_file("videos/v.mp4", tmp_path / "v")
        assert store.size("videos/v.mp4") == 11 * MIB
        assert open_uploads(store) == 0

    def test_an_upload_that_cannot_finish_is_aborted(self, bucket: str, proxy: FaultProxy, tmp_path: Path) -> None:
        (tmp_path / "v").write_bytes(b"x" * (11 * MIB))
        proxy.arm("slow_down", lambda seen: "partNumber=2" in seen.query, times=10_000)
        store = S3Store(bucket, "p", replace(PATIENT, deadline_s=2))
        with pytest.raises(StoreUnavailable, match="part 2"):
            store.put_file("videos/v.mp4", tmp_path / "v")
        assert store.size("videos/v.mp4") is None
        assert open_uploads(store) == 0


def test_a_missing_bucket_is_not_found(proxy: FaultProxy) -> None:
    with pytest.raises(NotFound, match="NoSuchBucket"):
        S3Store("no-such-bucket-here", "", PATIENT).put("k", b"")


def test_a_server_that_ignores_the_condition_is_unsuitable(monkeypatch: pytest.MonkeyPatch) -> None:
    server = shared_moto()  # checks no signatures, and those cover the header that the proxy drops
    with FaultProxy(server.url) as proxy:
        use_endpoint(monkeypatch, proxy)
        proxy.arm("unconditional", is_put, times=2)
        with pytest.raises(StoreUnsuitable, match="If-None-Match"):
            probe_conditional_writes(S3Store(server.new_bucket(), "p", PATIENT))


def test_wrong_credentials_are_denied_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = shared_ceph()
    bucket = server.new_bucket()
    use_endpoint(monkeypatch, server)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with caplog.at_level(logging.DEBUG, "cluster"), pytest.raises(AccessDenied) as caught:
        open_store(f"s3://{bucket}/p").put("k", b"")
    assert "wrong-secret" not in caplog.text + str(caught.value)


for _mark in CEPH_MARKS:
    test_wrong_credentials_are_denied_at_once = _mark(test_wrong_credentials_are_denied_at_once)


def test_no_credentials_are_an_error_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(AccessDenied, match="credentials"):
        open_store("s3://bucket/p").put("k", b"")


def test_nobody_listening_is_unavailable_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    with silent_port() as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(StoreUnavailable, match="Could not connect"):
            S3Store("bucket", "p", HASTY).put_if_absent("k", b"")
    assert time.monotonic() - start < 60  # boto3 alone would try for minutes


def open_uploads(store: S3Store) -> int:
    answer = store._s3().list_multipart_uploads(Bucket=store.bucket)
    return len(answer.get("Uploads", ()))

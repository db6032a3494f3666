"""Chunk metrics reach the store as Parquet, and counters add up to what the run did, whatever happens to the store."""

from __future__ import annotations

import io
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import StoreUnavailable
from cluster.telemetry import Telemetry
from jobs.accounting import CAUSES
from jobs.columns import CHUNK_SCHEMA
from jobs.driver import Driver, JobInputs, Limits
from jobs.observer import ChunkMetricsWriter, TelemetryFeed
from jobs.view import JobView
from tests.fake_pool import FakePool, World
from tests.fakes import ManualClock, MemoryStore
from tests.render_rows import FACTS, planned, result_of
from workers.task import ChunkMetrics, RenderResult

CHUNKS = (
    ChunkMetrics(chunk_index=0, seconds=0.5, kv_bytes=100, density=1.0),
    ChunkMetrics(chunk_index=1, seconds=0.7, kv_bytes=200),
)


NOTHING_YET = JobView(
    elapsed_s=0.0,
    num_succeeded=0,
    num_failed=0,
    num_rejected=0,
    num_running=0,
    num_queued=0,
    has_read_all=False,
    num_uncommitted=0,
    num_preemptions=0,
    run_succeeded=0,
    run_frames=0,
    run_video_s=0.0,
    gpu_seconds=dict.fromkeys(CAUSES, 0.0),
    actors=(),
)


class DeafStore(MemoryStore):
    """Takes nothing."""

    def put(self, key: str, data: bytes) -> None:
        raise StoreUnavailable(key)


def a_result(name: str = "take") -> RenderResult:
    return result_of(planned(name).attempt("e1a1"), chunks=CHUNKS)


def parts(store: MemoryStore) -> list[pa.Table]:
    return [pq.read_table(io.BytesIO(store.get(info.key))) for info in store.list("metrics/")]


def test_every_chunk_is_one_row_of_a_part() -> None:
    store = MemoryStore()
    writer = ChunkMetricsWriter(store, epoch=7)
    writer.add(a_result("a"), "node-1")
    writer.publish()
    writer.publish()
    writer.add(a_result("b"), "node-2")
    writer.publish()
    first, second = parts(store)
    assert first.schema.equals(CHUNK_SCHEMA)
    assert first["task_id"].to_pylist() == ["a-0", "a-0"]
    assert first["density"].to_pylist() == [1.0, None]
    assert second["node_id"].to_pylist() == ["node-2", "node-2"]
    assert all("e000007" in info.key for info in store.list("metrics/"))


def test_a_store_that_refuses_metrics_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    writer = ChunkMetricsWriter(DeafStore(), epoch=1)
    writer.add(a_result(), "node")
    writer.publish()
    assert "chunk metrics dropped" in caplog.text


def test_repeated_requests_of_driver_and_actors_are_counted_by_code() -> None:
    store = MemoryStore()
    store.retries = Counter({"SlowDown": 2})  # type: ignore[attr-defined]
    telemetry = Telemetry(job="night", model="m")
    feed = TelemetryFeed(telemetry, store=store)
    for _ in range(2):
        feed.show(NOTHING_YET, 5, None)
        store.retries["Reset"] += 1  # type: ignore[attr-defined]
    feed.finished(result_of(planned("a").attempt("e1a1"), store_retries={"SlowDown": 3}))
    values = telemetry.values()
    assert values["longtake_s3_retries_total", (("code", "SlowDown"),)] == 5
    assert values["longtake_s3_retries_total", (("code", "Reset"),)] == 1


def test_a_run_leaves_chunk_metrics_and_counters_behind() -> None:
    store, clock = MemoryStore(), ManualClock()
    telemetry = Telemetry(job="night", model="m")
    feed = TelemetryFeed(telemetry, usd_per_gpu_hour=3600.0)
    views: list[JobView] = []

    def show(view: JobView) -> None:
        views.append(view)
        feed.show(view, 5, None)

    inputs = JobInputs(
        FACTS, [planned(f"item{i}") for i in range(5)], on_result=lambda result, _: feed.finished(result)
    )
    limits = Limits(num_actors=2, lease_ttl_s=1.0)
    driver = Driver(inputs, store, lambda: FakePool(clock, World()), limits, clock=clock, on_progress=show)
    driver.run()
    values = telemetry.values()
    assert values["longtake_frames_total", ()] == views[-1].run_frames > 0
    assert values["longtake_videos_total", (("status", "succeeded"),)] == views[-1].num_succeeded
    held_s = sum(value for (name, _), value in values.items() if name == "longtake_gpu_seconds_total")
    assert held_s == pytest.approx(sum(views[-1].gpu_seconds.values()), rel=0.01)
    assert values["longtake_usd_total", ()] == pytest.approx(held_s, rel=0.01)
    telemetry.close()
    assert telemetry.values()["longtake_leases_active", ()] == 0.0
    assert sum(table.num_rows for table in parts(store)) == 5  # one chunk a take

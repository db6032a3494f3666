"""What a run shows to the outside besides its rows: per-chunk metrics as Parquet, and counters through Ray.

Neither decides anything: a metrics part that cannot be written is logged and dropped, and the rows stay the record.
"""

from __future__ import annotations

import io
import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import StoreError
from cluster.object_store import ObjectStore, retries_of
from cluster.telemetry import Telemetry
from jobs.accounting import CAUSES
from jobs.columns import CHUNK_SCHEMA
from jobs.view import JobView
from workers.task import RenderResult

logger = logging.getLogger(__name__)

PREFIX = "metrics/"


class ChunkMetricsWriter:
    """Chunks of finished takes in, Parquet parts out.

    Part names hold the epoch, so two drivers never share one. At most one thread adds and at most one writes.
    """

    def __init__(self, store: ObjectStore, epoch: int) -> None:
        self._store = store
        self._epoch = epoch
        self._num_parts = 0
        self._lock = threading.Lock()
        self._rows: list[dict[str, Any]] = []

    def add(self, result: RenderResult, node_id: str) -> None:
        """The chunks of one take."""
        finished_at = datetime.fromisoformat(result.finished_at) if result.finished_at else None
        head = {"task_id": result.task_id, "attempt": result.attempt, "node_id": node_id, "finished_at": finished_at}
        rows = [head | chunk.model_dump() for chunk in result.chunks]
        with self._lock:
            self._rows += rows

    def publish(self) -> None:
        """Write what has come in since the last call as one part, if anything has."""
        with self._lock:
            rows, self._rows = self._rows, []
        if not rows:
            return
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, CHUNK_SCHEMA), sink, compression="zstd")
        key = f"{PREFIX}part-e{self._epoch:06d}-{self._num_parts:05d}.parquet"
        try:
            self._store.put(key, sink.getvalue())
        except StoreError as error:
            logger.warning("chunk metrics dropped", extra={"key": key, "chunks": len(rows), "why": str(error)})
        self._num_parts += 1


@dataclass
class _Shown:
    """What the counters have been told so far."""

    succeeded: int = 0
    failed: int = 0
    rejected: int = 0
    preemptions: int = 0
    usd: float = 0.0


class TelemetryFeed:
    """Turns results and views into the metrics of cluster/telemetry.py."""

    def __init__(
        self, telemetry: Telemetry, usd_per_gpu_hour: float | None = None, store: ObjectStore | None = None
    ) -> None:
        self.telemetry = telemetry
        self._store = store
        self._retries: Counter[str] = Counter()
        self._rate = usd_per_gpu_hour
        self._base: JobView | None = None
        self._shown = _Shown()
        self._seconds = dict.fromkeys(CAUSES, 0.0)

    def finished(self, result: RenderResult) -> None:
        """A take is complete; its row is on its way into the journal."""
        out = self.telemetry
        out.count("longtake_frames_total", result.num_frames)
        out.count("longtake_video_seconds_total", result.num_frames / result.fps)
        out.count("longtake_upload_bytes_total", result.num_bytes)
        for stage, seconds in result.stage_s.model_dump().items():
            out.observe("longtake_stage_seconds", seconds, stage=stage)
        for chunk in result.chunks:
            out.observe("longtake_chunk_seconds", chunk.seconds)
        out.gauge("longtake_kv_bytes", result.kv_bytes)
        if result.attn_density_mean is not None:
            out.gauge("longtake_attention_density", result.attn_density_mean)
        if result.attn_recall_probe is not None:
            out.gauge("longtake_attention_recall", result.attn_recall_probe)
        self._count_retries(result.store_retries)
        for action, num in (("tightened", result.guard_tightened), ("dense", result.guard_dense_chunks)):
            if num is not None:
                out.count("longtake_guard_chunks_total", num, action=action)

    def show(self, view: JobView, num_tasks: int, eta_s: float | None) -> None:
        """How the job stands now; called about once a second."""
        base = self._base = self._base or view
        out, shown = self.telemetry, self._shown
        for status in ("succeeded", "failed", "rejected"):
            total = getattr(view, f"num_{status}") - getattr(base, f"num_{status}")
            out.count("longtake_videos_total", max(0, total - getattr(shown, status)), status=status)
            setattr(shown, status, max(total, getattr(shown, status)))
        for cause in CAUSES:
            gained = view.gpu_seconds[cause] - self._seconds[cause]
            if gained > 0:  # an estimate of idle time may be taken back when a result explains it
                out.count("longtake_gpu_seconds_total", gained, reason=cause)
                self._seconds[cause] = view.gpu_seconds[cause]
        out.count("longtake_preemptions_total", view.num_preemptions - shown.preemptions)
        shown.preemptions = view.num_preemptions
        out.gauge("longtake_leases_active", 1.0)
        out.gauge("longtake_queue_items", max(0, num_tasks - view.num_succeeded - view.num_failed))
        if eta_s is not None:
            out.gauge("longtake_eta_seconds", eta_s)
        if view.elapsed_s > 0:
            out.gauge("longtake_realtime_factor", view.run_video_s / view.elapsed_s)
        if self._store is not None:
            now = retries_of(self._store)
            self._count_retries(now - self._retries)
            self._retries = now
        if self._rate is not None:
            usd = sum(view.gpu_seconds.values()) * self._rate / 3600
            out.count("longtake_usd_total", max(0.0, usd - shown.usd))
            shown.usd = max(usd, shown.usd)

    def _count_retries(self, retries: Mapping[str, int]) -> None:
        for code, number in retries.items():
            self.telemetry.count("longtake_s3_retries_total", number, code=code)

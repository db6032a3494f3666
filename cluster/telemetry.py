"""Counters, gauges and histograms of a job, through ray.util.metrics; Ray adds the prefix `ray_` and exports them.

Every value is also kept here: without a connected Ray that is all that happens, and what the bucket's files say stays
the record (Ray loses last values and lets series of dead processes linger).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util import metrics as ray_metrics

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class MetricSpec:
    """Name, kind and labels of one metric; `job`, `model` and `gpu_type` are labels of all."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: Mapping[str, MetricSpec] = {
    "longtake_videos_total": MetricSpec("counter", "Items that came to an end", ("status",)),
    "longtake_video_seconds_total": MetricSpec("counter", "Seconds of committed video"),
    "longtake_frames_total": MetricSpec("counter", "Frames of committed video"),
    "longtake_chunk_seconds": MetricSpec("histogram", "Seconds to generate one chunk"),
    "longtake_stage_seconds": MetricSpec("histogram", "Seconds of one stage of one take", ("stage",)),
    "longtake_gpu_seconds_total": MetricSpec("counter", "Seconds that GPUs were held, by what for", ("reason",)),
    "longtake_kv_bytes": MetricSpec("gauge", "Bytes of the KV caches on GPUs"),
    "longtake_attention_density": MetricSpec("gauge", "Attended pairs / dense pairs, last take"),
    "longtake_attention_recall": MetricSpec("gauge", "Estimated attention recall, mean of the last guarded take"),
    "longtake_guard_chunks_total": MetricSpec("counter", "Chunks after which the quality guard acted", ("action",)),
    "longtake_upload_bytes_total": MetricSpec("counter", "Bytes of committed video objects"),
    "longtake_s3_retries_total": MetricSpec("counter", "Requests to the store that had to be repeated", ("code",)),
    "longtake_leases_active": MetricSpec("gauge", "1 while this driver holds the job's lease"),
    "longtake_preemptions_total": MetricSpec("counter", "Actors lost with their node"),
    "longtake_queue_items": MetricSpec("gauge", "Items not yet ended"),
    "longtake_eta_seconds": MetricSpec("gauge", "Expected seconds to the end of the job"),
    "longtake_usd_total": MetricSpec("counter", "GPU hours held, in US dollars at the configured rate"),
    "longtake_realtime_factor": MetricSpec("gauge", "Seconds of video per second of wall clock"),
}
COMMON_LABELS = ("job", "model", "gpu_type")

Series = tuple[str, tuple[tuple[str, str], ...]]


class Telemetry:
    """Metrics of one job in one process; thread-safe. close() zeroes its gauges, so that no dead job looks alive."""

    def __init__(self, *, job: str, model: str, gpu_type: str = "") -> None:
        self._common = {"job": job, "model": model, "gpu_type": gpu_type}
        self._values: dict[Series, float] = {}
        self._exported: dict[str, Any] = {}
        self._lock = threading.Lock()

    def count(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter; `amount` >= 0."""
        if amount < 0:
            raise ValueError(f"{name}: a counter cannot fall ({amount})")
        with self._lock:
            series = self._series(name, "counter", labels)
            self._values[series] = self._values.get(series, 0.0) + amount
            if amount > 0:
                self._export(name, lambda metric, tags: metric.inc(amount, tags=tags), labels)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[self._series(name, "gauge", labels)] = value
            self._export(name, lambda metric, tags: metric.set(value, tags=tags), labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram; its sum is what `values` shows."""
        with self._lock:
            series = self._series(name, "histogram", labels)
            self._values[series] = self._values.get(series, 0.0) + value
            self._export(name, lambda metric, tags: metric.observe(value, tags=tags), labels)

    def values(self) -> dict[Series, float]:
        """Every series touched so far: (name, sorted labels without the common ones) -> value."""
        with self._lock:
            return dict(self._values)

    def close(self) -> None:
        """Zero the gauges."""
        for name, labels in self.values():
            if METRICS[name].kind == "gauge":
                self.gauge(name, 0.0, **dict(labels))

    def _series(self, name: str, kind: str, labels: Mapping[str, str]) -> Series:
        spec = METRICS[name]
        if spec.kind != kind or set(labels) != set(spec.labels):
            raise ValueError(f"{name} is a {spec.kind} with labels {spec.labels}, not a {kind} with {tuple(labels)}")
        return name, tuple(sorted(labels.items()))

    def _export(self, name: str, record: Any, labels: Mapping[str, str]) -> None:
        if not ray.is_initialized():
            return
        if name not in self._exported:
            self._exported[name] = make_metric(name)
        record(self._exported[name], {**self._common, **labels})


def make_metric(name: str) -> Any:
    """The Ray metric behind a name of METRICS."""
    spec = METRICS[name]
    tags = (*COMMON_LABELS, *spec.labels)
    if spec.kind == "counter":
        return ray_metrics.Counter(name, description=spec.help, tag_keys=tags)
    if spec.kind == "gauge":
        return ray_metrics.Gauge(name, description=spec.help, tag_keys=tags)
    return ray_metrics.Histogram(name, description=spec.help, boundaries=list(SECONDS), tag_keys=tags)

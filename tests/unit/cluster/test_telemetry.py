"""Metrics without a cluster: values are kept, names and labels are checked, gauges end at zero."""

from __future__ import annotations

import pytest

from cluster.telemetry import METRICS, Telemetry


def test_values_are_kept_without_ray() -> None:
    telemetry = Telemetry(job="j", model="m")
    telemetry.count("longtake_videos_total", status="succeeded")
    telemetry.count("longtake_videos_total", 2, status="succeeded")
    telemetry.count("longtake_videos_total", status="failed")
    telemetry.gauge("longtake_queue_items", 10)
    telemetry.observe("longtake_stage_seconds", 1.5, stage="vae")
    telemetry.observe("longtake_stage_seconds", 0.5, stage="vae")
    assert telemetry.values() == {
        ("longtake_videos_total", (("status", "succeeded"),)): 3.0,
        ("longtake_videos_total", (("status", "failed"),)): 1.0,
        ("longtake_queue_items", ()): 10.0,
        ("longtake_stage_seconds", (("stage", "vae"),)): 2.0,
    }


def test_gauges_are_zero_after_close_and_counters_stay() -> None:
    telemetry = Telemetry(job="j", model="m")
    telemetry.gauge("longtake_queue_items", 10)
    telemetry.count("longtake_frames_total", 5)
    telemetry.close()
    assert telemetry.values() == {("longtake_queue_items", ()): 0.0, ("longtake_frames_total", ()): 5.0}


def test_wrong_kind_label_or_direction_is_refused() -> None:
    telemetry = Telemetry(job="j", model="m")
    with pytest.raises(ValueError, match="is a counter"):
        telemetry.gauge("longtake_frames_total", 1)
    with pytest.raises(ValueError, match="labels"):
        telemetry.count("longtake_videos_total", item_id="a")
    with pytest.raises(ValueError, match="cannot fall"):
        telemetry.count("longtake_frames_total", -1)
    with pytest.raises(KeyError):
        telemetry.count("longtake_unheard_of")
    assert telemetry.values() == {}


def test_names_follow_their_kind() -> None:
    for name, spec in METRICS.items():
        assert name.startswith("longtake_")
        assert name.endswith("_total") == (spec.kind == "counter")
        assert not {"item_id", "prompt"} & set(spec.labels)

"""Renders over a tile table through the worker: an MP4 that is decoded again, dense attention where all is kept, and
what is left when memory runs out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.object_store import open_store
from longtake import open_manifest
from tests.killed_jobs import KilledJob, undisturbed
from tests.tile_takes import SMALL, make_task, render
from workers.actor import RenderActor
from workers.assemble import LADDER, LoadedModel, load_model, prepare_take
from workers.config import RenderConfig
from workers.metrics import Stopwatch
from workers.pipeline import TakeRecord, roll_out, utc_now
from workers.rollout import CleanChunk
from workers.task import RenderResult, RenderSetup
from workers.video.decode import probe
from workers.warm_up import warm_up

TINY: dict[str, Any] = {
    "backbone": {"name": "tiny-test"},
    "video": {"width": 64, "height": 32},
    "sampling": {"num_steps": 2},
}


def make_model(policy: str = "fastar-tiles", **fields: Any) -> LoadedModel:
    return load_model(RenderConfig.model_validate({"policy": policy, **TINY, **fields}))


@torch.inference_mode()
def chunks_of(model: LoadedModel, num_frames: int) -> list[tuple[CleanChunk, np.ndarray[Any, Any]]]:
    record = TakeRecord(utc_now(), time.perf_counter(), Stopwatch(model.device))
    return list(roll_out(make_task(num_frames), model, prepare_take(model, 0), record))


def test_the_bundled_model_through_the_actor_into_an_mp4(tmp_path: Path) -> None:
    record = {"policy": "fastar-tiles", "sampling": {"num_steps": 1}, "cache": SMALL, "attention": {"density": 0.3}}
    setup = RenderSetup(job_id="job", config=RenderConfig.model_validate(record), store_url=str(tmp_path))
    actor = RenderActor(setup)
    info = actor.load()
    (result,) = actor.run([make_task(60)])
    actor.close()
    assert isinstance(result, RenderResult), result
    video = probe(tmp_path / result.video_key)
    assert (video.num_frames, video.width, video.height) == (60, 128, 128)
    assert result.kv_policy == "tiles-15-8-pairs-int4"
    assert result.backend == info.backend
    assert result.backend.startswith("listed tiles by plain torch")
    # Chunks of 192 tokens, tiles of 8; of 120 tiles that can be chosen 36 are.
    seen = 36 * 8 + 192
    assert [chunk.density for chunk in result.chunks] == pytest.approx(
        [min(1.0, seen / (192 * (index + 1))) for index in range(5)]
    )
    assert result.stage_s.denoise > 0
    assert result.stage_s.cache > 0
    assert result.chunks[-1].kv_bytes == result.kv_bytes > result.chunks[0].kv_bytes


def test_keeping_and_seeing_all_gives_the_frames_of_dense_attention() -> None:
    whole = {
        "cache": {"budget_latent_frames": 60, "storage": "model"},
        "attention": {"density": 1.0, "history_at": None, "clean_pass_share": 1.0},
    }
    found, expected = chunks_of(make_model(**whole), 84), chunks_of(make_model("dense"), 84)
    assert len(found) == len(expected) == 7
    for (chunk, frames), (other, other_frames) in zip(found, expected, strict=True):
        torch.testing.assert_close(chunk.latents_BTCHW, other.latents_BTCHW, rtol=1e-4, atol=1e-4)
        assert np.abs(frames.astype(int) - other_frames).max() <= 1


def test_a_take_after_another_and_after_warming_up_is_as_if_it_came_first(tmp_path: Path) -> None:
    model, other = make_model(cache=SMALL), make_model(cache=SMALL)
    warm_up(other)
    first, again = render(model, tmp_path), render(model, tmp_path, task_id="b-0")
    third = render(other, tmp_path, task_id="c-0")
    assert first.frames_sha256 == again.frames_sha256 == third.frames_sha256


def test_a_table_that_merges_pairs_says_so_and_makes_other_frames(tmp_path: Path) -> None:
    chains, pairs = (make_model(cache=SMALL | {"merging": rule, "storage": "model"}) for rule in ("chains", "pairs"))
    first, second = render(chains, tmp_path), render(pairs, tmp_path, task_id="b-0")
    assert second.kv_policy == f"{first.kv_policy}-pairs"
    assert second.frames_sha256 != first.frames_sha256
    assert render(pairs, tmp_path, task_id="c-0").frames_sha256 == second.frames_sha256


def test_where_memory_ran_out_the_table_gives_way_to_a_window(tmp_path: Path) -> None:
    model = make_model(cache=SMALL)
    assert render(model, tmp_path).kv_policy == "tiles-15-8-pairs-int4"
    last = render(model, tmp_path, task_id="b-0", ladder_rung=len(LADDER))
    assert (last.kv_policy, last.ladder) == ("window-3+21", LADDER)
    assert last.backend.startswith("sdpa")
    assert model.seat is not None
    with pytest.raises(AssertionError, match="begin_take comes first"):
        _ = model.seat.table  # given back
    first_rung = render(model, tmp_path, task_id="c-0", ladder_rung=1)
    assert first_rung.kv_policy == "tiles-15-8-pairs-int4"


def test_an_attempt_in_float32_has_a_table_of_its_own(tmp_path: Path) -> None:
    half = make_model(cache=SMALL, backbone={"name": "tiny-test", "dtype": "bfloat16"})
    wide = render(half, tmp_path, full_precision=True)
    assert wide.ladder == ("float32",)
    assert wide.kv_policy == "tiles-15-8-pairs-int4"
    plain = render(make_model(cache=SMALL), tmp_path, task_id="b-0")
    assert abs(wide.quality.mean_luma - plain.quality.mean_luma) < 1
    assert render(half, tmp_path, task_id="c-0").ladder == ()


def test_linear_layers_in_8_bit_floats_change_frames_a_little_and_say_so(tmp_path: Path) -> None:
    fields = {"cache": SMALL, "backbone": {"name": "tiny-test", "fp8": "all"}}
    plain, rounded = make_model(cache=SMALL), make_model(**fields)
    first, second = render(plain, tmp_path), render(rounded, tmp_path, task_id="b-0")
    assert second.backend == f"{first.backend}, linear layers in 8-bit floats: all"
    assert second.frames_sha256 != first.frames_sha256
    assert abs(second.quality.mean_luma - first.quality.mean_luma) < 2
    assert plain.config.fingerprint != rounded.config.fingerprint, "no snapshot of one is gone on with by the other"
    assert render(make_model(**fields), tmp_path, task_id="c-0").frames_sha256 == second.frames_sha256
    exact = render(rounded, tmp_path, task_id="d-0", full_precision=True)
    assert exact.frames_sha256 == first.frames_sha256, "an attempt in float32 has its linear layers in it too"


def test_attention_in_8_bit_floats_changes_frames_a_little_and_says_so(tmp_path: Path) -> None:
    plain, *rounded = (make_model(cache=SMALL, attention={"fp8": fp8}) for fp8 in ("none", "steps", "all"))
    first, *others = (render(model, tmp_path, task_id=f"{i}-0") for i, model in enumerate((plain, *rounded)))
    for other, calls in zip(others, ("denoising steps", "all calls"), strict=True):
        assert other.backend == f"{first.backend}, attention in 8-bit floats in {calls} (rounded by plain torch)"
        assert abs(other.quality.mean_luma - first.quality.mean_luma) < 2
    assert len({result.frames_sha256 for result in (first, *others)}) == 3
    assert len({model.config.fingerprint for model in (plain, *rounded)}) == 3
    exact = render(rounded[0], tmp_path, task_id="d-0", full_precision=True)
    assert exact.frames_sha256 == first.frames_sha256


@pytest.mark.slow
@pytest.mark.alone
def test_a_job_whose_driver_is_killed_ends_with_the_frames_of_an_undisturbed_actor(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    look = {("render", "policy"): "fastar-tiles", ("render", "cache", "budget_latent_frames"): 24}
    with KilledJob(tmp_path, "--policy", "fastar-tiles", "--cache-budget-latent-frames", "24") as job:
        driver, store = job.start(), open_store(job.root)
        while not any(True for _ in store.list("videos/")):  # in the middle of things
            assert driver.poll() is None
            time.sleep(0.05)
        driver.kill()
        driver.wait()
        job.finish(job.start("--takeover"))
        rows = open_manifest(job.root).to_table(columns=["item_id", "frames_sha256", "kv_policy"]).to_pylist()
    assert {row["kv_policy"] for row in rows} == {"tiles-24-8-pairs-int4"}
    assert {f"{row['item_id']}-0": row["frames_sha256"] for row in rows} == undisturbed(tmp_path / "alone", look)

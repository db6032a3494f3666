"""Tiny Wan-class models by each rollout, from published files to an MP4 on the CPU, with every kind of cache."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from tests.wan_files import TINY, write_whole_model
from workers.actor import RenderActor
from workers.assemble import load_model
from workers.checkpoints import fetch
from workers.config import (
    BackboneConfig,
    CacheConfig,
    DenseCacheConfig,
    FlowCacheConfig,
    GuardConfig,
    NativeCacheConfig,
    RenderConfig,
    SamplingConfig,
    VideoConfig,
    WindowCacheConfig,
)
from workers.config_reuse import TeaCacheConfig
from workers.errors import ConfigUnsupported
from workers.model.backbones import BACKBONES, Native
from workers.task import PromptSegment, RenderResult, RenderSetup, RenderTask
from workers.video.decode import probe

FRAMES = 69  # six chunks: 9 pictures and five times 12
TASK = RenderTask(
    task_id="red-0",
    item_id="red",
    sample_index=0,
    attempt="e1a1",
    segments=(PromptSegment(frame=0, prompt="a red house"), PromptSegment(frame=33, prompt="a blue house")),
    seed=3,
    num_frames=FRAMES,
)
ROLLING = replace(
    TINY,
    name="tiny-rolling",
    rollout="rolling",
    native=Native(num_steps=3, shift=5.0, window_chunks=3, attended_latent_frames=12, sink_latent_frames=3),
)
CHUNKWISE = replace(TINY, name="tiny-chunkwise", native=Native(num_steps=3, shift=5.0, attended_latent_frames=9))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fetch, "DEFAULT_CACHE", tmp_path / "cache")
    for backbone in (ROLLING, CHUNKWISE):
        monkeypatch.setitem(BACKBONES, backbone.name, backbone)
    return write_whole_model(tmp_path / "w")


def config(folder: Path, name: str, cache: CacheConfig, **parts) -> RenderConfig:
    return RenderConfig(
        backbone=BackboneConfig(name=name, checkpoint=str(folder)),
        sampling=SamplingConfig(num_steps=3, shift=5.0),
        cache=cache,
        video=VideoConfig(width=64, height=32),
        **parts,
    )


def render(root: Path, render_config: RenderConfig) -> RenderResult:
    actor = RenderActor(RenderSetup(job_id="job", config=render_config, store_url=str(root)))
    actor.load()
    (outcome,) = actor.run([TASK])
    actor.close()
    assert isinstance(outcome, RenderResult), outcome
    return outcome


CACHES: dict[str, CacheConfig] = {
    "native": NativeCacheConfig(),
    "dense": DenseCacheConfig(),
    "window-3+6": WindowCacheConfig(sink_latent_frames=3, recent_latent_frames=6),
    "flow-12": FlowCacheConfig(budget_latent_frames=12, sink_latent_frames=3, recent_latent_frames=3),
}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("tiny-rolling", ("native", "dense")),
        pytest.param("tiny-rolling", tuple(CACHES), marks=pytest.mark.slow),
        pytest.param("tiny-chunkwise", tuple(CACHES), marks=pytest.mark.slow),
    ],
)
def test_a_whole_video_is_rendered(folder: Path, tmp_path: Path, name: str, kinds: tuple[str, ...]) -> None:
    results = {}
    for kind in kinds:
        result = results[kind] = render(tmp_path / kind, config(folder, name, CACHES[kind]))
        assert result.kv_policy == kind
        assert probe(tmp_path / kind / result.video_key).num_frames == FRAMES
        assert [chunk.chunk_index for chunk in result.chunks] == list(range(6))
    assert results["native"].kv_bytes < results["dense"].kv_bytes
    assert len({result.frames_sha256 for result in results.values()}) == len(kinds)


def test_a_guarded_rolling_window_renders(folder: Path, tmp_path: Path) -> None:
    cache = WindowCacheConfig(sink_latent_frames=3, recent_latent_frames=3)
    result = render(tmp_path, config(folder, "tiny-rolling", cache, guard=GuardConfig(enabled=True, floor=0.99)))
    assert probe(tmp_path / result.video_key).num_frames == FRAMES
    assert any(chunk.recall is not None for chunk in result.chunks)


def test_what_cannot_go_together_is_refused_by_field(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigUnsupported, match=r"reuse\.kind: teacache .* tiny-rolling denoises several at once"):
        load_model(config(folder, "tiny-rolling", NativeCacheConfig(), reuse=TeaCacheConfig()))
    with pytest.raises(ConfigUnsupported, match=r"cache\.kind: native: tiny-wan-test has no window of its own"):
        load_model(config(folder, "tiny-wan-test", NativeCacheConfig()))
    other = config(folder, "tiny-rolling", NativeCacheConfig()).model_copy(update={"sampling": SamplingConfig()})
    with caplog.at_level(logging.WARNING):
        load_model(other)
    assert "trained with sampling.num_steps 3 and sampling.shift 5, asked for are 4 and 3" in caplog.text

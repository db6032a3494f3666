"""LongVie 2, tiny and with random weights, from published files and control videos to an MP4 on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.control_files import write_control, write_video
from tests.wan_files import TINY_I2V, scramble, write_whole_model
from workers.actor import RenderActor
from workers.assemble import in_full_precision, load_model
from workers.checkpoints import fetch
from workers.config import (
    BackboneConfig,
    CacheConfig,
    DenseCacheConfig,
    GuardConfig,
    NativeCacheConfig,
    RenderConfig,
    SamplingConfig,
    VideoConfig,
)
from workers.errors import ConfigUnsupported
from workers.model.backbones import BACKBONES, ControlBranchSizes, Native
from workers.model.control_branch import ControlBranch
from workers.releases import RELEASES
from workers.task import PromptSegment, RenderResult, RenderSetup, RenderTask
from workers.video.decode import probe

FRAMES = 161  # two clips, which share a picture
LONGVIE = replace(
    TINY_I2V,
    name="tiny-longvie",
    rollout="clipwise",
    sampler="euler",
    chunk_latent_frames=21,
    native=Native(num_steps=2, shift=5.0, guidance=2.0),
    control_branch=ControlBranchSizes(dim=40, num_layers=2, num_heads=1, ffn_dim=48),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Base model and LongVie 2's two files, as they are published."""
    monkeypatch.setattr(fetch, "DEFAULT_CACHE", tmp_path / "cache")
    monkeypatch.setitem(BACKBONES, LONGVIE.name, LONGVIE)
    monkeypatch.setitem(BACKBONES, "tiny-i2v", replace(TINY_I2V, name="tiny-i2v"))
    monkeypatch.setitem(RELEASES, LONGVIE.name, RELEASES["longvie2-14b"])
    folder = write_whole_model(tmp_path / "w", backbone=LONGVIE)
    torch.manual_seed(9)
    branch = ControlBranch(LONGVIE)
    scramble(branch)
    save_file(branch.state_dict(), str(folder / "control.safetensors"))
    dim = LONGVIE.dim
    save_file({"blocks.0.self_attn.q.weight": torch.randn(dim, dim) * 0.05}, str(folder / "dit.safetensors"))
    return folder


def config(folder: Path, cache: CacheConfig, name: str = "tiny-longvie", **parts) -> RenderConfig:
    return RenderConfig(
        backbone=BackboneConfig(name=name, checkpoint=str(folder)),
        sampling=SamplingConfig(num_steps=2, shift=5.0, guidance=2.0),
        cache=cache,
        video=VideoConfig(width=64, height=32),
        **parts,
    )


def render(root: Path, render_config: RenderConfig, control: Path | None, num_frames: int = FRAMES):
    task = RenderTask(
        task_id="valley-0",
        item_id="valley",
        sample_index=0,
        attempt="e1a1",
        segments=(PromptSegment(frame=0, prompt="a valley"),),
        negative_prompt="blurred",
        seed=3,
        num_frames=num_frames,
        control=None if control is None else str(control),
    )
    actor = RenderActor(RenderSetup(job_id="job", config=render_config, store_url=str(root)))
    actor.load()
    (outcome,) = actor.run([task])
    actor.close()
    return outcome


def test_a_clip_becomes_a_video(folder: Path, tmp_path: Path) -> None:
    control = write_control(tmp_path / "control", 1, num_named=5, width=48, height=32)
    result = render(tmp_path / "native", config(folder, NativeCacheConfig()), control, num_frames=30)
    assert isinstance(result, RenderResult), result
    assert probe(tmp_path / "native" / result.video_key).num_frames == 30


@pytest.mark.slow
def test_clips_become_one_video_and_a_persistent_cache_changes_later_ones(folder: Path, tmp_path: Path) -> None:
    control = write_control(tmp_path / "control", 2, num_named=5, width=48, height=32)
    native = render(tmp_path / "native", config(folder, NativeCacheConfig()), control)
    assert isinstance(native, RenderResult), native
    assert probe(tmp_path / "native" / native.video_key).num_frames == FRAMES
    assert [chunk.chunk_index for chunk in native.chunks] == [0, 1]
    assert (native.kv_bytes, native.kv_policy) == (0, "native")
    again = render(tmp_path / "again", config(folder, NativeCacheConfig()), control)
    assert again.frames_sha256 == native.frames_sha256
    dense = render(tmp_path / "dense", config(folder, DenseCacheConfig()), control)
    assert dense.kv_bytes == 18 * 8 * 2 * 4 * LONGVIE.dim * LONGVIE.num_layers  # 18 latent frames of 8 tokens


def test_full_precision_takes_the_control_module_along(folder: Path) -> None:
    backbone = BackboneConfig(name="tiny-longvie", checkpoint=str(folder), dtype="bfloat16")
    half = load_model(config(folder, NativeCacheConfig()).model_copy(update={"backbone": backbone}))
    full = in_full_precision(half)
    assert full.control_branch is not None
    assert {p.dtype for part in (full.dit, full.control_branch) for p in part.parameters()} == {torch.float32}
    assert half.control_branch is not None
    assert {p.dtype for part in (half.dit, half.control_branch) for p in part.parameters()} == {torch.bfloat16}
    maps = torch.zeros(1, 2, LONGVIE.in_channels, 4, 8)
    assert full.control_branch.embed_maps(full.dit, maps, maps).dense_BQE.dtype == torch.float32


def test_a_task_whose_control_does_not_fit_fails_with_its_clip(folder: Path, tmp_path: Path) -> None:
    control = write_control(tmp_path / "control", 2, width=48, height=32)
    write_video(control / "track_01.mp4", num_frames=80, width=48, height=32)
    failed = render(tmp_path / "s", config(folder, NativeCacheConfig()), control)
    assert (failed.kind, failed.retryable) == ("invalid_input", False)
    assert "clip 1: track: track_01.mp4 has 80 pictures" in failed.message
    failed = render(tmp_path / "s", config(folder, NativeCacheConfig()), None)
    assert "control: tiny-longvie needs a folder with cond.json" in failed.message


def test_what_clips_cannot_do_is_refused_at_load(folder: Path) -> None:
    with pytest.raises(ConfigUnsupported, match=r"guard\.enabled: tiny-longvie"):
        load_model(config(folder, DenseCacheConfig(), guard=GuardConfig(enabled=True)))
    with pytest.raises(ConfigUnsupported, match=r"backbone\.name: tiny-i2v takes a picture"):
        load_model(config(folder, DenseCacheConfig(), name="tiny-i2v"))

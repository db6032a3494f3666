"""Wan-class models, tiny and with random weights, from files as they are published to an MP4 on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.object_store import open_store
from tests.bench.random_wan import write_random_wan
from tests.servers import shared_moto, use_endpoint
from tests.wan_files import TINY, TINY_I2V, make_dit, scramble, write_forcing, write_whole_model
from workers import registry
from workers.actor import RenderActor
from workers.assemble import load_model
from workers.checkpoints import fetch
from workers.config import BackboneConfig, RenderConfig, SamplingConfig, VideoConfig
from workers.errors import CheckpointMismatch, ConfigUnsupported
from workers.model.backbones import BACKBONES, ControlBranchSizes, find_backbone
from workers.model.control_branch import ControlBranch
from workers.model.umt5 import Umt5Encoder
from workers.model.wan_vae import WanVae
from workers.releases import RELEASES, Published, Release
from workers.task import PromptSegment, RenderResult, RenderSetup, RenderTask
from workers.video.decode import probe

FRAMES = 21  # two chunks, of 9 and of 12 pictures
TASK = RenderTask(
    task_id="red-0",
    item_id="red",
    sample_index=0,
    attempt="e1a1",
    segments=(PromptSegment(frame=0, prompt="the camera flies over a red house"),),
    seed=3,
    num_frames=FRAMES,
)


def config(checkpoint: Path | str | None, **backbone: str | bool) -> RenderConfig:
    return RenderConfig(
        backbone=BackboneConfig(
            **{"name": "tiny-wan-test"} | backbone, checkpoint=None if checkpoint is None else str(checkpoint)
        ),
        sampling=SamplingConfig(num_steps=2, shift=5.0),
        video=VideoConfig(width=64, height=32),
    )


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "DEFAULT_CACHE", tmp_path / "cache")


def render(root: Path, render_config: RenderConfig) -> RenderResult:
    actor = RenderActor(RenderSetup(job_id="job", config=render_config, store_url=str(root)))
    info = actor.load()
    (outcome,) = actor.run([TASK])
    actor.close()
    assert isinstance(outcome, RenderResult), outcome
    assert outcome.model_revision == info.model_revision
    return outcome


def test_random_weights_of_benches_load_as_any_others_and_pass_the_gate(tmp_path: Path) -> None:
    num_bytes = write_random_wan(tmp_path / "weights", find_backbone("tiny-wan-test"))
    assert num_bytes == sum(path.stat().st_size for path in (tmp_path / "weights").rglob("*.safetensors"))
    result = render(tmp_path / "store", config(tmp_path / "weights", dtype="bfloat16"))
    assert (result.quality.black_ratio, result.quality.frozen_ratio) == (0, 0)
    assert 64 < result.quality.mean_luma < 192


def test_both_layouts_render_the_same_pixels(tmp_path: Path) -> None:
    results = []
    for layout in ("original", "diffusers"):
        folder = write_whole_model(tmp_path / layout, layout=layout)
        result = render(tmp_path / "store", config(folder))
        video = probe(tmp_path / "store" / result.video_key)
        assert (video.num_frames, video.width, video.height) == (FRAMES, 64, 32)
        assert result.quality.black_ratio == 0
        results.append(result)
    assert results[0].frames_sha256 == results[1].frames_sha256
    assert results[0].model_revision != results[1].model_revision  # other files, though of the same numbers


@pytest.mark.slow
def test_from_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = shared_moto()
    use_endpoint(monkeypatch, server)
    folder = write_whole_model(tmp_path / "w", layout="diffusers")
    url = f"s3://{server.new_bucket()}/models/tiny"
    store = open_store(url)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put_file(str(path.relative_to(folder)), path)
    here, there = load_model(config(folder)), load_model(config(url))
    assert here.revision == there.revision
    assert all(torch.equal(t, here.dit.state_dict()[key]) for key, t in there.dit.state_dict().items())


def test_a_distilled_checkpoint_over_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "tiny-forcing", replace(TINY, name="tiny-forcing"))
    release = Release(Published("a/b", "", ()), Published("c/d", "", ("checkpoints/forcing_dmd.pt",)))
    monkeypatch.setitem(RELEASES, "tiny-forcing", release)
    folder = write_whole_model(tmp_path / "w")
    with pytest.raises(CheckpointMismatch, match=r"no forcing_dmd\.pt; tiny-forcing needs it"):
        load_model(config(folder, name="tiny-forcing"))
    ema, plain = make_dit(seed=1).state_dict(), make_dit(seed=2).state_dict()
    (folder / "checkpoints").mkdir()
    inside = write_forcing(folder / "checkpoints" / "forcing_dmd.pt", {"generator": plain, "generator_ema": ema})
    own = write_forcing(tmp_path / "mine.pt", {"generator": plain})
    for found, expected in (
        (load_model(config(folder, name="tiny-forcing")), ema),
        (load_model(config(folder, name="tiny-forcing", use_ema=False)), plain),
        (load_model(config(folder, name="tiny-forcing", finetune=str(own))), plain),
        (load_model(config(folder, name="tiny-forcing", finetune=str(inside.parent))), ema),
    ):
        assert all(torch.equal(t, expected[key]) for key, t in found.dit.state_dict().items())


def test_longvie_over_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ControlBranchSizes(dim=40, num_layers=2, num_heads=1, ffn_dim=48)
    backbone = replace(TINY_I2V, name="tiny-longvie", rollout="clipwise", chunk_latent_frames=21, control_branch=sizes)
    monkeypatch.setitem(BACKBONES, "tiny-longvie", backbone)
    release = Release(Published("a/b", "", ()), Published("c/d", "", ("dit.safetensors", "control.safetensors")))
    monkeypatch.setitem(RELEASES, "tiny-longvie", release)
    folder = write_whole_model(tmp_path / "w", backbone=TINY_I2V)
    own = tmp_path / "longvie"
    own.mkdir()
    tuned = {key: t for key, t in make_dit(TINY_I2V, seed=9).state_dict().items() if ".self_attn." in key}
    branch = ControlBranch(BACKBONES["tiny-longvie"])
    scramble(branch)
    save_file(tuned, str(own / "dit.safetensors"))
    save_file(
        {f"pipe.dual_controller.{key}": t for key, t in branch.state_dict().items()}, str(own / "control.safetensors")
    )
    model = load_model(config(folder, name="tiny-longvie", finetune=str(own)))
    assert model.control_branch is not None
    assert model.image_encoder is not None
    assert all(torch.equal(t, branch.state_dict()[key]) for key, t in model.control_branch.state_dict().items())
    expected = make_dit(TINY_I2V).state_dict() | tuned
    assert all(torch.equal(t, expected[key]) for key, t in model.dit.state_dict().items())
    assert model.image_encoder.encode(torch.zeros(1, 3, 28, 28)).shape == (1, 5, 32)
    found = registry.check(str(folder), "tiny-longvie", str(own), fetch=False)
    assert found["is_complete"], found
    (own / "control.safetensors").unlink()
    with pytest.raises(CheckpointMismatch, match=r"no control\.safetensors; tiny-longvie needs it"):
        load_model(config(folder, name="tiny-longvie", finetune=str(own)))


def test_the_three_objects_of_the_pipeline(tmp_path: Path) -> None:
    model = load_model(config(write_whole_model(tmp_path / "w"), dtype="bfloat16"))
    assert isinstance(model.text_encoder, Umt5Encoder)
    assert isinstance(model.vae, WanVae)
    assert {p.dtype for p in model.dit.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.module.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.dit.parameters())
    assert not model.dit.training


def test_what_is_missing_is_said_before_the_transformer_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigUnsupported, match=r"backbone\.checkpoint: tiny-wan-test needs published weights"):
        load_model(config(None))
    folder = write_whole_model(tmp_path / "w")
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (folder / "Wan2.1_VAE.pth").rename(tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointMismatch, match="no VAE: expected"):
        load_model(config(folder))


@pytest.mark.slow
def test_one_command_renders_it(tmp_path: Path) -> None:
    folder = write_whole_model(tmp_path / "w")
    (tmp_path / "prompts.txt").write_text("the camera flies over a red house\na green hill\n")
    command = [sys.executable, "-m", "jobs.render", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    command += ["--model", "tiny-wan-test", "--checkpoint", str(folder), "--width", "64", "--height", "32"]
    command += ["--frames", "21", "--steps", "2", "--job-id", "wan", "--actors", "1", "--no-sheet"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "wan" / "_result.json").read_text())["exit_code"] == 0
    assert len(list((tmp_path / "out" / "wan" / "videos").rglob("*.mp4"))) == 2

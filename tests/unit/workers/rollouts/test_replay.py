"""Recordings of another implementation (here the plain rollouts) replay below the tolerance, and mistakes do not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import workers.model.attend
from tests.plain_rollouts import (
    COLUMNS,
    FRAMES,
    ROWS,
    TINY,
    PlainClip,
    make_model,
    roll_chunks,
    roll_clips,
    roll_windows,
)
from workers.denoise import make_flow_schedule
from workers.kernels.sdpa import SdpaKernel
from workers.model.backbones import ControlBranchSizes
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT
from workers.model.rope import Rotation
from workers.rollouts.replay import Recording, ReplayModel, ReplaySettings, replay, run_recorded

CHUNKS = 10
ROLLING = ReplaySettings("rolling", CHUNKS, step_list=(1000, 800, 600, 400, 200), sink_latent_frames=3)
CHUNKWISE = ReplaySettings("chunkwise", CHUNKS, step_list=(1000, 750, 500, 250))
CLIPWISE = ReplaySettings("clipwise", 2, num_steps=3, guidance=2.0)
I2V = replace(
    TINY,
    in_channels=36,
    image_dim=32,
    sampler="euler",
    control_branch=ControlBranchSizes(dim=40, num_layers=2, num_heads=1, ffn_dim=48),
)


@pytest.fixture(scope="module")
def model() -> CausalDiT:
    return make_model(TINY)


def record_chunks(model: CausalDiT, settings: ReplaySettings) -> Recording:
    """Noise and prompt as another implementation would have drawn them, and the chunks that it would have made."""
    torch.manual_seed(17)
    initial = torch.randn(1, CHUNKS * FRAMES, 16, 2 * ROWS, 2 * COLUMNS)
    tensors = {"noise.initial": initial, "prompt.text": torch.randn(1, 12, TINY.text_dim)}
    tensors["prompt.text"][:, 7:] = 0.0  # padding, attended
    for c in range(CHUNKS):
        for k in range(1, len(settings.step_list)):
            tensors[f"noise.{c}.{k}"] = torch.randn(1, FRAMES, 16, 2 * ROWS, 2 * COLUMNS)
    prompt = model.project_prompt(tensors["prompt.text"])

    def noise(c: int, k: int) -> Tensor:
        return initial[:, c * FRAMES : (c + 1) * FRAMES] if k == 0 else tensors[f"noise.{c}.{k}"]

    with torch.no_grad():
        if settings.rollout == "rolling":
            chunks = roll_windows(model, CHUNKS, noise, prompt)
        else:
            chunks = roll_chunks(model, CHUNKS, noise, prompt, 21, 0)
    return Recording(settings, tensors | {f"chunk.{c}": x for c, x in enumerate(chunks)})


@pytest.fixture(scope="module")
def rolling(model: CausalDiT) -> Recording:
    return record_chunks(model, ROLLING)


def test_a_recorded_rolling_window_replays(model, rolling) -> None:
    report = replay(ReplayModel(model, SdpaKernel()), rolling)
    assert [d.name for d in report.differences] == [f"chunk.{c}" for c in range(CHUNKS)]
    assert all(d.std > 0.5 for d in report.differences)
    assert report.worst <= 1e-4
    assert report.not_made == ()


def test_a_recorded_chunkwise_run_replays(model) -> None:
    report = replay(ReplayModel(model, SdpaKernel()), record_chunks(model, CHUNKWISE))
    assert len(report.differences) == CHUNKS
    assert report.worst <= 1e-4


def test_recorded_clips_replay() -> None:
    model = make_model(I2V)
    branch = ControlBranch(I2V).eval().requires_grad_(False)
    torch.manual_seed(19)
    clips = [
        PlainClip(
            noise=torch.randn(1, 5, 16, 2 * ROWS, 2 * COLUMNS),
            condition=torch.randn(1, 5, 20, 2 * ROWS, 2 * COLUMNS),
            dense=torch.randn(1, 5, 36, 2 * ROWS, 2 * COLUMNS),
            sparse=torch.randn(1, 5, 36, 2 * ROWS, 2 * COLUMNS),
            text=[torch.randn(1, 6, I2V.text_dim) for _ in range(2)],
            image=torch.randn(1, 7, I2V.image_dim),
            history=torch.randn(1, 2, 16, 2 * ROWS, 2 * COLUMNS) if j else None,
        )
        for j in range(2)
    ]
    tensors = {}
    for j, clip in enumerate(clips):
        for name in ("noise", "condition", "dense", "sparse", "image", "history"):
            if getattr(clip, name) is not None:
                tensors[f"clip.{j}.{name}"] = getattr(clip, name)
        tensors |= {f"clip.{j}.text": clip.text[0], f"clip.{j}.negative": clip.text[1]}
    with torch.no_grad():
        latents = roll_clips(model, branch, clips, list(make_flow_schedule(3, 5.0).sigmas), 2.0, 0)
    recording = Recording(CLIPWISE, tensors | {f"chunk.{j}": x for j, x in enumerate(latents)})
    ours = ReplayModel(model, SdpaKernel(), branch)
    assert replay(ours, recording).worst <= 1e-4
    calls = run_recorded(ours, recording)
    assert calls["call.1.2.1.flow"].shape == clips[1].noise.shape  # the clip's own frames, without history
    assert calls["call.1.2.1.latents"].shape == clips[1].noise.shape
    without = {name: x for name, x in recording.tensors.items() if name != "clip.1.history"}
    assert replay(ours, Recording(CLIPWISE, without)).worst > 1e-2


def test_a_run_of_ours_replays_call_by_call_to_the_last_bit(model, rolling, tmp_path: Path) -> None:
    ours = ReplayModel(model, SdpaKernel())
    path = tmp_path / "run.safetensors"
    Recording(ROLLING, {**rolling.tensors, **run_recorded(ours, rolling)}).save(path)
    opened = Recording.open(path)
    assert opened.settings == ROLLING
    report = replay(ours, opened)
    num_calls = CHUNKS + 4 + CHUNKS - 1  # windows, and the clean pass of every chunk but the last
    assert len(report.differences) == 3 * num_calls + CHUNKS
    assert {d.max_abs for d in report.differences} == {0.0}


def test_recorded_calls_that_we_do_not_make_are_named(model, rolling) -> None:
    extra = {**rolling.tensors, f"call.{CHUNKS - 1}.clean.0.flow": torch.zeros(1, FRAMES, 16, 2 * ROWS, 2 * COLUMNS)}
    assert replay(ReplayModel(model, SdpaKernel()), Recording(ROLLING, extra)).not_made == ("call.9.clean.0.flow",)


def test_nan_and_other_shapes_never_pass_for_small(model, rolling) -> None:
    ours = ReplayModel(model, SdpaKernel())
    spoilt = {**rolling.tensors, "chunk.3": rolling.tensors["chunk.3"] * torch.nan}
    assert not replay(ours, Recording(ROLLING, spoilt)).worst <= 1e-4
    spoilt["chunk.3"] = rolling.tensors["chunk.3"][:, :1]
    assert not replay(ours, Recording(ROLLING, spoilt)).worst <= 1e-4
    inputs = {name: x for name, x in rolling.tensors.items() if not name.startswith("chunk.")}
    assert not replay(ours, Recording(ROLLING, inputs)).worst <= 1e-4


def test_a_missing_input_is_named(model, rolling) -> None:
    tensors = {name: x for name, x in rolling.tensors.items() if name != "noise.2.1"}
    with pytest.raises(ValueError, match=r"no tensor 'noise\.2\.1'"):
        replay(ReplayModel(model, SdpaKernel()), Recording(ROLLING, tensors))


@pytest.mark.parametrize(
    "settings",
    [
        replace(ROLLING, shift=8.0),
        replace(ROLLING, shift=1.0),
        replace(ROLLING, sink_latent_frames=0),
        replace(ROLLING, attended_latent_frames=24),
    ],
    ids=["shift of the wrapper", "list not warped", "no sink", "not capped"],
)
def test_wrong_settings_show_far_above_the_tolerance(model, rolling, settings: ReplaySettings) -> None:
    assert replay(ReplayModel(model, SdpaKernel()), Recording(settings, rolling.tensors)).worst > 1e-2


def test_masked_padding_shows_far_above_the_tolerance(model, rolling) -> None:
    tensors = {**rolling.tensors, "prompt.text": rolling.tensors["prompt.text"][:, :7]}
    assert replay(ReplayModel(model, SdpaKernel()), Recording(ROLLING, tensors)).worst > 1e-2


def test_rotation_by_halves_shows_far_above_the_tolerance(model, rolling, monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = rotation
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

    monkeypatch.setattr(workers.model.attend, "rotate", rotate_halves)
    assert replay(ReplayModel(model, SdpaKernel()), rolling).worst > 1e-2

"""Every call of every rollout against the published models and loops written from their formulas alone."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.plain_rollouts import make_model
from tests.published import ChunkBuffer, RollingBuffer, State, Wan, longvie, rolling_forcing, self_forcing
from workers.kernels.reference import ReferenceKernel
from workers.model.backbones import Backbone, ControlBranchSizes, find_backbone
from workers.model.control_branch import ControlBranch
from workers.rollouts.replay import Recording, ReplayModel, ReplaySettings, replay, run_recorded

ROWS, COLUMNS, FRAMES = 2, 3, 3
LATENT = (2 * ROWS, 2 * COLUMNS)
T2V = replace(find_backbone("wan2.1-t2v-1.3b"), dim=80, num_heads=2, num_layers=3, ffn_dim=96, text_dim=32)
I2V = replace(
    find_backbone("longvie2-14b"),
    dim=80,
    num_heads=2,
    num_layers=4,
    ffn_dim=96,
    text_dim=32,
    image_dim=32,
    chunk_latent_frames=5,
    control_branch=ControlBranchSizes(dim=40, num_layers=2, num_heads=1, ffn_dim=48),
)
FOUR, FIVE = (1000, 750, 500, 250), (1000, 800, 600, 400, 200)


def draw(frames: int = FRAMES, channels: int = 16) -> Tensor:
    return torch.randn(1, frames, channels, *LATENT)


def draw_text() -> Tensor:
    text = torch.randn(1, 12, 32)
    text[:, 7:] = 0.0
    return text


def draw_inputs(num_chunks: int, steps: tuple[int, ...], num_given: int = 0) -> State:
    torch.manual_seed(23)
    tensors = {"prompt.text": draw_text(), "noise.initial": draw((num_chunks - num_given) * FRAMES)}
    if num_given:
        tensors["latents.initial"] = draw(num_given * FRAMES)
    for c in range(num_given, num_chunks):
        tensors |= {f"noise.{c}.{k}": draw() for k in range(1, len(steps))}
    return tensors


def compare(backbone: Backbone, settings: ReplaySettings, tensors: State, num_calls: int) -> None:
    """Replay a published run; all of its calls and chunks must be ours, and near."""
    report = replay(ReplayModel(make_model(backbone), ReferenceKernel()), Recording(settings, tensors))
    num_recorded = sum(name.startswith(("call.", "chunk.")) for name in tensors)
    assert len(report.differences) == num_recorded - len(report.not_made)
    assert sum(d.name.endswith(".flow") for d in report.differences) == num_calls
    assert all(d.std > 0.3 for d in report.differences if d.name.startswith("chunk."))
    far = [d for d in report.differences if not d.max_abs <= 1e-4]
    assert far == []


@pytest.fixture(scope="module")
def t2v() -> Wan:
    return Wan(make_model(T2V).state_dict(), T2V.num_heads)


@pytest.mark.parametrize(("window", "sink", "num_chunks"), [(21, 0, 7), (9, 3, 8)], ids=["released", "windowed"])
def test_self_forcing(t2v: Wan, window: int, sink: int, num_chunks: int) -> None:
    tensors = draw_inputs(num_chunks, FOUR)
    with torch.no_grad():
        buffer = ChunkBuffer(ROWS, COLUMNS, size_frames=window, sink_frames=sink)
        tensors |= self_forcing(t2v, tensors, num_chunks, FOUR, buffer)
    settings = ReplaySettings(
        "chunkwise", num_chunks, step_list=FOUR, attended_latent_frames=window, sink_latent_frames=sink
    )
    compare(T2V, settings, tensors, 5 * num_chunks - 1)


def test_self_forcing_from_given_latents(t2v: Wan) -> None:
    tensors = draw_inputs(5, FOUR, num_given=2)
    with torch.no_grad():
        tensors |= self_forcing(t2v, tensors, 5, FOUR, ChunkBuffer(ROWS, COLUMNS))
    compare(T2V, ReplaySettings("chunkwise", 5, step_list=FOUR), tensors, 2 + 5 * 3 - 1)


def record_windows(wan: Wan, num_chunks: int) -> State:
    tensors = draw_inputs(num_chunks, FIVE)
    with torch.no_grad():
        return tensors | rolling_forcing(wan, tensors, num_chunks, FIVE, RollingBuffer(ROWS, COLUMNS))


def test_rolling_forcing(t2v: Wan) -> None:
    num_chunks = 12  # from the ninth on the first chunk after the sink is dropped
    settings = ReplaySettings("rolling", num_chunks, step_list=FIVE, sink_latent_frames=3)
    compare(T2V, settings, record_windows(t2v, num_chunks), num_chunks + 4 + num_chunks - 1)


@pytest.mark.parametrize("kind", ["chunkwise", "rolling"])
def test_timesteps_stay_in_float32_where_the_model_is_in_bfloat16(kind: str) -> None:
    steps = FOUR if kind == "chunkwise" else FIVE
    outputs = run_recorded(
        ReplayModel(make_model(T2V).bfloat16(), ReferenceKernel()),
        Recording(ReplaySettings(kind, 1, step_list=steps), draw_inputs(1, steps)),  # type: ignore[arg-type]
    )
    seen = [float(t[0, 0]) for name, t in outputs.items() if name.endswith(".timestep")]
    published = {4: (1000.0, 937.5, 833.3333, 625.0), 5: (1000.0, 952.38104, 882.35291, 769.23077, 555.55560)}
    assert seen == pytest.approx(published[len(steps)], abs=4e-5)


def test_what_a_recording_lacks_is_said(t2v: Wan) -> None:
    model, tensors = ReplayModel(make_model(T2V), ReferenceKernel()), draw_inputs(2, FOUR)
    with pytest.raises(ValueError, match=r"noise\.initial: 6 latent frames, chunk 2 begins at 6"):
        replay(model, Recording(ReplaySettings("chunkwise", 3, step_list=FOUR), tensors))
    with pytest.raises(ValueError, match=r"latents\.initial: 4 latent frames are no whole chunks of 3"):
        replay(model, Recording(ReplaySettings("chunkwise", 3, step_list=FOUR), tensors | {"latents.initial": draw(4)}))
    with pytest.raises(ValueError, match=r"latents\.initial: a rolling window begins with noise"):
        replay(model, Recording(ReplaySettings("rolling", 3, step_list=FIVE), tensors | {"latents.initial": draw(3)}))


def make_control() -> ControlBranch:
    torch.manual_seed(29)
    branch = ControlBranch(I2V).eval().requires_grad_(False)
    with torch.no_grad():
        for p in branch.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return branch


def record_clips(num_clips: int, num_steps: int) -> State:
    wan, control = Wan(make_model(I2V).state_dict(), I2V.num_heads), Wan(make_control().state_dict(), 1)
    torch.manual_seed(31)
    tensors, noise, frames = {}, draw(I2V.chunk_latent_frames), I2V.chunk_latent_frames
    for j in range(num_clips):
        tensors |= {f"clip.{j}.noise": noise, f"clip.{j}.condition": draw(frames, 20)}
        tensors |= {f"clip.{j}.{name}": draw(frames, 36) for name in ("dense", "sparse")}
        tensors |= {f"clip.{j}.{name}": draw_text() for name in ("text", "negative")}
        tensors[f"clip.{j}.image"] = torch.randn(1, 9, 32)
        if j:
            tensors[f"clip.{j}.history"] = draw(2)
    with torch.no_grad():
        return tensors | longvie(wan, control, tensors, num_clips, num_steps, guidance=5.0)


def test_longvie() -> None:
    settings, tensors = ReplaySettings("clipwise", 3, num_steps=4, guidance=5.0), record_clips(3, 4)
    report = replay(ReplayModel(make_model(I2V), ReferenceKernel(), make_control()), Recording(settings, tensors))
    assert len(report.differences) == 3 * (3 * 8 + 1)
    assert report.not_made == ()
    assert all(d.std > 0.3 for d in report.differences if d.name.startswith("chunk."))
    assert [d for d in report.differences if not d.max_abs <= 1e-4] == []


def test_the_documented_code_replays(t2v: Wan) -> None:
    text = (Path(__file__).parents[4] / "docs" / "replay.md").read_text()
    chunks, clips = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {"their_state_dict": t2v.state, "tensors": record_windows(t2v, 10)}
    exec(chunks, scope)  # noqa: S102
    report = scope["report"]
    assert (report.worst <= 1e-4, len(report.differences)) == (True, 3 * (14 + 9) + 10)
    assert "num_steps=50" in clips
    scope |= {"their_state_dict": make_model(I2V).state_dict(), "their_control_dict": make_control().state_dict()}
    scope["tensors"] = record_clips(2, 2)
    exec(clips.replace("num_steps=50", "num_steps=2"), scope)  # noqa: S102
    report = scope["report"]
    assert (report.worst <= 1e-4, len(report.differences)) == (True, 2 * (3 * 4 + 1))

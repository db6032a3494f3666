"""What a task means chunk by chunk, and what a foreign error means for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import StoreUnavailable
from cluster.object_store import open_store
from tests.tile_takes import FreeTurn
from workers.assemble import LADDER, LoadedModel, in_full_precision, load_model, prepare_take
from workers.config import BackboneConfig, RenderConfig, SamplingConfig, VideoConfig, WindowCacheConfig
from workers.errors import BadPrompt, DeviceBroken, GpuOutOfMemory, RenderError, UploadFailed
from workers.metrics import Stopwatch
from workers.model.backbones import find_backbone
from workers.model.text_encoder import TextEncoder
from workers.model.vae import to_pictures
from workers.pipeline import (
    TakeRecord,
    as_render_error,
    plan_path,
    plan_rollout,
    prompts_by_chunk,
    render_take,
    with_pictures,
)
from workers.rollout import CleanChunk
from workers.task import PromptSegment, RenderResult, RenderTask
from workers.worlds.camera import plan_camera

BACKBONE = find_backbone("longtake-world")


def make_task(*segments: tuple[int, str], num_frames: int = 60) -> RenderTask:
    return RenderTask(
        task_id="a-0",
        item_id="a",
        sample_index=0,
        attempt="e1a1",
        segments=tuple(PromptSegment(frame=frame, prompt=prompt) for frame, prompt in segments),
        seed=2**63 - 1,
        num_frames=num_frames,
    )


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([(0, "a")], "aaaaa"),
        ([(0, "a"), (24, "b")], "aabbb"),
        ([(0, "a"), (23, "b"), (36, "c")], "abbcc"),
        ([(0, "a"), (13, "b"), (14, "c")], "acccc"),
        ([(0, "a"), (1000, "b")], "aaaaa"),
        ([(0, "a"), (59, "b")], "aaaab"),
    ],
)
def test_a_prompt_holds_from_the_chunk_in_which_it_begins(segments: list[tuple[int, str]], expected: str) -> None:
    assert "".join(prompts_by_chunk(make_task(*segments), BACKBONE)) == expected


def test_one_prompt_moves_the_camera_as_planned() -> None:
    task = make_task((0, "pans left"))
    path = plan_path(task, ["pans left"] * 5, BACKBONE)
    assert np.array_equal(path, plan_camera("pans left", task.seed, 60))


def test_a_new_prompt_moves_the_camera_on_from_where_it_is() -> None:
    task = make_task((0, "the camera pans left"), (24, "the camera pans down fast"))
    path = plan_path(task, prompts_by_chunk(task, BACKBONE), BACKBONE)
    assert path.shape == (60, 2)
    assert np.array_equal(path[:24], plan_camera("the camera pans left", task.seed, 60)[:24])
    steps = np.diff(path, axis=0)
    assert (steps[:23, 0] < 0).all()
    assert (np.abs(steps[23:]) == [0, 4]).all()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BadPrompt("no"), BadPrompt),
        (torch.OutOfMemoryError("CUDA out of memory"), GpuOutOfMemory),
        (MemoryError(), GpuOutOfMemory),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), GpuOutOfMemory),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), DeviceBroken),
        (StoreUnavailable("503"), UploadFailed),
        (ValueError("what"), RenderError),
    ],
)
def test_a_foreign_error_gets_its_meaning(error: Exception, expected: type[RenderError]) -> None:
    meaning = as_render_error(error)
    assert type(meaning) is expected
    assert str(error) in str(meaning)


def test_the_last_rung_never_widens_a_window() -> None:
    narrow = WindowCacheConfig(sink_latent_frames=1, recent_latent_frames=5)
    config = RenderConfig(
        backbone=BackboneConfig(name="tiny-test"), cache=narrow, video=VideoConfig(width=64, height=32)
    )
    model = load_model(config)
    assert prepare_take(model, len(LADDER)).cache_name == "window-1+5"
    assert prepare_take(model, 0).decode_latent_frames is None
    assert prepare_take(model, 1).decode_latent_frames == 1


def test_an_attempt_in_full_precision_computes_in_float32_and_says_so(tmp_path: Path) -> None:
    video = VideoConfig(width=64, height=32, num_frames=12)
    half, full = (
        load_model(RenderConfig(backbone=BackboneConfig(name="tiny-test", dtype=dtype), video=video))
        for dtype in ("bfloat16", "float32")
    )
    task = make_task((0, "a meadow"), num_frames=12)
    store = open_store(str(tmp_path))

    def render(model: LoadedModel, *, full_precision: bool) -> RenderResult:
        attempt = task.model_copy(update={"full_precision": full_precision})
        return render_take(attempt, model, store, FreeTurn(), lambda *_: None)

    plain, again = render(half, full_precision=False), render(half, full_precision=True)
    assert (plain.ladder, again.ladder) == ((), ("float32",))
    assert plain.frames_sha256 != again.frames_sha256
    assert half.dit.dtype == torch.bfloat16, "the next take gets the model as it was loaded"
    assert in_full_precision(full) is full


def test_pictures_after_a_hard_cut_owe_nothing_to_those_before() -> None:
    config = RenderConfig(
        backbone=BackboneConfig(name="tiny-test", dtype="float32"), video=VideoConfig(width=64, height=32)
    )
    model = load_model(config)
    record = TakeRecord("", 0.0, Stopwatch(model.device))
    task = make_task((0, "a meadow, the camera cuts to a lake"), num_frames=160)
    after_cut = plan_rollout(task, model, record).after_cut
    cut = min(after_cut)
    latents = [torch.randn(1, 3, 16, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(cut + 2)]
    chunks = [CleanChunk(index, z, 0, 1.0) for index, z in enumerate(latents)]
    for rung in (0, 1):  # decoded whole, and one latent frame after the other
        shown = with_pictures(iter(chunks), after_cut, model, prepare_take(model, rung), record)
        pictures = np.concatenate([frames for _, frames in shown])
        with torch.no_grad():
            before, behind = (model.vae.stream().decode(torch.cat(part, 1)) for part in (latents[:cut], latents[cut:]))
            through = model.vae.stream().decode(torch.cat(latents, 1))
        expected = to_pictures(torch.cat([before, behind], 1)[0]).numpy()
        first = slice(12 * cut, 12 * cut + 4)
        assert np.abs(pictures.astype(int) - expected).max() <= 1
        assert np.abs(pictures[first].astype(int) - to_pictures(through[0, first]).numpy()).max() > 1


def test_prompts_are_read_before_the_take_has_the_gpu(tmp_path: Path) -> None:
    video, guided = VideoConfig(width=64, height=32), SamplingConfig(guidance=2.0)
    model = load_model(RenderConfig(backbone=BackboneConfig(name="tiny-test"), video=video, sampling=guided))
    events: list[str] = []

    class Reader(TextEncoder):
        def read_ahead(self, texts: Sequence[str]) -> None:
            events.extend(texts)

    class Turn(FreeTurn):
        def __enter__(self) -> None:
            events.append("its turn")

    assert isinstance(model.text_encoder, TextEncoder)
    reader = Reader(model.backbone).eval()
    reader.load_state_dict(model.text_encoder.state_dict())
    task = make_task((0, "a lake"), (24, "a hill"), (36, "a lake")).model_copy(update={"negative_prompt": "blurred"})
    render_take(task, replace(model, text_encoder=reader), open_store(str(tmp_path)), Turn(), lambda *_: None)
    assert events == ["a lake", "blurred", "a hill", "its turn"]

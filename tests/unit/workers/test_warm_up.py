"""A warmed-up process makes the frames of a cold one, and a warm-up that fails is no reason not to try a take."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from workers import warm_up as warm_up_module
from workers.actor import RenderActor
from workers.assemble import LoadedModel, load_model
from workers.config import BackboneConfig, RenderConfig, VideoConfig
from workers.errors import DeviceBroken, QualityRefused
from workers.model.backbones import find_backbone
from workers.model.compiled import compile_around_attention
from workers.task import PromptSegment, RenderResult, RenderSetup, RenderTask
from workers.warm_up import needs_warm_up, warm_up

TINY = RenderConfig(backbone=BackboneConfig(name="tiny-test"), video=VideoConfig(width=64, height=32))
TASK = RenderTask(
    task_id="a-0",
    item_id="a",
    sample_index=0,
    attempt="e1a1",
    segments=(PromptSegment(frame=0, prompt="a lake"),),
    seed=3,
    num_frames=12,
)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(TINY)


def test_warming_up_at_load_changes_no_frame_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = []
    for is_warm in (False, True):
        calls: list[LoadedModel] = []
        monkeypatch.setattr(warm_up_module, "needs_warm_up", lambda model, is_warm=is_warm: is_warm)
        monkeypatch.setattr(warm_up_module, "warm_up", lambda model, calls=calls: (calls.append(model), warm_up(model)))
        store = tmp_path / str(is_warm)
        actor = RenderActor(RenderSetup(job_id="job", config=TINY, store_url=str(store)))
        actor.load()
        assert len(calls) == is_warm
        assert not [path for path in store.rglob("*") if path.is_file()]
        (result,) = actor.run([TASK])
        assert isinstance(result, RenderResult), result
        hashes.append(result.frames_sha256)
        actor.close()
    assert hashes[0] == hashes[1]


def test_who_is_slow_at_first_is_warmed_up(model: LoadedModel) -> None:
    compiled = TINY.model_copy(update={"backbone": BackboneConfig(name="tiny-test", compiled=True)})
    assert not needs_warm_up(model)
    assert needs_warm_up(replace(model, config=compiled))
    assert needs_warm_up(replace(model, device=torch.device("cuda")))
    assert not needs_warm_up(replace(model, config=compiled, backbone=find_backbone("longvie2-14b")))


def test_a_take_compiles_nothing_that_warming_up_in_another_thread_has_not_compiled(tmp_path: Path) -> None:
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    actor = RenderActor(RenderSetup(job_id="job", config=TINY, store_url=str(tmp_path)))
    actor.load()
    assert actor._model is not None
    compile_around_attention(actor._model.dit, backend)
    with ThreadPoolExecutor(1) as load_thread:
        load_thread.submit(warm_up, actor._model).result()
    assert len(compiled) == 3
    with ThreadPoolExecutor(1) as run_thread:
        (result,) = run_thread.submit(actor.run, [TASK.model_copy(update={"num_frames": 36})]).result()
    assert isinstance(result, RenderResult), result
    assert len(compiled) == 3


def test_only_a_broken_device_keeps_an_actor_from_its_takes(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(warm_up_module, "generate", fail)
    error: Exception = QualityRefused("black")
    warm_up(model)
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(DeviceBroken):
        warm_up(model)

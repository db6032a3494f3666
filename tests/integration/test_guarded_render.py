"""The quality guard in a whole take: a policy that sees next to nothing is caught, tightened and rendered again."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.object_store import open_store
from workers.assemble import LoadedModel, TakeParts, load_model, prepare_take
from workers.attention.dense import DenseAttention
from workers.attention.estimate import RecallProbe
from workers.config import (
    BackboneConfig,
    CacheConfig,
    DenseCacheConfig,
    GuardConfig,
    RenderConfig,
    TemporalCacheConfig,
    VideoConfig,
)
from workers.contracts import AttentionPlan, AttentionPolicy, KeyValues, Moment, PlanPart
from workers.metrics import Stopwatch
from workers.model.attend import RolloutAttention
from workers.pipeline import TakeRecord, plan_rollout, render_take
from workers.rollout import Rollout
from workers.task import PromptSegment, RenderResult, RenderTask

FRAMES = 66


class Glimpse:
    """Sees the newest share of the cache: a terrible policy, better the tighter it is."""

    def __init__(self, density: float) -> None:
        self.density, self.factor = density, 1.0

    def begin_chunk(self, position_Q3: Tensor) -> None:
        """Nothing is shared among steps."""

    def tighten(self, factor: float) -> None:
        self.factor = factor

    def plan(
        self, layer_index: int, moment: Moment, q_BQND: Tensor, cached: KeyValues | None, own: KeyValues
    ) -> AttentionPlan:
        parts = [PlanPart("own", 0, own.num_tokens)]
        if cached is not None:
            seen = int(cached.num_tokens * min(1.0, self.density * self.factor))
            parts.insert(0, PlanPart("cached", cached.num_tokens - seen, cached.num_tokens))
        return AttentionPlan(tuple(parts))


class Held(nullcontext[None]):
    """The GPU is ours."""

    held_s = 0.0


def load(guard: GuardConfig, cache: CacheConfig | None = None) -> LoadedModel:
    video, backbone = VideoConfig(width=64, height=32), BackboneConfig(name="tiny-test")
    return load_model(RenderConfig(backbone=backbone, video=video, guard=guard, cache=cache or DenseCacheConfig()))


def make_task(attempt: str) -> RenderTask:
    segments = (PromptSegment(frame=0, prompt="a valley, the camera pans left"),)
    return RenderTask(
        task_id="a-0", item_id="a", sample_index=0, attempt=attempt, segments=segments, seed=7, num_frames=FRAMES
    )


def render(model: LoadedModel, policy: AttentionPolicy, root: Path, attempt: str) -> RenderResult:
    def prepare(model: LoadedModel, rung: int) -> TakeParts:
        return replace(prepare_take(model, rung), policy=policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.pipeline.prepare_take", prepare)
        store = open_store(str(root))
        return render_take(make_task(attempt), model, store, Held(), lambda frames, waited: None)


def test_a_policy_that_sees_nothing_is_tightened_and_rendered_again_densely(tmp_path: Path) -> None:
    model = load(GuardConfig(enabled=True, floor=0.85))
    policy = Glimpse(0.01)
    result = render(model, policy, tmp_path, "e1a1")
    recalls = [chunk.recall for chunk in result.chunks]
    actions = [chunk.guard for chunk in result.chunks]
    assert recalls[0] == pytest.approx(1.0)
    assert actions[:3] == [None, "tightened", "dense"]
    assert recalls[1] is not None
    assert recalls[1] < 0.85
    assert recalls[2] == pytest.approx(1.0)
    assert (result.guard_dense_chunks or 0) == actions.count("dense")
    assert (result.guard_tightened or 0) >= 2
    assert policy.factor > 1
    assert result.attn_recall_probe == pytest.approx(sum(r or 0 for r in recalls) / len(recalls))


def test_a_guarded_take_that_needs_no_guard_has_the_frames_of_an_unguarded_one(tmp_path: Path) -> None:
    off = render(load(GuardConfig()), DenseAttention(), tmp_path, "e1a1")
    on = render(load(GuardConfig(enabled=True)), DenseAttention(), tmp_path, "e1a2")
    assert on.frames_sha256 == off.frames_sha256
    assert on.attn_recall_probe == pytest.approx(1.0)
    assert (on.guard_tightened, on.guard_dense_chunks) == (0, 0)
    assert (off.attn_recall_probe, off.guard_tightened, off.guard_dense_chunks) == (None, None, None)
    assert [(chunk.recall, chunk.guard) for chunk in off.chunks] == [(None, None)] * len(off.chunks)


class AlwaysAgain:
    """Has each chunk denoised with a terrible policy first, then densely."""

    def __init__(self, attention: RolloutAttention) -> None:
        self.attention, self.num_again = attention, 0

    def begin_chunk(self) -> None:
        self.attention.policy = Glimpse(0.0)

    def wants_again(self) -> bool:
        was_dense = isinstance(self.attention.policy, DenseAttention)
        self.attention.policy = DenseAttention()
        self.num_again += not was_dense
        return not was_dense


def test_a_chunk_rendered_again_is_as_if_it_had_been_dense_at_once() -> None:
    model = load(GuardConfig())
    record = TakeRecord("", 0.0, Stopwatch(model.device))

    def roll(is_judged: bool) -> list[Tensor]:
        parts = prepare_take(model, 0)
        attention = RolloutAttention(model.backbone, parts.cache, DenseAttention(), model.kernel)
        judge = AlwaysAgain(attention) if is_judged else None
        plan = plan_rollout(make_task("e1a1"), model, record)
        chunks = list(Rollout(model.dit, attention, record.stopwatch, None, judge).run(plan))
        assert judge is None or judge.num_again == len(chunks)
        return [chunk.latents_BTCHW for chunk in chunks]

    again, dense = roll(True), roll(False)
    assert all(torch.equal(a, b) for a, b in zip(again, dense, strict=True))


def test_without_a_guard_no_probe_looks_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("asked although the guard is off")

    monkeypatch.setattr(RecallProbe, "wants", fail)
    monkeypatch.setattr(RecallProbe, "observe", fail)
    with torch.inference_mode():
        render(load(GuardConfig()), DenseAttention(), tmp_path, "e1a1")


def test_what_a_merging_cache_lost_is_estimated_from_its_audit_sample(tmp_path: Path) -> None:
    careless = TemporalCacheConfig(sink_latent_frames=1, recent_latent_frames=3, min_cosine=-1.0)
    model = load(GuardConfig(enabled=True, floor=0.99), careless)
    result = render(model, DenseAttention(), tmp_path, "e1a1")
    recalls = [chunk.recall for chunk in result.chunks]
    assert all(recall is not None and 0 <= recall <= 1 + 1e-6 for recall in recalls)
    assert min(recall or 0 for recall in recalls) < 0.99
    assert (result.guard_tightened or 0) > 0

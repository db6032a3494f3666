"""RenderActor on real files: the whole way of a task, and determinism whatever the order, process or rung."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from workers.actor import RenderActor
from workers.cache.dense import DenseCache
from workers.config import BackboneConfig, QualityGateConfig, RenderConfig, VideoConfig, WindowCacheConfig
from workers.errors import CheckpointMismatch, ConfigUnsupported
from workers.task import PromptSegment, RenderFailure, RenderOutcome, RenderResult, RenderSetup, RenderTask
from workers.video.decode import probe
from workers.video.writer import VideoWriter

TINY = RenderConfig(backbone=BackboneConfig(name="tiny-test"), video=VideoConfig(width=64, height=32))
FRAMES = 40  # four chunks
PATIENCE_S = 120.0


def make_setup(root: Path, config: RenderConfig = TINY) -> RenderSetup:
    return RenderSetup(job_id="job", config=config, store_url=str(root))


def make_task(name: str, *, attempt: str = "e1a1", rung: int = 0, switch: int | None = None) -> RenderTask:
    segments = [PromptSegment(frame=0, prompt=f"{name} valley, the camera pans left")]
    if switch is not None:
        segments.append(PromptSegment(frame=switch, prompt="a frozen lake, the camera drifts north"))
    return RenderTask(
        task_id=f"{name}-0",
        item_id=name,
        sample_index=0,
        attempt=attempt,
        segments=tuple(segments),
        seed=sum(name.encode()),
        num_frames=FRAMES,
        ladder_rung=rung,
    )


def load_actor(root: Path, config: RenderConfig = TINY) -> RenderActor:
    actor = RenderActor(make_setup(root, config))
    actor.load()
    return actor


class Gate:
    """Holds the take in hand at the end of its first chunks, with the GPU, until the test has looked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._is_there, self._may_go_on = threading.Semaphore(0), threading.Semaphore(0)
        write = VideoWriter.write

        def stop_and_write(writer: VideoWriter, frames: np.ndarray) -> None:
            self._is_there.release()
            assert self._may_go_on.acquire(timeout=PATIENCE_S)
            write(writer, frames)

        monkeypatch.setattr(VideoWriter, "write", stop_and_write)

    def wait(self) -> None:
        """Until the take stands at the end of its next chunk."""
        assert self._is_there.acquire(timeout=PATIENCE_S)

    def open(self, num_chunks: int = 1) -> None:
        """Let it go on for so many chunks."""
        self._may_go_on.release(num_chunks)


def must_succeed(outcome: RenderOutcome) -> RenderResult:
    assert isinstance(outcome, RenderResult), outcome
    return outcome


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def actor(root: Path) -> Iterator[RenderActor]:
    actor = load_actor(root)
    yield actor
    actor.close()


@pytest.fixture(scope="module")
def two(actor: RenderActor) -> dict[str, RenderResult]:
    outcomes = actor.run([make_task("red"), make_task("blue")])
    return {outcome.task_id: must_succeed(outcome) for outcome in outcomes}


def test_videos_are_complete_and_the_rows_say_what_they_hold(root: Path, two: dict[str, RenderResult]) -> None:
    assert set(two) == {"red-0", "blue-0"}
    for result in two.values():
        found = probe(root / result.video_key)
        assert (found.num_frames, found.width, found.height, found.fps) == (FRAMES, 64, 32, 16.0)
        assert result.num_frames == FRAMES
        assert (root / result.video_key).stat().st_size == result.num_bytes
        assert found.metadata["item_id"] == result.task_id.removesuffix("-0")
        assert [c.chunk_index for c in result.chunks] == [0, 1, 2, 3]
        assert result.kv_bytes == 3 * 3 * 8 * 2 * 80 * 3 * 4  # chunks, latent frames, tokens, K and V, width, layers
        assert result.kv_compression_ratio == 1.0
        assert 0 < result.gpu_s <= result.wall_s
        assert 0 < sum(c.seconds for c in result.chunks) <= result.gpu_s  # which has what comes before and after, too
    assert not list((root / "_state").rglob("*.mp4"))


def test_other_prompts_and_seeds_give_other_frames(two: dict[str, RenderResult]) -> None:
    assert two["red-0"].frames_sha256 != two["blue-0"].frames_sha256


def test_the_other_order_gives_the_same_frames(actor: RenderActor, two: dict[str, RenderResult]) -> None:
    again = actor.run([make_task("blue", attempt="e1a2"), make_task("red", attempt="e1a2")])
    for outcome in again:
        result = must_succeed(outcome)
        assert result.frames_sha256 == two[result.task_id].frames_sha256
        assert result.sha256 == two[result.task_id].sha256
        assert result.video_key != two[result.task_id].video_key


def test_a_fresh_process_gives_the_same_frames(tmp_path: Path, two: dict[str, RenderResult]) -> None:
    code = (
        "import sys; from workers.actor import RenderActor; from workers.task import RenderSetup, RenderTask\n"
        "actor = RenderActor(RenderSetup.model_validate_json(sys.argv[1])); actor.load()\n"
        "print(actor.run([RenderTask.model_validate_json(sys.argv[2])])[0].frames_sha256)"
    )
    arguments = [make_setup(tmp_path).model_dump_json(), make_task("red").model_dump_json()]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == two["red-0"].frames_sha256


def test_two_shards_at_once_give_the_same_frames_and_share_the_gpu(
    actor: RenderActor, two: dict[str, RenderResult]
) -> None:
    busy_before = actor.progress().busy_s
    outcomes: list[RenderOutcome] = []

    def run(name: str) -> None:
        outcomes.extend(actor.run([make_task(name, attempt="e2a1")]))

    threads = [threading.Thread(target=run, args=(name,)) for name in ("red", "blue")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [must_succeed(outcome) for outcome in outcomes]
    assert {r.task_id: r.frames_sha256 for r in results} == {k: r.frames_sha256 for k, r in two.items()}
    progress = actor.progress()
    assert progress.busy_s - busy_before == pytest.approx(sum(r.gpu_s for r in results), abs=1e-3)
    assert progress.task_ids == ()


def test_a_new_prompt_changes_frames_only_from_its_chunk_on(
    actor: RenderActor, two: dict[str, RenderResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[np.ndarray] = []
    write = VideoWriter.write
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: (written.append(frames.copy()), write(self, frames)))
    for switch, attempt in ((None, "e3a1"), (25, "e3a2")):
        must_succeed(actor.run([make_task("red", attempt=attempt, switch=switch)])[0])
    before, after = np.concatenate(written[:4]), np.concatenate(written[4:])
    same = (before == after).all(axis=(1, 2, 3))
    assert same[:24].all()  # frame 25 lies in the chunk of frames 24 to 35
    assert not same[24:].any()


def test_every_rung_of_the_ladder_renders_and_is_recorded(actor: RenderActor, two: dict[str, RenderResult]) -> None:
    rungs = [must_succeed(actor.run([make_task("red", attempt=f"e4a{n}", rung=n)])[0]) for n in (1, 2, 3, 9)]
    assert [len(r.ladder) for r in rungs] == [1, 2, 3, 3]
    assert rungs[0].ladder == ("decode-single",)
    assert rungs[0].kv_bytes == two["red-0"].kv_bytes == 2 * rungs[1].kv_bytes
    assert [r.kv_policy for r in rungs] == ["dense", "dense", "window-3+21", "window-3+21"]


def test_progress_tells_of_the_take_in_hand(actor: RenderActor, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, ticks_before, seen = Gate(monkeypatch), actor.progress().ticks, []
    thread = threading.Thread(target=lambda: actor.run([make_task("slow", attempt="e5a1"), make_task("next")]))
    thread.start()
    for _ in range(4):
        gate.wait()
        seen.append(actor.progress())
        gate.open()
    gate.open(4)
    thread.join()
    assert {p.running_task_id for p in seen} == {"slow-0"}
    assert {p.task_ids for p in seen} == {("slow-0", "next-0")}
    assert {p.num_frames for p in seen} == {FRAMES}
    assert [p.frames_done for p in seen] == [0, 12, 24, 36]
    assert [p.ticks - ticks_before for p in seen] == [0, 1, 2, 3]
    assert actor.progress().ticks == ticks_before + 8
    assert actor.progress().rss_bytes > 0


def test_what_has_not_begun_can_be_taken_back_and_the_take_in_hand_goes_on(
    actor: RenderActor, two: dict[str, RenderResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    outcomes: list[RenderOutcome] = []
    red, blue = make_task("red", attempt="e8a1"), make_task("blue", attempt="e8a1")
    first = threading.Thread(target=lambda: outcomes.extend(actor.run([red])))
    first.start()
    gate.wait()
    second = threading.Thread(target=lambda: outcomes.extend(actor.run([blue])))
    second.start()
    while len(actor.progress().task_ids) < 2:
        time.sleep(0.001)
    actor.withdraw([(red.task_id, red.attempt), (blue.task_id, blue.attempt), ("nobody", "e8a1")])
    second.join()
    (back,) = outcomes  # at once: the other one still has the GPU
    assert isinstance(back, RenderFailure)
    assert (back.task_id, back.kind, back.retryable) == (blue.task_id, "preempted_exhausted", True)
    gate.open(8)
    first.join()
    assert must_succeed(outcomes[1]).frames_sha256 == two["red-0"].frames_sha256
    again = actor.run([make_task("blue", attempt="e8a2")])[0]
    assert must_succeed(again).frames_sha256 == two["blue-0"].frames_sha256


def test_drain_ends_the_take_in_hand_after_its_chunk_and_refuses_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, actor = Gate(monkeypatch), load_actor(tmp_path)
    outcomes: list[RenderOutcome] = []
    thread = threading.Thread(target=lambda: outcomes.extend(actor.run([make_task("a"), make_task("b")])))
    thread.start()
    gate.wait()
    gate.open()
    gate.wait()  # in its second chunk
    actor.drain()
    gate.open()
    thread.join()
    assert actor.progress().ticks == 2
    actor.close()
    failures = [o for o in outcomes if isinstance(o, RenderFailure)]
    assert [f.task_id for f in failures] == ["a-0", "b-0"]
    assert {(f.kind, f.retryable, f.fresh_process) for f in failures} == {("preempted_exhausted", True, False)}
    assert not list(tmp_path.rglob("*.mp4"))


def test_out_of_memory_asks_for_a_fresh_process_and_stops_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(cache: DenseCache, layer_index: int, chunk: object) -> None:
        torch.empty(1 << 60)  # torch's own answer to a request that no machine can serve

    actor = load_actor(tmp_path)
    monkeypatch.setattr(DenseCache, "append", full)
    failures = actor.run([make_task("a"), make_task("b")])
    actor.close()
    assert isinstance(failures[0], RenderFailure)
    assert (failures[0].kind, failures[0].retryable, failures[0].fresh_process) == ("oom", True, True)
    assert failures[0].gpu_s > 0
    assert isinstance(failures[1], RenderFailure)
    assert (failures[1].kind, failures[1].retryable) == ("preempted_exhausted", True)
    assert "a-0" in failures[1].message


def test_a_take_without_a_picture_is_refused_early_and_leaves_nothing(tmp_path: Path) -> None:
    config = TINY.model_copy(update={"quality_gate": QualityGateConfig(max_frozen_ratio=0.0, max_black_ratio=0.0)})
    actor = load_actor(tmp_path, config)
    actor._model.vae.frame_decoder[-2].weight.zero_()  # type: ignore[union-attr,index,operator]
    actor._model.vae.frame_decoder[-2].bias.fill_(-1.0)  # type: ignore[union-attr,index,operator]
    failure = actor.run([make_task("dark")])[0]
    actor.close()
    assert isinstance(failure, RenderFailure)
    assert (failure.kind, failure.retryable) == ("quality", False)
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_windowed_cache_keeps_its_size(tmp_path: Path) -> None:
    cache = WindowCacheConfig(sink_latent_frames=1, recent_latent_frames=3)
    actor = load_actor(tmp_path, TINY.model_copy(update={"cache": cache}))
    result = must_succeed(actor.run([make_task("red")])[0])
    actor.close()
    assert [c.kv_bytes for c in result.chunks][1:] == [result.kv_bytes] * 3
    assert result.kv_policy == "window-1+3"
    assert result.kv_compression_ratio == pytest.approx(9 / 4)
    assert result.attn_density_mean is not None
    assert result.attn_density_mean < 1


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"backbone": BackboneConfig(name="nope")}, ConfigUnsupported, "nope"),
        ({"backbone": BackboneConfig(name="wan2.1-t2v-1.3b")}, ConfigUnsupported, "needs published weights"),
        ({"backbone": BackboneConfig(checkpoint="/nowhere/at/all")}, CheckpointMismatch, r"/nowhere/at/all/card\.json"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, config: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        load_actor(tmp_path, RenderConfig().model_copy(update=config))

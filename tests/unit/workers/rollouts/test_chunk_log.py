"""A table built again from clean latents and tile lists is the one that was, and what follows is what would have."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tables import make_captured
from tests.unit.workers.rollouts.test_captured import BACKBONE, CPU, SHAPE, SIZE, make_plan, model
from workers.assemble_tiles import size_table
from workers.cache.layer_table import LayerTable
from workers.cache.packed_table import PackedTable
from workers.cache.side_work import Wait
from workers.cache.tile_table import TileTable
from workers.denoise import draw_noise
from workers.errors import CheckpointMismatch, NonFiniteLatents
from workers.model.dit import CausalDiT
from workers.rollout import RolloutPlan
from workers.rollouts.captured import CapturedRollout, CapturedSettings
from workers.rollouts.chunk_log import ChunkLog, path_of, read_chunk, replay_log
from workers.snapshot import RolloutId, read_snapshot, write_snapshot

__all__ = ["model"]
CHUNKS = 14
"""The first layer merges when chunk 5 is taken over, and every second one after it."""
ROLLOUT = RolloutId("fingerprint", "revision", "a-0", 7)
LOOKS_ONCE: dict[str, Any] = {"settings": CapturedSettings(graphs=False, history_at=(0,))}
WAYS: dict[str, dict[str, Any]] = {
    "as the policy": LOOKS_ONCE | {"num_chosen": 5, "clean_share": 0.4, "num_early": 7},
    "no list for clean passes": LOOKS_ONCE | {"num_chosen": 3, "always_recent": True},
    "another number early": LOOKS_ONCE | {"num_chosen": 5, "num_early": 2},
    "all steps look": {"num_chosen": 4, "always_sink": True},
    "all look, fewer in clean passes": {"num_chosen": 6, "clean_share": 0.5},
    "chosen twice": {"settings": CapturedSettings((0, 2), graphs=False), "num_chosen": 3},
    "chosen twice, looked at thrice": {
        "settings": CapturedSettings((0, 2), graphs=False, history_at=(0, 1, 2)),
        "num_chosen": 6,
        "clean_share": 0.5,
    },
    "not packed, by chains": LOOKS_ONCE
    | {"num_chosen": 5, "clean_share": 0.4, "rule": "chains", "storage": "model", "decay": 0.2},
}


def make_rollout(model: CausalDiT, way: str) -> CapturedRollout:
    fields = {"rule": "pairs", "storage": "int4"} | WAYS[way]
    sizes = {name: fields.pop(name) for name in ("rule", "storage", "decay") if name in fields}
    table = size_table(BACKBONE, SIZE, kept_chunks=2, spare_chunks=2, tile=8, candidate_tiles=2, **sizes)
    return make_captured(model, table, SIZE, **fields)


def table_of(rollout: CapturedRollout) -> TileTable:
    assert isinstance(rollout.table, TileTable)
    return rollout.table


def copy_state(rollout: CapturedRollout) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in table_of(rollout).state().items()}


def assert_same_table(rollout: CapturedRollout, expected: Mapping[str, Tensor]) -> None:
    found = table_of(rollout).state()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@dataclass
class Unbroken:
    """A rollout that was never stopped, and its log."""

    way: str
    plan: RolloutPlan
    latents: list[Tensor]
    states: list[dict[str, Tensor]]
    """After each chunk."""
    folder: Path

    def copy_log(self, to: Path, stop: int) -> Path:
        """As it was when this chunk came next."""
        to.mkdir()
        for index in range(stop):
            shutil.copy(path_of(self.folder, index), to)
        return to


def new_log(folder: Path, rollout: CapturedRollout) -> ChunkLog:
    return ChunkLog(folder, ROLLOUT, rollout.chooser.num_tiles, CPU)


@pytest.fixture(scope="module")
def unbroken(model: CausalDiT, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Unbroken]:
    made = {}
    for way in WAYS:
        rollout, plan = make_rollout(model, way), make_plan(model, CHUNKS, switch_at=4)
        whole = Unbroken(way, plan, [], [], tmp_path_factory.mktemp("log"))
        log = new_log(whole.folder, rollout)
        for chunk in rollout.run(plan, record=log.record):
            whole.latents.append(chunk.latents_BTCHW)
            whole.states.append(copy_state(rollout))
        log.close()
        made[way] = whole
    return made


@pytest.fixture
def policy(unbroken: dict[str, Unbroken]) -> Unbroken:
    return unbroken["as the policy"]


def check_goes_on(model: CausalDiT, whole: Unbroken, stop: int, folder: Path) -> None:
    """From a log that ends before chunk `stop`; the log goes on, too."""
    whole.copy_log(folder, stop)
    rollout = make_rollout(model, whole.way)
    assert replay_log(folder, ROLLOUT, rollout, whole.plan) == stop
    if stop:
        assert_same_table(rollout, whole.states[stop - 1])
    log = new_log(folder, rollout)
    for chunk in rollout.run(whole.plan, stop, record=log.record):
        assert torch.equal(chunk.latents_BTCHW, whole.latents[chunk.index])
        assert_same_table(rollout, whole.states[chunk.index])
    log.close()
    assert chunk.index == CHUNKS - 1
    for index in range(CHUNKS - 1):
        found, expected = (read_chunk(at, ROLLOUT, index) for at in (folder, whole.folder))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(list(folder.iterdir())) == CHUNKS - 1, "the last chunk becomes no history"


@pytest.mark.parametrize("stop", [0, 1, 2, 4, 5, 6, 7, 9, 12, 13])
def test_wherever_it_stopped_it_goes_on_bit_for_bit(
    model: CausalDiT, policy: Unbroken, stop: int, tmp_path: Path
) -> None:
    check_goes_on(model, policy, stop, tmp_path / "log")


@pytest.mark.parametrize("stop", [3, 9])
@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_however_tiles_are_chosen_and_stored(
    model: CausalDiT, unbroken: dict[str, Unbroken], way: str, stop: int, tmp_path: Path
) -> None:
    check_goes_on(model, unbroken[way], stop, tmp_path / "log")


def test_recording_changes_nothing_and_several_merges_lie_before_and_after(model: CausalDiT, policy: Unbroken) -> None:
    rollout = make_rollout(model, policy.way)
    merges = []
    for chunk in rollout.run(policy.plan):
        assert torch.equal(chunk.latents_BTCHW, policy.latents[chunk.index])
        layer = table_of(rollout).layers[0]
        merges.append(layer.pointer == layer_settings(rollout).kept_tokens + layer_settings(rollout).chunk_tokens)
    assert sum(merges[6:9]) >= 1
    assert sum(merges[9:]) >= 2
    assert int(table_of(rollout).layers[0].m_NC.max()) > 2


def layer_settings(rollout: CapturedRollout) -> Any:
    return table_of(rollout).settings


class Littered(PackedTable):
    """Tiles that were not noted are full of what is not there."""

    def lay_out(self, layer_index: int, *, seen_only: bool = False) -> LayerTable:
        found = super().lay_out(layer_index, seen_only=seen_only)
        if seen_only:
            unseen = (self._is_seen_LNJ[layer_index] == 0).repeat_interleave(self.settings.tile, 1)
            for x in (found.k_NLW, found.v_NLD):
                x[unseen] = 50 * torch.randn(x[unseen].shape)
        return found


@pytest.mark.parametrize("way", ["as the policy", "no list for clean passes"])
def test_a_rollout_that_is_used_again_goes_on_alike(
    model: CausalDiT, unbroken: dict[str, Unbroken], way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.tables.make_table", Littered)
    whole, rollout = unbroken[way], make_rollout(model, way)
    list(rollout.run(replace(whole.plan, noise=lambda chunk, step: draw_noise(99, chunk, step, SHAPE))))
    rollout.table.clear()
    assert replay_log(whole.copy_log(tmp_path / "log", 9), ROLLOUT, rollout, whole.plan) == 9
    assert_same_table(rollout, whole.states[8])


class WhenWaitedFor:
    """Makes a copy no sooner than somebody waits for it."""

    def __init__(self) -> None:
        self._is_done: list[Event] = []

    def run(self, job: Callable[[], None]) -> Wait:
        is_done = Event()
        self._is_done.append(is_done)

        def wait() -> None:
            job()
            is_done.set()

        return wait

    def finish(self) -> None:
        for is_done in list(self._is_done):
            is_done.wait()


@pytest.mark.parametrize("way", ["as the policy", "chosen twice"])
def test_lists_change_no_sooner_than_they_were_copied(
    model: CausalDiT, unbroken: dict[str, Unbroken], way: str, tmp_path: Path
) -> None:
    whole, rollout = unbroken[way], make_rollout(model, way)
    log = ChunkLog(tmp_path, ROLLOUT, rollout.chooser.num_tiles, CPU, WhenWaitedFor())
    list(rollout.run(whole.plan, record=log.record))
    log.close()
    for index in range(CHUNKS - 1):
        found, expected = (read_chunk(folder, ROLLOUT, index) for folder in (tmp_path, whole.folder))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_log_since_a_snapshot(model: CausalDiT, policy: Unbroken, tmp_path: Path) -> None:
    rollout, folder = make_rollout(model, policy.way), tmp_path / "log"
    log = new_log(folder, rollout)
    for chunk in rollout.run(policy.plan):
        if chunk.index == 6:
            write_snapshot(tmp_path / "snapshot", ROLLOUT, 7, table_of(rollout))
            break
    for chunk in rollout.run(policy.plan, 7, record=log.record):
        if chunk.index == 10:
            break
    log.close()
    other = make_rollout(model, policy.way)
    first = read_snapshot(tmp_path / "snapshot", ROLLOUT, table_of(other))
    assert (first, replay_log(folder, ROLLOUT, other, policy.plan, first)) == (7, 11)
    assert_same_table(other, policy.states[10])
    for chunk in other.run(policy.plan, 11):
        assert torch.equal(chunk.latents_BTCHW, policy.latents[chunk.index])
    with pytest.raises(CheckpointMismatch, match=r"chunk-000000\.safetensors: missing, though the log holds chunk 10"):
        replay_log(folder, ROLLOUT, make_rollout(model, policy.way), policy.plan)


def test_a_log_is_small(policy: Unbroken) -> None:
    rollout_bytes = 4 * policy.latents[0].numel()
    for index in (2, 9):
        chunk = read_chunk(policy.folder, ROLLOUT, index)
        assert chunk.index_LNIJ.dtype == torch.int16
        # Until the table merges a step sees 7 tiles, then 5, and a clean pass 0.4 of these.
        assert chunk.index_LNIJ.shape == (BACKBONE.num_layers, BACKBONE.num_heads, 3, 3 if index == 2 else 2)
        whole = rollout_bytes + 2 * chunk.index_LNIJ.numel()
        assert whole < path_of(policy.folder, index).stat().st_size < whole + 1000
        assert torch.equal(chunk.latents_BTCHW, policy.latents[index])


def test_a_large_table_has_lists_in_32_bits(tmp_path: Path) -> None:
    most = torch.iinfo(torch.int16).max
    for num_tiles, dtype in ((most, torch.int16), (most + 1, torch.int32)):
        log = ChunkLog(tmp_path / str(num_tiles), ROLLOUT, num_tiles, CPU)
        log.record(0, torch.zeros(SHAPE), [torch.full((1, 1, 2), num_tiles - 1, dtype=torch.int32)])
        log.close()
        chunk = read_chunk(tmp_path / str(num_tiles), ROLLOUT, 0)
        assert (chunk.index_LNIJ.dtype, int(chunk.index_LNIJ.max())) == (dtype, num_tiles - 1)


def test_tiles_matter(model: CausalDiT, policy: Unbroken, tmp_path: Path) -> None:
    """Whoever chose others would build another table."""
    folder = policy.copy_log(tmp_path / "log", 9)

    def next_tile(tensors: dict[str, Tensor]) -> None:
        tensors["index_LNIJ"] = (tensors["index_LNIJ"] + 1) % 8

    alter(path_of(folder, 6), next_tile)
    rollout = make_rollout(model, policy.way)
    replay_log(folder, ROLLOUT, rollout, policy.plan)
    with pytest.raises(AssertionError):
        assert_same_table(rollout, policy.states[8])


def test_no_log_is_an_empty_one(model: CausalDiT, policy: Unbroken, tmp_path: Path) -> None:
    assert replay_log(tmp_path / "none", ROLLOUT, make_rollout(model, policy.way), policy.plan) == 0


def test_what_a_killed_process_was_writing_is_no_part_of_it(model: CausalDiT, policy: Unbroken, tmp_path: Path) -> None:
    folder = policy.copy_log(tmp_path / "log", 3)
    half = path_of(folder, 2).read_bytes()[:99]
    path_of(folder, 3).with_name(path_of(folder, 3).name + ".part").write_bytes(half)
    assert replay_log(folder, ROLLOUT, make_rollout(model, policy.way), policy.plan) == 3


def test_what_was_logged_behind_the_chunk_it_goes_on_with_is_removed(policy: Unbroken, tmp_path: Path) -> None:
    folder = policy.copy_log(tmp_path / "log", 9)
    log = ChunkLog(folder, ROLLOUT, 99, CPU)
    log.record(4, policy.latents[4], [torch.zeros(1, 1, 1, dtype=torch.int32)])
    log.close()
    assert sorted(path.name for path in folder.iterdir()) == [path_of(folder, index).name for index in range(5)]


def alter(path: Path, change: Any, **facts: str) -> None:
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    change(tensors)
    number = str(int(path.stem.removeprefix("chunk-")))
    named = {"render_fingerprint": "fingerprint", "model_revision": "revision", "task_id": "a-0", "seed": "7"}
    save_file(tensors, path, metadata=named | {"chunk": number} | facts)


def same(tensors: dict[str, Tensor]) -> None:
    pass


def with_nan(tensors: dict[str, Tensor]) -> None:
    tensors["latents_BTCHW"][0, 0, 0] = torch.nan


def with_tile(number: int) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["index_LNIJ"][0, 0, 0, 0] = number

    return change


def without_a_layer(tensors: dict[str, Tensor]) -> None:
    tensors["index_LNIJ"] = tensors["index_LNIJ"][1:].clone()


def in_half(tensors: dict[str, Tensor]) -> None:
    tensors["latents_BTCHW"] = tensors["latents_BTCHW"].half()


def renamed(tensors: dict[str, Tensor]) -> None:
    tensors["latents"] = tensors.pop("latents_BTCHW")


@pytest.mark.parametrize(
    ("change", "facts", "words"),
    [
        (same, {"seed": "8"}, "a chunk log with seed 8, this rollout has 7"),
        (same, {"render_fingerprint": "other"}, "with render_fingerprint other"),
        (same, {"chunk": "5"}, "holds chunk 5"),
        (with_nan, {}, "latents that are not finite"),
        (with_tile(999), {}, "tiles beyond the 18 of this table"),
        (with_tile(-1), {}, "tiles beyond the 18 of this table"),
        (without_a_layer, {}, r"latents and lists .* this rollout has"),
        (in_half, {}, "latents and lists in torch.float16"),
        (renamed, {}, "no readable part of a chunk log"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(
    model: CausalDiT, policy: Unbroken, tmp_path: Path, change: Any, facts: dict[str, str], words: str
) -> None:
    folder = policy.copy_log(tmp_path / "log", 4)
    alter(path_of(folder, 2), change, **facts)
    with pytest.raises(CheckpointMismatch, match=rf"chunk-000002\.safetensors: .*{words}"):
        replay_log(folder, ROLLOUT, make_rollout(model, policy.way), policy.plan)


@pytest.mark.parametrize("num_bytes", [0, 5, 200, -1])
def test_a_file_that_was_cut_off_is_named(model: CausalDiT, policy: Unbroken, tmp_path: Path, num_bytes: int) -> None:
    path = path_of(policy.copy_log(tmp_path / "log", 4), 3)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointMismatch, match=r"chunk-000003\.safetensors: no readable part"):
        replay_log(path.parent, ROLLOUT, make_rollout(model, policy.way), policy.plan)


def test_a_missing_chunk_and_one_too_many_are_named(model: CausalDiT, policy: Unbroken, tmp_path: Path) -> None:
    folder = policy.copy_log(tmp_path / "log", 5)
    rollout = make_rollout(model, policy.way)
    with pytest.raises(CheckpointMismatch, match=r"chunk-000004\.safetensors: .*this rollout ends with 4"):
        replay_log(folder, ROLLOUT, rollout, make_plan(model, 5))
    path_of(folder, 1).unlink()
    with pytest.raises(CheckpointMismatch, match=r"chunk-000001\.safetensors: missing, though the log holds chunk 4"):
        replay_log(folder, ROLLOUT, rollout, policy.plan)
    assert table_of(rollout).layers[0].num_chunks == 0, "refused before a chunk was fed"


def test_a_chunk_with_nan_is_not_logged(model: CausalDiT, policy: Unbroken, tmp_path: Path) -> None:
    def noise(chunk: int, step: int) -> Tensor:
        return draw_noise(11, chunk, step, SHAPE) * (float("nan") if chunk == 2 else 1.0)

    rollout = make_rollout(model, policy.way)
    log = new_log(tmp_path, rollout)
    with pytest.raises(NonFiniteLatents):
        list(rollout.run(replace(policy.plan, noise=noise), record=log.record))
    log.close()
    assert replay_log(tmp_path, ROLLOUT, make_rollout(model, policy.way), policy.plan) == 2


def test_a_disk_that_fails_is_said(policy: Unbroken, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    log = ChunkLog(folder, ROLLOUT, 99, CPU)
    folder.rmdir()
    log.record(0, policy.latents[0], [torch.zeros(1, 1, 1, dtype=torch.int32)])
    with pytest.raises(Exception, match="No such file"):
        log.close()

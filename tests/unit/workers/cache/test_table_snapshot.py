"""A snapshot made while the table goes on holds what one at rest holds, however late or early copies are made."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tables import SMALL_TABLE, go_on
from workers.cache.low_bit import Storage
from workers.cache.packed_table import make_table
from workers.cache.side_work import InTurn, SideWork, Wait
from workers.cache.table_layout import MergeRule, TableSettings
from workers.cache.table_snapshot import TableSnapshot, restore_table
from workers.cache.tile_table import TableWork, TileTable

SIZES = replace(SMALL_TABLE, num_layers=5, spare_chunks=3)
CPU = torch.device("cpu")


class AsLateAsAllowed:
    """Begins a job only when somebody waits for it: what a slow stream does. Jobs nobody waits for run at the end."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []

    def run(self, job: Callable[[], None]) -> Wait:
        self.jobs.append(job)
        return lambda: self._run_up_to(job)

    def finish(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()

    def _run_up_to(self, last: Callable[[], None]) -> None:
        while last in self.jobs:
            self.jobs.pop(0)()


class AtAnyTime(AsLateAsAllowed):
    """Some jobs at once, with all before them, others as late as allowed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)

    def run(self, job: Callable[[], None]) -> Wait:
        wait = super().run(job)
        if self.random.random() < 0.5:
            wait()
        return wait


def copy_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in state.items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def at_rest(sizes: TableSettings, work: TableWork, num_chunks: int) -> dict[str, Tensor]:
    table = make_table(sizes, torch.float32, CPU, work=work)
    go_on(table, 0, num_chunks)
    snapshot = TableSnapshot(table)
    snapshot.begin()
    return copy_of(snapshot.finish())


@given(
    begun_at=st.integers(0, 12),
    chunks_on=st.integers(0, 6),
    rule=st.sampled_from(["chains", "pairs"]),
    work=st.sampled_from(["layers", "groups"]),
    sink=st.integers(0, 2),
    recent=st.integers(1, 2),
    spare=st.integers(1, 4),
    storage=st.sampled_from(["model", "int8", "int4"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_made_while_generation_goes_on_equals_one_at_rest(
    begun_at: int, chunks_on: int, rule: MergeRule, work: TableWork, sink: int, recent: int, spare: int,
    storage: Storage, seed: int,
) -> None:  # fmt: skip
    sizes = replace(SIZES, rule=rule, sink_chunks=sink, recent_chunks=recent, spare_chunks=spare, storage=storage)
    expected = at_rest(sizes, work, begun_at)
    sides: list[SideWork] = [InTurn(), AsLateAsAllowed(), AtAnyTime(seed)]
    for side in sides:
        table = make_table(sizes, torch.float32, CPU, work=work)
        snapshot = TableSnapshot(table, side)
        go_on(table, 0, begun_at)
        snapshot.begin()
        go_on(table, begun_at, begun_at + chunks_on)
        assert_same(snapshot.finish(), expected)


@pytest.mark.parametrize("end", ["clear", "restore"])
def test_another_video_may_begin_before_the_snapshot_is_finished(end: str) -> None:
    expected = at_rest(SIZES, "groups", 9)
    table = TileTable(SIZES, torch.float32, CPU, work="groups")
    other = copy_of(table.state())
    snapshot = TableSnapshot(table, AsLateAsAllowed())
    go_on(table, 0, 9)
    snapshot.begin()
    go_on(table, 9, 10)
    table.clear() if end == "clear" else table.restore(other)
    go_on(table, 0, 3)
    assert_same(snapshot.finish(), expected)


def test_only_a_few_layers_are_copied_with_each_chunk() -> None:
    table = TileTable(replace(SIZES, num_layers=6), torch.float32, CPU, work="groups")
    snapshot = TableSnapshot(table)
    go_on(table, 0, 10)
    snapshot.begin()
    left = [snapshot.num_layers_left]
    for index in range(10, 13):
        go_on(table, index, index + 1)
        left.append(snapshot.num_layers_left)
    assert left == [4, 2, 0, 0]


def test_one_snapshot_after_another_in_the_same_buffers() -> None:
    table = TileTable(SIZES, torch.float32, CPU, work="groups")
    snapshot = TableSnapshot(table, AsLateAsAllowed())
    for begun_at in (8, 12, 16):
        go_on(table, begun_at - 8 if begun_at == 8 else begun_at - 2, begun_at)
        snapshot.begin()
        go_on(table, begun_at, begun_at + 2)
        assert_same(snapshot.finish(), at_rest(SIZES, "groups", begun_at))


@pytest.mark.parametrize("num_chunks", [0, 1, 2, 5, 9, 11])
@pytest.mark.parametrize(("rule", "storage"), [("chains", "model"), ("pairs", "model"), ("pairs", "int4")])
def test_restored_bit_for_bit_and_goes_on_alike_from_then_on(
    num_chunks: int, rule: MergeRule, storage: Storage
) -> None:
    """A snapshot of what was restored is the same snapshot; and two that were restored stay the same."""
    sizes = replace(SIZES, rule=rule, storage=storage)
    state = at_rest(sizes, "groups", num_chunks)
    tables = [make_table(sizes, torch.float32, CPU, work="groups") for _ in range(2)]
    go_on(tables[1], 0, 7)  # what was there before leaves no trace
    for table in tables:
        restore_table(table, state)
    again = TableSnapshot(tables[0])
    again.begin()
    assert_same(again.finish(), state)
    for table in tables:
        go_on(table, num_chunks, num_chunks + 4)
    assert_same(tables[0].state(), tables[1].state())


def test_what_comes_back_is_within_rounding_and_log_m_and_records_are_exact() -> None:
    table, other = (TileTable(SIZES, torch.float32, CPU, work="groups") for _ in range(2))
    go_on(table, 0, 9)
    restore_table(other, at_rest(SIZES, "groups", 9))
    for layer in range(SIZES.num_layers):
        a, b = table.read(layer), other.read(layer)
        assert a is not None
        assert b is not None
        assert a.log_mass_BNK is not None
        assert b.log_mass_BNK is not None
        there = ~a.log_mass_BNK[0].isneginf()
        assert torch.equal(a.log_mass_BNK, b.log_mass_BNK)
        for x, y in ((a.k_BKND, b.k_BKND), (a.v_BKND, b.v_BKND)):
            x, y = (part[0].transpose(0, 1)[there] for part in (x, y))
            torch.testing.assert_close(y, x, rtol=0, atol=0.01 * float(x.abs().max()))
        before, after = table.layers[layer], other.layers[layer]
        for name in ("m_NC", "weight_NC", "partner_NC", "mean_NJD"):
            assert torch.equal(getattr(before, name), getattr(after, name)), name


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_codes_of_a_packed_history_come_back_to_the_bit(storage: Storage) -> None:
    sizes = replace(SIZES, rule="pairs", storage=storage)
    table, other = (make_table(sizes, torch.float32, CPU) for _ in range(2))
    go_on(table, 0, 11)
    snapshot = TableSnapshot(table)
    snapshot.begin()
    restore_table(other, snapshot.finish())
    for before, after in zip(table.layers, other.layers, strict=True):
        for name in table.history_tensors:
            held = (getattr(layer, name)[:, : before.pointer] for layer in (before, after))
            assert torch.equal(*held), name


def test_a_snapshot_under_way_is_finished_first() -> None:
    snapshot = TableSnapshot(TileTable(SIZES, torch.float32, CPU))
    with pytest.raises(AssertionError, match="no snapshot has been begun"):
        snapshot.finish()
    snapshot.begin()
    with pytest.raises(AssertionError, match="has not been finished"):
        snapshot.begin()

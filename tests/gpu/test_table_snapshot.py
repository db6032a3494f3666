"""A snapshot on a stream of its own, slow and not, equals one at rest: what it reads is changed only after its copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.late_copies import Late
from workers.cache.low_bit import Storage
from workers.cache.packed_table import make_table
from workers.cache.side_work import OnStream
from workers.cache.table_layout import MergeRule, TableSettings
from workers.cache.table_snapshot import TableSnapshot, restore_table
from workers.cache.tile_table import TileTable
from workers.model.rope import grid_positions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROWS, COLUMNS, BEGUN_AT = 8, 16, 11
SIZES = TableSettings(
    num_layers=6,
    num_heads=2,
    head_dim=64,
    chunk_tokens=3 * ROWS * COLUMNS,
    frame_tokens=ROWS * COLUMNS,
    kept_chunks=3,
    spare_chunks=3,
    tile=64,
)


def go_on(table: TileTable, first: int, stop: int) -> None:
    for index in range(first, stop):
        generator = torch.Generator(device="cuda").manual_seed(index)
        for layer in range(SIZES.num_layers):
            for own in table.own(layer):
                own.normal_(generator=generator)
        table.remember_chunk(grid_positions(torch.arange(3) + 3 * index, ROWS, COLUMNS).cuda())


def taken(table: TileTable, side: OnStream, chunks_on: int) -> dict[str, Tensor]:
    snapshot = TableSnapshot(table, side)
    snapshot.begin()
    go_on(table, BEGUN_AT, BEGUN_AT + chunks_on)
    return {name: x.clone() for name, x in snapshot.finish().items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("rule", "storage"), [("chains", "model"), ("pairs", "model"), ("pairs", "int4")])
@pytest.mark.parametrize("chunks_on", [1, 2, 5])
def test_made_while_generation_goes_on_equals_one_at_rest(chunks_on: int, rule: MergeRule, storage: Storage) -> None:
    pytest.importorskip("triton")
    sizes = replace(SIZES, rule=rule, storage=storage)
    states = []
    for side, num in ((OnStream, 0), (OnStream, chunks_on), (Late, chunks_on)):
        table = make_table(sizes, torch.bfloat16, torch.device("cuda"), work="kernels")
        go_on(table, 0, BEGUN_AT)
        states.append(taken(table, side(table.device), num))
    for state in states[1:]:
        assert_same(state, states[0])
    other = make_table(sizes, torch.bfloat16, torch.device("cuda"), work="kernels")
    restore_table(other, states[0])
    assert_same(taken(other, OnStream(other.device), 0), states[0])


def test_the_rollout_does_not_wait_on_the_host_for_a_copy() -> None:
    table = TileTable(SIZES, torch.bfloat16, torch.device("cuda"), work="groups")
    snapshot = TableSnapshot(table)
    go_on(table, 0, BEGUN_AT)
    snapshot.begin()
    snapshot.finish()  # makes what is made once
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    asleep = torch.cuda.current_stream().record_event()
    snapshot.begin()
    assert not asleep.query()
    snapshot.finish()

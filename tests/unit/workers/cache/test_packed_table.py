"""A tile table in few bits: coding is stable, and the table is the one in 16 bits whose history is rounded so."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.packed_checks import check_sample
from tests.plain_tables import TrackedTable
from tests.tables import SMALL_TABLE, go_on
from workers.cache.low_bit import Storage
from workers.cache.packed_table import PackedTable, make_table
from workers.cache.table_codes import LIMITS, CodedStorage, coded_bytes, decode_into, encode, round_trip
from workers.cache.table_layout import MergeRule, TableSettings
from workers.cache.tile_table import TableWork, TileTable

SIZES = replace(SMALL_TABLE, rule="pairs", decay=0.3)
CPU = torch.device("cpu")
coded = st.sampled_from(["int8", "int4"])


def fill(sizes: TableSettings, num_chunks: int, work: TableWork = "layers") -> PackedTable:
    table = make_table(sizes, torch.float32, CPU, work=work)
    assert isinstance(table, PackedTable)
    go_on(table, 0, num_chunks)
    return table


@given(
    seed=st.integers(0, 10**6),
    storage=coded,
    dim=st.sampled_from([12, 16, 40, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    size=st.sampled_from([1e-35, 1e-20, 0.01, 1.0, 300.0]),
)
def test_coding_what_was_decoded_gives_the_same_codes(
    seed: int, storage: CodedStorage, dim: int, dtype: torch.dtype, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (size * torch.randn(50, dim, generator=generator)).to(dtype)
    x[0], x[1, 1:] = 0, 0
    code, largest = encode(x, storage)
    decoded = decode_into(code, largest, torch.full_like(x, torch.nan), storage)
    again, largest_again = encode(decoded, storage)
    assert torch.equal(again, code)
    assert torch.equal(largest_again, largest)
    assert code.nbytes + largest.nbytes == 50 * coded_bytes(dim, storage)
    step = largest.float().repeat_interleave(dim // largest.shape[-1], -1) / LIMITS[storage]
    # Half a step, and what bfloat16 takes of the largest channel and of the result.
    allowed = step * (0.5 + LIMITS[storage] * 2**-8) + 1e-30
    assert bool(((decoded.float() - x.float()).abs() <= allowed).all())


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_every_scale_that_bfloat16_has_is_found_again(storage: CodedStorage) -> None:
    largest = torch.arange(0x3F80, 0x4000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[:, None]
    limit = LIMITS[storage]
    x = (largest * torch.linspace(-1, 1, 2 * limit + 1)).to(torch.bfloat16)
    x = torch.cat((x, x.new_zeros(len(x), -x.shape[1] % 32)), 1)
    once = round_trip(x, storage)
    assert torch.equal(round_trip(once, storage), once)
    assert torch.equal(once.abs().amax(-1), x.abs().amax(-1))


@pytest.mark.parametrize("rule", ["chains", "pairs"])
@pytest.mark.parametrize(("storage", "head_dim"), [("int8", 12), ("int4", 12), ("int4", 32)])
@pytest.mark.parametrize("num_chunks", [1, 3, 6, 13])
def test_it_is_the_table_in_16_bits_whose_history_is_rounded_so(
    num_chunks: int, storage: Storage, head_dim: int, rule: MergeRule
) -> None:
    sizes = replace(SIZES, storage=storage, rule=rule, head_dim=head_dim)
    packed, twin = fill(sizes, num_chunks), TrackedTable(sizes, torch.float32, CPU)
    go_on(twin, 0, num_chunks)
    assert packed.num_bytes == twin.num_bytes
    assert packed.num_tokens == twin.num_tokens
    for layer in range(SIZES.num_layers):
        found, expected = packed.read(layer), twin.read(layer)
        assert found is not None
        assert expected is not None
        assert found.log_mass_BNK is not None
        assert expected.log_mass_BNK is not None
        assert torch.equal(found.log_mass_BNK, expected.log_mass_BNK)
        live = ~found.log_mass_BNK[0].isneginf()
        for a, b in ((found.k_BKND, expected.k_BKND), (found.v_BKND, expected.v_BKND)):
            assert torch.equal(*(x[0].transpose(0, 1)[live] for x in (a, b)))
        for name in ("m_NC", "weight_NC", "partner_NC", "mean_NJD"):
            assert torch.equal(*(getattr(table.layers[layer], name) for table in (packed, twin))), name


@pytest.mark.parametrize("rule", ["chains", "pairs"])
@pytest.mark.parametrize(("storage", "head_dim"), [("int8", 12), ("int4", 12), ("int4", 32)])
@pytest.mark.parametrize("num_chunks", [1, 3, 6, 13])
def test_a_sample_is_laid_out_as_the_whole_is(
    num_chunks: int, storage: Storage, head_dim: int, rule: MergeRule
) -> None:
    table = fill(replace(SIZES, storage=storage, rule=rule, head_dim=head_dim), num_chunks)
    for per_tile in (1, 3):
        check_sample(table, per_tile)


def test_kept_keys_have_the_codes_that_they_came_with() -> None:
    """A key that outlives merges is coded anew after each, and keeps its codes."""
    sizes = replace(SIZES, storage="int4", num_layers=1, decay=0.0)
    table = fill(sizes, 5)
    layer = table.layers[0]
    came = {tuple(at): code for at, code in zip(layer.position_NC3[0].tolist(), codes_of(table), strict=True)}
    go_on(table, 5, 8)
    met = 0
    for at, code, m in zip(layer.position_NC3[0].tolist(), codes_of(table), layer.m_NC[0].tolist(), strict=True):
        if m and tuple(at) in came:
            met += 1
            assert torch.equal(code, came[tuple(at)])
    assert met > 3


def codes_of(table: TileTable) -> Tensor:
    """Of the keys of the first layer and head."""
    codes: Tensor = table.state()["0.k_code_NCB"]
    return codes[0].clone()


@pytest.mark.parametrize("work", ["layers", "groups"])
def test_groups_of_layers_go_one_by_one(work: TableWork) -> None:
    sizes = replace(SIZES, storage="int4")
    found, expected = fill(sizes, 9, work), fill(sizes, 9)
    for name, tensor in expected.state().items():
        assert torch.equal(found.state()[name], tensor), name


def test_a_restored_table_goes_on_as_the_unbroken_one() -> None:
    sizes = replace(SIZES, storage="int4")
    unbroken, broken = fill(sizes, 7), fill(sizes, 2)
    broken.restore({name: tensor.clone() for name, tensor in unbroken.state().items()})
    for table in (unbroken, broken):
        go_on(table, 7, 11)
    for name, tensor in unbroken.state().items():
        assert torch.equal(broken.state()[name], tensor), name


def test_a_cleared_table_is_a_new_one() -> None:
    sizes = replace(SIZES, storage="int8")
    table = fill(sizes, 9)
    table.clear()
    assert table.read(0) is None
    assert table.num_bytes == table.num_tokens == 0
    for name, tensor in make_table(sizes, torch.float32, CPU).state().items():
        assert torch.equal(table.state()[name], tensor), name


def test_what_is_stored_as_computed_lies_where_it_is_read() -> None:
    """The default: no workspace, nothing coded, nothing copied."""
    table = make_table(SIZES, torch.float32, CPU)
    assert type(table) is TileTable
    assert table.lay_out(1, seen_only=True) is table.layers[1]
    assert table.lay_out_sample(1, torch.arange(3)) is table.layers[1]
    assert not any("code" in name for name in table.state())


@given(num_chunks=st.integers(3, 12), storage=coded, rule=st.sampled_from(["chains", "pairs"]))
@settings(max_examples=15)
def test_every_key_that_came_counts_once(num_chunks: int, storage: CodedStorage, rule: MergeRule) -> None:
    table = fill(replace(SIZES, storage=storage, rule=rule), num_chunks)
    for layer in table.layers:
        absorbed = max(0, num_chunks - SIZES.sink_chunks - SIZES.recent_chunks) * SIZES.chunk_tokens
        assert layer.m_NC.sum(1).tolist() == [absorbed] * SIZES.num_heads

"""Kernels of a tile table and of its choice against the plain ways; `TRITON_INTERPRET=1` runs them on a CPU."""

import os
from dataclasses import replace

import pytest
import torch

from workers.attention.tile_choice import ChoiceSettings, Estimate, TileChoice, TileRuns
from workers.cache import table_layout
from workers.cache.layer_table import LayerTable
from workers.cache.packed_table import PackedTable
from workers.cache.pairs import every_other, most_common_parity
from workers.cache.shrink import Room
from workers.cache.table_layout import MergeRule, TableSettings, read_log_mass
from workers.cache.table_pairs import Distances, choose_links, heaviest, pair_loss
from workers.cache.tile_table import TableWork, TileTable
from workers.cache.unrotated import TurnBack
from workers.contracts import KeyValues
from workers.model.rope import grid_positions, make_rotation, rotate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]
HEADS, DIM, ROWS, COLUMNS = 2, 32, 2, 7
SIZES = TableSettings(
    num_layers=2,
    num_heads=HEADS,
    head_dim=DIM,
    chunk_tokens=3 * ROWS * COLUMNS,
    frame_tokens=ROWS * COLUMNS,
    kept_chunks=1,
    spare_chunks=1,
    candidate_tiles=2,
    tile=16,
    decay=0.3,
)


def append_together(table: TileTable, chunks: list[KeyValues]) -> None:
    """Chunks of all layers, as a clean pass leaves them."""
    for index, chunk in enumerate(chunks):
        k_NTD, v_NTD = table.own(index)
        rotation = make_rotation(chunk.position_K3, DIM, table.settings.theta)
        k_NTD.copy_(rotate(chunk.k_BKND, rotation)[0].transpose(0, 1))
        v_NTD.copy_(chunk.v_BKND[0].transpose(0, 1))
    table.remember_chunk(chunks[0].position_K3)


def fill(sizes: TableSettings, num_chunks: int, work: TableWork, dtype: torch.dtype = torch.float32) -> TileTable:
    """Each chunk is the last one with noise, so that near keys exist."""
    pytest.importorskip("triton")
    kind = TileTable if sizes.storage == "model" else PackedTable
    table = kind(sizes, dtype, DEVICE, work=work)
    generator = torch.Generator().manual_seed(7)
    shape = (2, sizes.num_layers, 1, sizes.chunk_tokens, HEADS, DIM)
    kv = torch.randn(shape, generator=generator)
    for index in range(num_chunks):
        kv = 0.8 * kv + 0.6 * torch.randn(shape, generator=generator)
        position = grid_positions(torch.arange(3) + 3 * index, ROWS, COLUMNS).to(DEVICE)
        append_together(table, [KeyValues(*layer.to(DEVICE, dtype), position) for layer in kv.unbind(1)])
    return table


def assert_same_layer(found: LayerTable, expected: LayerTable, sizes: TableSettings) -> None:
    assert (found.pointer, found.num_chunks) == (expected.pointer, expected.num_chunks)
    live = expected.m_NC > 0
    for name in ("m_NC", "partner_NC"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.position_NC3[live], expected.position_NC3[live])
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.weight_NC, expected.weight_NC, **near)
    torch.testing.assert_close(found.mean_NJD, expected.mean_NJD, **near)
    mass = (read_log_mass(x.k_NLW, DIM) for x in (found, expected))
    torch.testing.assert_close(*mass, **near)
    run = slice(sizes.history_start, sizes.history_start + live.shape[1])
    for name in ("k_NLW", "v_NLD"):
        a, b = (getattr(x, name)[:, run][live] for x in (found, expected))
        torch.testing.assert_close(a, b, **near)


@pytest.mark.parametrize("rule", ["chains", "pairs"])
@pytest.mark.parametrize(("like", "listed"), [(0.3, 4), (0.05, 1)])
def test_members_that_are_listed_give_the_bits_of_those_that_add_themselves(
    rule: MergeRule, like: float, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second case groups are larger than a list."""
    pytest.importorskip("triton")
    sizes = replace(SIZES, num_layers=1, rule=rule)
    tables = []
    for num_listed in (0, listed):
        monkeypatch.setitem(table_layout.MEMBERS_LISTED, rule, num_listed)
        tables.append(TileTable(sizes, torch.float32, DEVICE, work="kernels"))
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(sizes.chunk_tokens, HEADS, DIM, generator=generator)
    for index in range(6):
        k = kinds + like * torch.randn(1, sizes.chunk_tokens, HEADS, DIM, generator=generator)
        v = torch.randn(1, sizes.chunk_tokens, HEADS, DIM, generator=generator)
        position = grid_positions(torch.arange(3) + 3 * index, ROWS, COLUMNS)
        for table, num_listed in zip(tables, (0, listed), strict=True):
            monkeypatch.setitem(table_layout.MEMBERS_LISTED, rule, num_listed)
            append_together(table, [KeyValues(k.to(DEVICE), v.to(DEVICE), position.to(DEVICE))])
    for name, tensor in tables[0].state().items():
        assert torch.equal(tables[1].state()[name], tensor), name


@pytest.mark.parametrize("num_kinds", [1, 3, 40])
def test_lists_hold_who_is_given_up_and_the_rest_is_left(num_kinds: int) -> None:
    triton_sums = pytest.importorskip("workers.cache.triton_sums", exc_type=ImportError)
    from workers.cache.triton_families import Families
    from workers.cache.triton_rows import StoredHistory, rows_as_computed

    generator, shape, most = torch.Generator().manual_seed(num_kinds), (3, 1500), 600
    head_of = torch.randint(num_kinds, shape, generator=generator, dtype=torch.int32)
    given_up = torch.rand(shape, generator=generator).argsort(-1)[:, :most].int()
    num_given_up = torch.tensor([0, 450, most], dtype=torch.int32)
    m = torch.randint(1, 9, shape, generator=generator, dtype=torch.int32)
    weight, rows = torch.randint(1, 1024, shape, generator=generator) / 1024, torch.zeros(*shape, 16)
    keys = rows_as_computed(rows.to(DEVICE), 0, 16)
    of = StoredHistory(keys, keys, *(x.to(DEVICE) for x in (rows[..., :3], m, weight, head_of)))
    for listed in (0, 4):
        nothing = [torch.zeros(shape, dtype=kind) for kind in (torch.int32, torch.int64, torch.int32)]
        families = (head_of, head_of, head_of, given_up, num_given_up, num_given_up.new_zeros(3, 3), *nothing)
        room = Room(num_keep=900, num_merges=most, rule="pairs", rate=0.0, num_listed=listed)
        turn_back = TurnBack(16, 10000.0, DEVICE)
        sums = triton_sums.join_groups(of, turn_back, room, Families(*(x.to(DEVICE) for x in families)))
        found = sums.members
        for row in range(shape[0]):
            rest = set(found.rest[row, : int(found.num_rest[row])].tolist())
            all_of = {group: [] for group in range(num_kinds)}
            for slot in given_up[row, : int(num_given_up[row])].tolist():
                all_of[int(head_of[row, slot])].append(slot)
            for group, mine in all_of.items():
                held = found.listed[row, group, : min(listed, len(mine))].tolist()
                assert int(found.tally[row, group]) == len(mine)
                assert sorted(held + [slot for slot in mine if slot in rest]) == sorted(mine)
                assert int(sums.joined[row, group]) == int(m[row, mine].sum())
                assert int(sums.added[row, group]) == int((weight[row, mine].double() * 2**24).sum())
            joined = [group for group, mine in all_of.items() if mine]
            assert sorted(found.group[row, : int(found.num_group[row])].tolist()) == joined
            large = [group for group, mine in all_of.items() if len(mine) > listed]
            assert sorted(found.number[row, large].tolist()) == list(range(len(large)))
            assert int(found.num_large[row]) == len(large)


def test_walking_along_chains_finds_every_other_link() -> None:
    pairs = pytest.importorskip("workers.cache.triton_pairs", exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    num = 2100
    older = (torch.rand(3, num, generator=generator) * torch.arange(num)).int()
    toward = torch.where(torch.rand(3, num, generator=generator) < 0.9, older, torch.arange(num, dtype=torch.int32))
    toward[2] = (torch.arange(num) - 1).clamp(min=0)  # one long chain
    is_linked = toward != torch.arange(num)
    jumps, counts = (toward * 2 + is_linked).int().to(DEVICE), torch.zeros(2, 3, dtype=torch.int32, device=DEVICE)
    pairs.walk(jumps, *counts)
    is_odd, (num_odd, num_linked) = jumps.cpu() & 1, counts.cpu()
    assert torch.equal(num_odd, is_odd.sum(-1))
    assert torch.equal(num_linked, is_linked.sum(-1))
    assert torch.equal(most_common_parity(is_odd > 0, is_linked), every_other(toward.long()))


@pytest.mark.parametrize(("num_tiles", "first", "num"), [(9, 4, 3), (700, 690, 4), (5, 1, 4), (5, 1, 9), (5, 2, 0)])
def test_the_nearest_tiles_are_listed_the_nearest_first(num_tiles: int, first: int, num: int) -> None:
    """Of whole tiles of older keys if there are enough; of equal ones the first."""
    match = pytest.importorskip("workers.cache.triton_match", exc_type=ImportError)
    mean = torch.randn(3, num_tiles, DIM, generator=torch.Generator().manual_seed(0))
    mean[:, 1] = mean[:, 0]
    found = match._choose_tiles(mean.to(DEVICE), first, num_tiles, num).cpu()
    among = min(max(num, first), num_tiles)
    score = mean[:, first:].double() @ mean[:, :among].double().mT
    expected = score.sort(dim=-1, descending=True, stable=True).indices[..., :num]
    assert torch.equal(found.long(), expected)


@pytest.mark.parametrize("num", [40, 2100])
@pytest.mark.parametrize("num_merges", [0, 1, 17, 39])
@pytest.mark.parametrize("num_alike", [0, 30])
def test_kernels_choose_the_links_that_the_plain_way_chooses(num: int, num_merges: int, num_alike: int) -> None:
    """Also where some lose nothing, and more than may merge lose alike."""
    links = pytest.importorskip("workers.cache.triton_links", exc_type=ImportError)
    families = pytest.importorskip("workers.cache.triton_families", exc_type=ImportError)
    generator, shape = torch.Generator().manual_seed(num), (3, num)
    partner = (torch.rand(shape, generator=generator) * torch.arange(num)).int()
    partner[torch.rand(shape, generator=generator) < 0.1] = -1
    m = torch.randint(0, 4, shape, generator=generator, dtype=torch.int32)
    # Where there is no key nobody's partner is, and a sum of whole numbers has no order.
    partner = torch.where(m.gather(1, partner.long().clamp(min=0)) > 0, partner, -1)
    of_keys, of_values, lengths = (torch.randint(1, 2**10, shape, generator=generator).float() for _ in range(3))
    of_keys[:, :num_alike:2] = 0
    of_keys[:, 1:num_alike:2], of_values[:, 1:num_alike:2], m[:, 1:num_alike:2] = 3.0, 5.0, 1
    found = Distances(of_keys, of_values, lengths * (m > 0))
    expected = choose_links(pair_loss(found, m, partner, DIM), partner, num_merges)
    on_device = Distances(*(x.clone().to(DEVICE) for x in found[:3])), m.to(DEVICE), partner.to(DEVICE)
    link = links.choose_links(*on_device, DIM, num_merges)
    assert torch.equal(link.cpu(), expected)
    followed = families.follow(link, on_device[1], num_merges, by_mass=True)
    root, head_of, counts, given_up, num_given_up, *_ = (x.cpu() for x in followed)
    end = expected.long()
    for _ in range(num.bit_length()):
        end = end.gather(1, end)
    assert torch.equal(root.long(), end)
    assert torch.equal(head_of.long(), heaviest(end, m))
    survives = (m > 0) & (head_of == torch.arange(num))
    pieces = torch.nn.functional.pad(survives, (0, -num % families.PIECE)).unflatten(1, (-1, families.PIECE))
    assert torch.equal(counts, pieces.sum(-1, dtype=torch.int32))
    for row, count in enumerate(num_given_up.tolist()):
        gone = ((m[row] > 0) & ~survives[row]).nonzero().flatten().tolist()
        assert sorted(given_up[row, :count].tolist()) == gone


def test_near_tiles_of_several_steps_are_compared_as_the_plain_way_does(monkeypatch: pytest.MonkeyPatch) -> None:
    match = pytest.importorskip("workers.cache.triton_match", exc_type=ImportError)
    monkeypatch.setattr(match, "NEAR_AT_ONCE", 16)
    sizes = replace(SIZES, num_layers=1, tile=32)
    found, expected = (fill(sizes, 6, work) for work in ("kernels", "groups"))
    assert_same_layer(found.layers[0], expected.layers[0], sizes)


@pytest.mark.parametrize("num_chunks", [3, 5, 7])
@pytest.mark.parametrize(("candidate_tiles", "rule"), [(0, "chains"), (3, "chains"), (3, "pairs")])
def test_kernels_take_over_chunks_as_the_plain_way_does(num_chunks: int, candidate_tiles: int, rule: MergeRule) -> None:
    sizes = replace(SIZES, candidate_tiles=candidate_tiles, rule=rule)
    found, expected = (fill(sizes, num_chunks, work) for work in ("kernels", "groups"))
    for a, b in zip(found.layers, expected.layers, strict=True):
        if not candidate_tiles:  # only kernels make means that nobody asks for
            a.mean_NJD.zero_()
        assert_same_layer(a, b, sizes)


@pytest.mark.parametrize("rule", ["chains", "pairs"])
def test_like_keys_merge_into_large_groups_whose_sums_are_those_of_the_plain_way(rule: MergeRule) -> None:
    # Not so like that cosines are equal but for rounding, which would decide what merges.
    sizes = replace(SIZES, num_layers=1, spare_chunks=1, decay=0.0, rule=rule)
    pytest.importorskip("triton")
    tables = [TileTable(sizes, torch.float32, DEVICE, work=work) for work in ("kernels", "groups")]
    generator = torch.Generator().manual_seed(1)
    kind = torch.randn(1, 1, HEADS, DIM, generator=generator)
    for index in range(8):
        k = kind + 0.4 * torch.randn(1, sizes.chunk_tokens, HEADS, DIM, generator=generator)
        v = torch.randn(1, sizes.chunk_tokens, HEADS, DIM, generator=generator)
        position = grid_positions(torch.arange(3) + 3 * index, ROWS, COLUMNS)
        for table in tables:
            append_together(table, [KeyValues(k.to(DEVICE), v.to(DEVICE), position.to(DEVICE))])
    assert int(tables[0].layers[0].m_NC.max()) > 3
    assert_same_layer(tables[0].layers[0], tables[1].layers[0], sizes)


@pytest.mark.parametrize("rule", ["chains", "pairs"])
def test_of_keys_that_are_equal_but_for_rounding_no_mass_and_no_value_is_lost(rule: MergeRule) -> None:
    sizes = replace(SIZES, num_layers=1, decay=0.0, rule=rule)
    pytest.importorskip("triton")
    table = TileTable(sizes, torch.float32, DEVICE, work="kernels")
    generator = torch.Generator().manual_seed(1)
    kind, total = torch.randn(1, 1, HEADS, DIM, generator=generator), torch.zeros(HEADS, DIM)
    for index in range(8):
        k = kind + 1e-3 * torch.randn(1, sizes.chunk_tokens, HEADS, DIM, generator=generator)
        v = torch.randn(1, sizes.chunk_tokens, HEADS, DIM, generator=generator)
        position = grid_positions(torch.arange(3) + 3 * index, ROWS, COLUMNS)
        append_together(table, [KeyValues(k.to(DEVICE), v.to(DEVICE), position.to(DEVICE))])
        total += v[0].sum(0) if 1 <= index < 7 else 0.0
    layer = table.layers[0]
    assert torch.equal(layer.m_NC.sum(1).cpu(), torch.full((HEADS,), 6 * sizes.chunk_tokens))
    v = layer.v_NLD[:, sizes.history_start : sizes.history_start + layer.weight_NC.shape[1]]
    torch.testing.assert_close((layer.weight_NC[..., None] * v).sum(1).cpu(), total, rtol=1e-3, atol=1e-2)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter has no bfloat16")
def test_in_bfloat16_every_key_counts_once_and_partners_are_as_near() -> None:
    found, expected = (fill(SIZES, 9, work, torch.bfloat16) for work in ("kernels", "groups"))
    for a, b in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(a.m_NC.sum(1), b.m_NC.sum(1))
        assert float((a.partner_NC == b.partner_NC).float().mean()) > 0.9
        same = (a.position_NC3 == b.position_NC3).all(-1)
        assert float(same.float().mean()) > 0.9


@pytest.mark.parametrize(("rows", "num"), [(1, 1), (3, 700), (2, 9000)])
@pytest.mark.parametrize("spread", [3, 1 << 31])
def test_ranks_of_long_rows(rows: int, num: int, spread: int) -> None:
    pytest.importorskip("triton")
    from workers.cache.triton_ranks import kth_smallest, running_sum

    x = torch.randint(-spread, spread, (rows, num), generator=torch.Generator().manual_seed(num)).int()
    for k in {1, num, (num + 1) // 2, min(num, 17)}:
        value, nth = (found.cpu() for found in kth_smallest(x.to(DEVICE), k))
        assert torch.equal(value, x.kthvalue(k, dim=-1, keepdim=True).values)
        assert torch.equal(nth, k - (x < value).sum(-1, keepdim=True, dtype=torch.int32))
    for values in (x > 0, (x > 0).int() * 3):
        assert torch.equal(running_sum(values.to(DEVICE)).cpu(), values.cumsum(-1, dtype=torch.int32))


def draw_queries_and_keys(num_queries: int, tiles: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With channels of log m; two tiles without a key."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(num_queries, HEADS, DIM + 16, generator=generator)
    k = torch.randn(HEADS, tiles * tile, DIM + 16, generator=generator)
    q[..., DIM:], k[..., DIM:] = 0, 0
    q[..., DIM : DIM + 2] = 1
    k[..., DIM] = torch.rand(HEADS, tiles * tile, generator=generator) * 4
    k[:, tile : 3 * tile, DIM] = -1e5
    return q.to(DEVICE), k.to(DEVICE)


@pytest.mark.parametrize("estimate", ["exact", "quant"])
@pytest.mark.parametrize(
    ("num_queries", "tiles", "tile", "samples"), [(100, 9, 16, 8), (40, 21, 16, 8), (300, 9, 128, 16), (50, 10, 8, 8)]
)
def test_kernels_choose_the_tiles_that_the_plain_way_chooses(
    estimate: Estimate, num_queries: int, tiles: int, tile: int, samples: int
) -> None:
    pytest.importorskip("triton")
    q, k = draw_queries_and_keys(num_queries, tiles, tile)
    runs = TileRuns(candidates=((0, 3), (4, tiles - 1)), always=((tiles - 1, tiles),), num_tiles=tiles)
    chosen = []
    for fused in (True, False):
        settings = ChoiceSettings(
            4,
            clean_share=0.5,
            keys_per_tile=samples,
            queries_per_tile=4,
            estimate=estimate,
            tile=tile,
            fused=fused,
        )
        chooser = TileChoice(settings, runs, num_queries, DIM, DEVICE)
        index, clean = chooser.new_list(HEADS), chooser.new_list(HEADS, for_clean_pass=True)
        chooser.choose(q, k, index, clean)
        assert bool((index[..., 4:] == tiles - 1).all())
        assert bool((clean[..., 2:] == tiles - 1).all())
        chosen.append(torch.cat((index[..., :4].sort(-1).values, clean[..., :2].sort(-1).values), -1))
    assert float((chosen[0] == chosen[1]).float().mean()) > 0.99  # what is equally heavy but for rounding may differ


@pytest.mark.parametrize("estimate", ["exact", "quant"])
@pytest.mark.parametrize(("blocks", "keys", "programs"), [(1, 16, 1), (2, 32, 100), (3, 64, 4), (2, 128, 1)])
def test_sums_of_tiles_are_the_masses_of_the_plain_way(
    estimate: Estimate, blocks: int, keys: int, programs: int
) -> None:
    """Also where several products share keys, and a tile's logits lie in several of them or in all of a step."""
    triton_choice = pytest.importorskip("workers.attention.triton_choice", exc_type=ImportError)
    launch = triton_choice.Launch(16, keys, blocks, programs, 4, 2)
    tile, tiles, samples = 32, 19, 16
    q, k = draw_queries_and_keys(10 * tile, tiles, tile)
    runs = TileRuns(candidates=((0, tiles),), always=(), num_tiles=tiles)
    settings = ChoiceSettings(4, samples, 4, estimate, tile=tile, fused=True)
    chooser = TileChoice(settings, runs, len(q), DIM, DEVICE)
    found = torch.full((HEADS, 40, tiles), torch.nan, device=DEVICE)
    sizes = DIM, tile, samples
    is_quant = estimate == "quant"
    triton_choice.tile_sums(q, k, chooser._query_S, found, sizes, quant=is_quant, launch=launch)
    mass = (found / found.sum(-1, keepdim=True)).unflatten(1, (10, 4)).mean(2)
    # Codes of 8 bits: one that lies between two may become either.
    rtol, atol = (0.02, 1e-4) if is_quant else (1e-5, 1e-8)
    torch.testing.assert_close(mass, chooser.mass(q, k), rtol=rtol, atol=atol)


@pytest.mark.parametrize(("num", "fewer", "tiles"), [(1, 1, 40), (7, 3, 40), (146, 49, 700), (30, 10, 31)])
def test_the_heaviest_are_listed_in_rising_order_and_of_equal_ones_the_first(num: int, fewer: int, tiles: int) -> None:
    triton_choice = pytest.importorskip("workers.attention.triton_choice", exc_type=ImportError)
    generator = torch.Generator().manual_seed(tiles)
    # Few values, whole powers of two, so that shares are exact and many are equal.
    sums = 2.0 ** torch.randint(0, 4, (2, 3 * 4, tiles), generator=generator)
    sums[..., 0] += 2.0 ** (10 + sums[..., 1:].sum(-1).log2().ceil()) - sums.sum(
        -1
    )  # the sum of a row is a power of two
    sums[1] = 0  # nothing has mass: the first are taken
    may = torch.ones(tiles, dtype=torch.int32)
    may[5] = 0
    mass = (sums / sums.sum(-1, keepdim=True).clamp(min=1)).unflatten(1, (3, 4)).mean(2)
    mass[..., 5] = -1
    order = mass.sort(dim=-1, descending=True, stable=True).indices
    for count in (None, fewer):
        lists = [torch.full((2, 3, n + 1), -7, dtype=torch.int32).to(DEVICE) for n in (num, count) if n is not None]
        triton_choice.write_heaviest(sums.to(DEVICE), may.to(DEVICE), 1, *lists)
        for found in lists:
            expected = order[..., : found.shape[2] - 1].sort(-1).values
            assert torch.equal(found[..., :-1].long().cpu(), expected)
            assert bool((found[..., -1] == -7).all())


def test_what_is_no_number_fills_no_list_beyond_its_end() -> None:
    triton_choice = pytest.importorskip("workers.attention.triton_choice", exc_type=ImportError)
    sums, may = torch.full((1, 2, 40), torch.nan).to(DEVICE), torch.ones(40, dtype=torch.int32).to(DEVICE)
    found = torch.full((1, 1, 9), -7, dtype=torch.int32).to(DEVICE)
    triton_choice.write_heaviest(sums, may, 4, found)
    assert found.flatten().tolist() == [0, 1, 2, 3, 4, -7, -7, -7, -7]

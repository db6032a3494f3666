"""Kernels of a packed table against plain torch: what `tests/gpu` asserts, and what runs where there is no pytest.

`python -m tests.packed_checks` on a machine with a GPU; `TRITON_INTERPRET=1` runs it on a CPU.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from workers.attention.tile_mass import sample_places
from workers.cache.low_bit import Storage
from workers.cache.packed_history import PackedLayer, PlainPacking, Workspace
from workers.cache.packed_table import PackedTable, make_table
from workers.cache.partners import History
from workers.cache.shrink import Room
from workers.cache.table_layout import MEMBERS_LISTED, MergeRule, TableSettings, read_log_mass
from workers.cache.tile_table import TableWork
from workers.cache.unrotated import TurnBack
from workers.model.backbones import find_backbone
from workers.model.rope import grid_positions

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
"""Of what is unpacked; Triton's interpreter has no bfloat16."""
SIZES = TableSettings(
    num_layers=3,
    num_heads=2,
    head_dim=64,
    chunk_tokens=3 * 22,
    frame_tokens=22,
    kept_chunks=2,
    spare_chunks=2,
    candidate_tiles=2,
    rule="pairs",
    tile=16,
)
SHAPES: tuple[tuple[Storage, int, int], ...] = (
    ("int8", 16, 16),
    ("int8", 128, 32),
    ("int4", 16, 16),
    ("int4", 32, 16),
    ("int4", 64, 64),
    ("int4", 128, 128),
)
"""Storage, channels, tile."""
MERGED: tuple[tuple[Storage, MergeRule, int], ...] = (
    ("int8", "pairs", 64),
    ("int8", "chains", 16),
    ("int4", "pairs", 16),
    ("int4", "pairs", 128),
    ("int4", "chains", 64),
)
"""Storage, rule, channels."""
FLAGS = (9, 3, 4), (700, 7, 650), (31, 1, 31)
"""Tiles, tiles of queries, listed of each."""


def sizes_of(storage: Storage, head_dim: int, tile: int) -> TableSettings:
    return replace(SIZES, storage=storage, head_dim=head_dim, tile=tile)


def draw_table(sizes: TableSettings, dtype: torch.dtype = DTYPE, device: torch.device = DEVICE) -> PackedTable:
    """One whose first layer holds random codes, and other tensors at random."""
    table = make_table(sizes, dtype, device)
    assert isinstance(table, PackedTable)
    layer, generator = table.layers[0], torch.Generator(device=device).manual_seed(0)
    for name in table.tensors:
        tensor = getattr(layer, name)
        if tensor.dtype == torch.int8:
            tensor.random_(-127, 128, generator=generator)
        elif tensor.dtype == torch.uint8:  # two codes from 1 to 15
            low, high = (torch.empty_like(tensor).random_(1, 16, generator=generator) for _ in range(2))
            tensor.copy_(low | (high << 4))
        elif tensor.is_floating_point():
            tensor.normal_(generator=generator)
    layer.k_NLW[..., sizes.head_dim + 2 :] = 0
    for name in ("k_largest_NCG", "v_largest_NCG"):
        getattr(layer, name).abs_()
    return table


def check_unpack(storage: Storage, head_dim: int, tile: int, *, some: bool) -> None:
    """The same bits in each tile that is asked for; the others are left alone."""
    from workers.cache.table_kernels import unpack

    s = sizes_of(storage, head_dim, tile)
    layer = draw_table(s).layers[0]
    assert isinstance(layer, PackedLayer)
    tiles = s.num_slots // s.tile
    is_seen = (torch.rand(s.num_heads, tiles, generator=torch.Generator().manual_seed(1)) < 0.5).to(DEVICE)
    found, expected = (Workspace(s, DTYPE, DEVICE) for _ in range(2))
    found.k_NLW.fill_(7.0)
    found.v_NLD.fill_(7.0)
    unpack(layer, found, s, is_seen.to(torch.uint8) if some else None)
    PlainPacking().unpack(layer, expected, s, None)
    for of, a, b in (("keys", found.k_NLW, expected.k_NLW), ("values", found.v_NLD, expected.v_NLD)):
        wanted = (is_seen | (not some)).repeat_interleave(s.tile, 1)
        assert torch.equal(a[wanted], b[wanted]), of
        assert bool((a[~wanted] == 7.0).all()), of


def check_unpack_coded(storage: Storage) -> None:
    """As plain torch codes what it unpacks into float32, bit by bit, in the tiles that are asked for and no others."""
    from workers.cache.table_kernels import unpack_coded

    s = replace(SIZES, storage=storage, head_dim=128, tile=128, chunk_tokens=3 * 50, frame_tokens=50)
    layer = draw_table(s).layers[0]
    assert isinstance(layer, PackedLayer)
    layer.mass_NC2[:, 30:90, 0] = layer.k_NLW[:, 5:99, s.head_dim] = -1e5
    layer.v_largest_NCG[:, 40:60] = 100.0  # more than the largest float
    for largest in (layer.k_largest_NCG, layer.v_largest_NCG):
        largest[:, 100:120] = 2.0**-9  # below the smallest float that is normal
        largest[:, 130:140] = 0
    tiles = s.num_slots // s.tile
    is_seen = (torch.rand(s.num_heads, tiles, generator=torch.Generator().manual_seed(1)) < 0.7).to(DEVICE)
    found, expected = (Workspace(s, torch.bfloat16, DEVICE).coded(s) for _ in range(2))
    for x in found:
        x.fill_(7)
    unpack_coded(layer, found, s, is_seen.to(torch.uint8))
    PlainPacking().unpack_coded(layer, expected, s, is_seen)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        a, b = (x.view(s.num_heads, tiles, -1) for x in (a, b))
        assert bool((a[~is_seen] == 7).all()), name
        assert torch.equal(a[is_seen], b[is_seen]), name


def check_sample(table: PackedTable, per_tile: int) -> None:
    """Of each layer the same bits as where all is laid out, in so many keys of a tile; the others are left alone."""
    s, k_NLW = table.settings, table.workspace.k_NLW
    slot_R = sample_places(s.num_slots, s.tile, per_tile, k_NLW.device)[0]
    is_sampled = torch.zeros(s.num_slots, dtype=torch.bool, device=k_NLW.device)
    is_sampled[slot_R] = True
    for index in range(s.num_layers):
        k_NLW[..., s.head_dim + 2 :] = 0
        expected = table.lay_out(index).k_NLW[:, is_sampled].clone()
        k_NLW.fill_(7.0)
        found = table.lay_out_sample(index, slot_R).k_NLW
        assert torch.equal(found[:, is_sampled], expected)
        assert bool((found[:, ~is_sampled] == 7.0).all())


def check_flags(num_tiles: int, query_tiles: int, listed: int) -> None:
    """As plain torch, also where there was another list before."""
    from workers.cache.table_kernels import flag_listed

    generator = torch.Generator().manual_seed(listed)
    found, expected = (torch.full((3, num_tiles), 1, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    for _ in range(2):
        index = torch.rand(3, query_tiles, num_tiles, generator=generator).argsort(-1)[..., :listed]
        index = index.int().contiguous().to(DEVICE)
        flag_listed(index, found)
        PlainPacking().flag_listed(index, expected)
        assert torch.equal(found, expected)


def check_unpack_sample(storage: Storage, head_dim: int, tile: int) -> None:
    """As plain torch, bit by bit, of tensors at random; also where no power of two is sampled of a tile."""
    from workers.cache.table_kernels import unpack_sample

    s = sizes_of(storage, head_dim, tile)
    layer = draw_table(s).layers[0]
    assert isinstance(layer, PackedLayer)
    for per_tile in (1, 5, min(16, tile)):
        slot_R = sample_places(s.num_slots, s.tile, per_tile, DEVICE)[0]
        found, expected = (Workspace(s, DTYPE, DEVICE) for _ in range(2))
        for to, way in ((found, unpack_sample), (expected, PlainPacking().unpack_sample)):
            to.k_NLW.fill_(7.0)
            way(layer, to, s, slot_R)
        assert torch.equal(found.k_NLW, expected.k_NLW)


def check_pack(storage: Storage, head_dim: int, tile: int) -> None:
    """The same codes, in the slots that are asked for and no others."""
    from workers.cache.table_kernels import pack

    s, new = sizes_of(storage, head_dim, tile), slice(21, 90)
    tables = [draw_table(s) for _ in range(2)]
    of = Workspace(s, DTYPE, DEVICE)
    generator = torch.Generator().manual_seed(2)
    for x in (of.k_NLW, of.v_NLD):
        size = torch.randn(*x.shape[:2], 1, generator=generator).exp()
        x.copy_(size * torch.randn(x.shape, generator=generator))
        x[:, s.history_start + 30] = 0
        x[..., :head_dim:3] = x.abs().amax(-1, keepdim=True) / 2  # half a step often
    for table, write in zip(tables, (pack, PlainPacking().pack), strict=True):
        layer = table.layers[0]
        assert isinstance(layer, PackedLayer)
        write(layer, of, s, new)
    found, expected = (table.state() for table in tables)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def fill(
    sizes: TableSettings,
    num_chunks: int,
    work: TableWork,
    dtype: torch.dtype = torch.float32,
    *,
    one_by_one: bool = False,
) -> PackedTable:
    """Chunks of keys near those of the chunk before; between two, the workspace is full of what is not there.

    Layers take them over at once, or by themselves.
    """
    table = make_table(sizes, dtype, DEVICE, work=work)
    assert isinstance(table, PackedTable)
    generator, s = torch.Generator().manual_seed(7), sizes
    shape = (s.num_layers, 2, s.num_heads, s.chunk_tokens, s.head_dim)
    kv = torch.randn(shape, generator=generator)
    for index in range(num_chunks):
        kv = 0.8 * kv + 0.6 * torch.randn(shape, generator=generator)
        for layer in range(s.num_layers):
            for own, new in zip(table.own(layer), kv[layer], strict=True):
                own.copy_(new)
        table.workspace.k_NLW[..., : s.head_dim + 2].normal_()
        table.workspace.v_NLD.normal_()
        position_T3 = grid_positions(torch.arange(3) + 3 * index, 2, s.frame_tokens // 2).to(DEVICE)
        if one_by_one:
            for layer in range(s.num_layers):
                table.remember(layer, position_T3)
        else:
            table.remember_chunk(position_T3)
    return table


def check_merge(storage: Storage, rule: MergeRule, head_dim: int = SIZES.head_dim, tile: int = SIZES.tile) -> None:
    """The same bits as merging in the workspace and packing all of it; where a layer has been full before too."""
    from workers.cache.table_kernels import merge, merge_into_codes, pack

    s = replace(sizes_of(storage, head_dim, tile), num_layers=1, rule=rule)
    for num_chunks in (s.kept_chunks + s.spare_chunks + 2, s.kept_chunks + 2 * s.spare_chunks + 2):
        tables = [fill(s, num_chunks, "layers", DTYPE) for _ in range(2)]
        turn_back, room = TurnBack(head_dim, s.theta, DEVICE), Room(s.kept_tokens, s.spare_tokens, rule, s.rate)
        room, stop = replace(room, num_listed=MEMBERS_LISTED[rule]), s.history_tokens
        for table, directly in zip(tables, (True, False), strict=True):
            layer = table.layers[0]
            assert isinstance(layer, PackedLayer)
            assert layer.pointer == stop
            if directly:
                merge_into_codes(layer, turn_back, room, s)
                continue
            of = table.lay_out(0)
            history = History(of.k_NLW, s.history_start, of.position_NC3[:, :stop], of.m_NC[:, :stop], of.mean_NJD)
            records = (of.v_NLD, *(x[:, :stop] for x in (of.m_NC, of.weight_NC, of.partner_NC)))
            merge(history, records, turn_back, room, s.num_heads, s.tile)
            pack(layer, table.workspace, s, slice(0, s.kept_tokens))
            run = slice(s.history_start, s.history_start + stop)
            layer.mass_NC2[:, :stop] = of.k_NLW[:, run, head_dim : head_dim + 2]
        found, expected = (table.state() for table in tables)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
        assert int(expected["0.m_NC"].max()) > 1


def check_known_distances() -> None:
    """What a table by kernels knows of the distances of keys after some merges is what is found anew, bit by bit."""
    from workers.cache.triton_pairs import find_distances
    from workers.cache.triton_rows import StoredHistory, coded_history, rows_as_computed

    s = replace(SIZES, storage="int4", num_layers=1, kept_chunks=4, spare_chunks=1)
    for num_chunks in (s.kept_chunks + s.spare_chunks + 3, s.kept_chunks + 3 * s.spare_chunks + 3):
        table = fill(s, num_chunks, "kernels", DTYPE)
        layer, of = table.layers[0], table.lay_out(0)
        assert isinstance(layer, PackedLayer)
        assert layer.apart_NC is not None
        k, v = (rows_as_computed(x, s.history_start, s.head_dim) for x in (of.k_NLW, of.v_NLD))
        laid_out = StoredHistory(k, v, of.position_NC3, of.m_NC, of.weight_NC, of.partner_NC)
        turn_back = TurnBack(s.head_dim, s.theta, DEVICE)
        found = find_distances(laid_out, turn_back).of_keys
        by_codes = find_distances(coded_history(layer, s), turn_back).of_keys
        is_live = of.m_NC[:, : s.history_tokens] > 0
        assert torch.equal(found[:, : s.history_tokens][is_live], by_codes[is_live])
        is_known = layer.apart_NC >= 0
        assert 0.2 < float(is_known[:, : s.kept_tokens].float().mean()) < 1
        assert not bool(is_known[:, s.kept_tokens :].any())
        assert torch.equal(found[is_known], layer.apart_NC[is_known])
        table.restore({name: tensor.clone() for name, tensor in table.state().items()})
        assert bool((layer.apart_NC == -1).all())


def table_differs(storage: Storage, rule: MergeRule = "pairs", num_chunks: int = 9) -> float:
    """Share of slots whose key, value or record is another one than by plain torch, in float32.

    Samples of its tables are checked beside.
    """
    sizes = replace(SIZES, storage=storage, rule=rule)
    found, expected = (fill(sizes, num_chunks, work) for work in ("kernels", "groups"))
    worst = 0.0
    for index, (a, b) in enumerate(zip(found.layers, expected.layers, strict=True)):
        other = (a.m_NC != b.m_NC) | (a.partner_NC != b.partner_NC) | (a.position_NC3 != b.position_NC3).any(-1)
        laid_out = [[x.clone() for x in (of.k_NLW, of.v_NLD)] for of in (found.lay_out(index), expected.lay_out(index))]
        apart = [((x - y).abs() > 1e-3).any(-1) for x, y in zip(*laid_out, strict=True)]
        run = slice(sizes.history_start, sizes.recent_start)
        other |= (apart[0] | apart[1])[:, run] & (b.m_NC > 0)
        other |= ~torch.isclose(a.mean_NJD, b.mean_NJD, atol=1e-3).all(-1).repeat_interleave(sizes.tile, 1)
        mass = (read_log_mass(laid_out[which][0][:, run], sizes.head_dim) for which in range(2))
        other |= ~torch.isclose(*mass, rtol=1e-4, atol=1e-4)
        worst = max(worst, float(other.float().mean()))
    for table in (found, expected):
        check_sample(table, 3)
    return worst


def captured_differs(kernels: tuple[str, ...], storage: Storage = "int4") -> float:
    """Largest difference of latents between calls captured as CUDA graphs and calls one by one; a few seconds."""
    from tests.bench.history_engine import Variant, make_engine, make_plan
    from tests.bench.rollout_rows import Settings

    backbone = replace(find_backbone("wan2.1-t2v-1.3b"), num_layers=2)
    settings = Settings(backbone, 208, 160, torch.device("cuda"), torch.bfloat16, 120)
    variant = Variant("small", kept_chunks=2, spare_chunks=2, density=0.3, rule="pairs", storage=storage)
    latents = []
    for graphs in (True, False):
        engine = make_engine(variant, settings, None, None, kernels=kernels, graphs=graphs)
        latents.append([c.latents_BTCHW.clone() for c in engine.rollout.run(make_plan(engine, settings, 9))][-1])
    return float((latents[0] - latents[1]).abs().max())


def check_bits(shapes: Sequence[tuple[Storage, int, int]] = SHAPES) -> float:
    """Unpacking, packing and merging into codes; 0, for nothing differs where nothing is raised."""
    for (storage, head_dim, tile), some in product(shapes, (False, True)):
        check_unpack(storage, head_dim, tile, some=some)
    for storage, head_dim, tile in shapes:
        check_unpack_sample(storage, head_dim, tile)
        check_pack(storage, head_dim, tile)
    if not INTERPRETED:
        check_unpack_coded("int8")
        check_unpack_coded("int4")
    for storage, rule, head_dim in MERGED:
        check_merge(storage, rule, head_dim)
    for sizes in FLAGS:
        check_flags(*sizes)
    check_known_distances()
    return 0.0


def run_all() -> bool:
    """All that there is to check, however much of it fails; whether nothing did."""
    checks: dict[str, tuple[Callable[[], float], float]] = {"unpacking, packing and merging": (check_bits, 0.0)}
    for storage, rule in product(("int8", "int4"), ("chains", "pairs")):
        checks[f"a table in {storage} that merges {rule}"] = partial(table_differs, storage, rule), 0.01  # type: ignore[arg-type]
    if not INTERPRETED:
        for kernels in ((), ("pairs", "packing", "choice")):
            checks[f"latents of captured calls, kernels {kernels}"] = partial(captured_differs, kernels), 0.0
    is_good = True
    for name, (differs, allowed) in checks.items():
        try:
            found = differs()
        except Exception:
            traceback.print_exc()
            found = float("nan")
        is_good &= found <= allowed
        print(f"{'good' if found <= allowed else 'BAD'}: {name}: {found:.2%} differs from the plain way", flush=True)
    return is_good


if __name__ == "__main__" and not run_all():
    raise SystemExit(1)

"""The rollout bench keeps its promises: no ratio without its baseline, no failure that spreads, one form of record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests import tiny_wan
from tests.bench import (
    history_parts,
    history_snapshot,
    record,
    rollout,
    rollout_growing,
    rollout_history,
    rollout_native,
    rollout_table,
)
from tests.bench.history_once import ONCE
from tests.bench.rollout_models import Stage
from tests.bench.rollout_rows import (
    BASELINE,
    ROWS,
    BrokenDevice,
    RowResult,
    Settings,
    as_table,
    is_device_broken,
    make_row,
    with_ratios,
)
from workers.cache.table_layout import EXTRA_CHANNELS
from workers.config import RenderConfig
from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.kernels.listed_tiles import attend_listed_plain
from workers.kernels.select import Hardware, KernelNeed
from workers.model.backbones import Native

COLUMNS = [
    *("policy", "fps_300_400", "fps_last_100", "fps_with_vae", "peak_gb_600", "peak_gb_3000", "seconds_3000_frames"),
    *("ratio_to_fastest_dense", "cache_keys", "density", "compression_share", "notes"),
]
CPU = Hardware("cpu")
SLOW = pytest.mark.slow
TINY = replace(tiny_wan.TINY, num_frames=650, real_chunks=(2, 4), replayed_chunks=(30, 54), flow_latent_frames=15)


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    monkeypatch.setattr(record, "RESULTS", folder)
    return folder


@pytest.fixture
def instant_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE at its true size takes seconds on a CPU; rows of the native windows are tested with it."""
    for module in (rollout_growing, rollout_table):
        monkeypatch.setattr(module, "make_vae", lambda settings: (None, ""))
    monkeypatch.setattr(Stage, "seconds_with_pictures", lambda *_: 1.0)
    monkeypatch.setattr(rollout_table, "seconds_with_pictures", lambda *_: 1.0)
    monkeypatch.setattr(rollout_table, "fps_with_pictures", lambda *_: 1.0)


def test_no_ratio_without_the_baseline_whatever_a_row_claims() -> None:
    rows = [RowResult("fast", seconds_3000_frames=100.0, ratio_to_fastest_dense=14.0), RowResult(BASELINE)]
    assert [result.ratio_to_fastest_dense for result in with_ratios(rows)] == [None, None]


def test_a_ratio_is_whole_rollout_against_whole_rollout() -> None:
    rows = [
        RowResult(BASELINE, seconds_3000_frames=1200.0),
        RowResult("fast", seconds_3000_frames=80.0),
        RowResult("x"),
    ]
    assert [result.ratio_to_fastest_dense for result in with_ratios(rows)] == [1.0, 15.0, None]


def test_a_record_has_the_columns_that_were_asked_for() -> None:
    (line,) = as_table([RowResult("x", density=0.123456)])
    assert list(line) == COLUMNS
    assert line["density"] == 0.1235


def test_a_row_that_fails_says_so_and_goes_no_further() -> None:
    def fails(settings: Settings, hardware: Hardware) -> RowResult:
        raise ValueError("no such thing")

    result = make_row("bad", TINY, CPU, {"bad": fails})
    assert (result.policy, result.fps_last_100) == ("bad", None)
    assert "ValueError: no such thing" in result.notes


def test_only_a_broken_device_asks_for_another_process() -> None:
    assert not is_device_broken(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_device_broken(ValueError("no"))
    assert is_device_broken(RuntimeError("CUDA error: an illegal memory access was encountered"))

    def breaks(settings: Settings, hardware: Hardware) -> RowResult:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(BrokenDevice) as broken:
        make_row("bad", TINY, CPU, {"bad": breaks})
    assert broken.value.args[0].policy == "bad"


def test_no_row_is_begun_after_the_time_given() -> None:
    late = make_row("x", replace(TINY, ends_at=0.0), CPU, {})
    assert "time given" in late.notes


def test_a_snapshot_under_way_is_timed_beside_chunks_without_and_compared_with_one_at_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(history_snapshot, "_CYCLES", 1)  # more are for the median of times
    (row,) = rollout_history.snapshots(rollout_history.VARIANTS["pairs"], TINY)
    assert row["equals_one_at_rest"]
    assert row["snapshot_gb"] > 0
    assert row["chunks_it_takes"] == 5


@pytest.mark.parametrize("name", ["fastar-exact-once", "pairs-180-seen-12-once-own"])
def test_a_row_that_looks_at_the_history_once_says_what_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_history, "fps_with_pictures", lambda *_: 1.0)
    variant, settings = rollout_history.VARIANTS[name], replace(TINY, num_frames=96)
    result = rollout_history.make_row(variant, settings)
    assert "history looked at in steps (0,) and the clean pass" in result.notes
    engine = rollout_history.engine_for(variant, settings)
    assert engine.num_calls == 3
    assert engine.num_looking == 2
    fresh = 16 * (2 if variant.always_recent else 1)  # chunks of 12 tokens in tiles of 16; two steps
    assert engine.slots_seen == fresh + 16 * engine.chooser.num_chosen / 2
    assert f"{round(engine.slots_seen)} slots seen" in result.notes


def test_the_row_of_the_policy_is_the_policy() -> None:
    config, row = RenderConfig(policy="fastar-tiles"), rollout_history.VARIANTS["fastar-tiles"]
    cache, attention = config.cache, config.attention
    assert isinstance(cache, TileCacheConfig)
    assert isinstance(attention, TileAttentionConfig)
    chunks = cache.chunks(3)
    assert (row.kept_chunks, row.spare_chunks, row.recent_chunks) == (
        chunks["kept_chunks"],
        chunks["spare_chunks"],
        chunks["recent_chunks"],
    )
    assert (row.rule, row.storage, row.candidate_tiles) == (cache.merging, cache.storage, cache.candidate_tiles)
    assert row.density_until_full == pytest.approx(attention.density_until_full)
    assert (row.density, row.estimate, row.history_at) == (
        pytest.approx(attention.density),
        attention.estimate,
        attention.history_at,
    )
    assert (row.clean_share, row.always_sink) == (attention.clean_pass_share, attention.always_sink)


def test_rows_that_look_once_keep_and_see_what_their_names_say() -> None:
    for variant in ONCE:
        if "seen" not in variant.name:
            continue
        _, kept, _, seen, *once = variant.name.split("-")
        assert variant.history_at == ((0,) if once else None)
        assert 3 * (2 + variant.kept_chunks + variant.spare_chunks) == int(kept)
        chosen_of = int(kept) - 3 * variant.always_recent
        assert variant.density * chosen_of + 3 * variant.always_recent == pytest.approx(int(seen))


def test_attention_to_the_history_is_what_calls_that_take_it_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = rollout_history.VARIANTS["fastar-exact-once"]
    engine = rollout_history.engine_for(variant, TINY)
    calls: list[tuple[bool, bool]] = []
    monkeypatch.setattr(engine.rollout, "replay", lambda choose, look=True, clean=False: calls.append((choose, look)))

    def times(run: Callable[[], None]) -> dict[str, tuple[float, float]]:
        run()
        choose, look = calls[-1]
        of_history = {"flash over lists": (5.0, 1)} if look else {}
        of_choice = {"tile_sums": (0.5, 1)} if choose else {}
        return {"flash over a run": (2.0, 1), "compose_rows": (0.25, 1), "gemm": (7.0, 1)} | of_history | of_choice

    monkeypatch.setattr(history_parts, "kernel_times", times)
    found = history_parts.kinds_of_calls(engine, 40.0)
    assert found["attention to own keys"] == 3 * 2.0
    assert found["attention to the history"] == 2 * 5.0
    assert found["composition"] == 3 * 0.25
    assert found["linear layers"] == 3 * 7.0
    assert found["selection"] == 0.5
    assert sum(found.values()) == pytest.approx(40.0)
    assert set(calls) == {(False, True), (True, True), (False, False)}


def test_unpacking_and_packing_are_parts_of_their_own() -> None:
    variant = replace(rollout_history.VARIANTS["pairs-180-seen-12-int4"], kept_chunks=2, spare_chunks=2)
    rows = {row["part"]: row for row in rollout_history.where_time_goes(variant, TINY)}
    for part in ("unpacking", "packing", "matching", "merging"):
        assert rows[part]["ms_per_chunk"] > 0
        assert rows[part]["least_gb"] > 0
    assert rows["a chunk, captured"]["ms_per_chunk"] > 0


def test_a_row_over_a_packed_table_says_so() -> None:
    variant = replace(rollout_history.VARIANTS["pairs-180-seen-12-int4"], kept_chunks=2, spare_chunks=2, whole=False)
    result = rollout_history.make_row(variant, replace(TINY, num_frames=120))
    assert "history in int4" in result.notes
    assert result.compression_share is not None


def test_rows_come_in_the_order_in_which_they_are_missed_most() -> None:
    rollout.load_rows()
    names = rollout.in_order(list(ROWS))
    assert names[: len(rollout.FIRST)] == list(rollout.FIRST)
    assert names.index("wan2.1-14b bounded") < names.index("radial") < names.index("self-forcing native eager")


def test_a_process_writes_the_record_after_each_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path):
    seen: list[int] = []

    def quick(settings: Settings, hardware: Hardware) -> RowResult:
        path = results / "rollout-cpu.json"
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return RowResult("", seconds_3000_frames=10.0)

    for name in ("one", "two", BASELINE):
        monkeypatch.setitem(ROWS, name, quick)
    asked = rollout.parse(["--backbone", "tiny-wan-test"])
    rollout.work(tmp_path, ["one", "two"], rollout.parse(["--backbone", "tiny-wan-test", "--apart"]))
    assert len(seen) == 1, "the second is for a process of its own"
    rollout.work(tmp_path, ["one", "two"], asked)
    kept = json.loads((results / "rollout-cpu.json").read_text())
    assert seen == [0, 1]
    assert [line["policy"] for line in kept["rows"]] == ["one", "two"]
    assert {"device", "command", "commit"} <= set(kept)
    assert "No speed-up is given" in kept["notes"]
    rollout.work(tmp_path, ["one", "two", BASELINE], asked)
    kept = json.loads((results / "rollout-cpu.json").read_text())
    assert seen == [0, 1, 2], "what was measured is not measured again"
    assert [line["ratio_to_fastest_dense"] for line in kept["rows"]] == [1.0, 1.0, 1.0]


def test_a_process_that_dies_or_hangs_costs_its_row_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    codes = iter([1, None, 0, 0])

    def child(folder: Path, *, num_done: int, row_seconds: float, minutes: float) -> int | None:
        if num_done == 0:
            rollout.add_row(folder, RowResult("a", density=1.0))
        elif num_done == 3:
            rollout.add_row(folder, RowResult("d", density=1.0))
        return next(codes)

    monkeypatch.setattr(rollout, "run_child", child)
    rollout.supervise(tmp_path, ["a", "b", "c", "d"], rollout.parse(["--row-seconds", "60"]))
    rows = rollout.read_rows(tmp_path)
    assert [result.policy for result in rows] == ["a", "b", "c", "d"]
    assert [result.notes for result in rows] == [
        "",
        "failed: its process ended with 1",
        "failed: took more than 60 s",
        "",
    ]


def test_a_curve_is_integrated_over_every_chunk() -> None:
    curve = rollout_growing.Curve((10, 20, 40), (1.0, 2.0, 4.0))
    assert curve.at(0) == 1.0  # shorter than measured: no faster than the shortest
    assert curve.at(30) == 3.0
    assert curve.at(50) == 5.0
    assert curve.total(41) == pytest.approx(10 * 1.0 + sum(c / 10 for c in range(10, 41)))


@pytest.mark.usefixtures("instant_pictures")
def test_the_dense_row_sees_everything_and_says_how_far_it_was_real() -> None:
    result = make_row(BASELINE, TINY, CPU)
    assert result.density == 1.0
    assert result.seconds_3000_frames
    assert result.cache_keys == 54 * 3 * 4
    assert "real cache up to frame 48" in result.notes
    assert "sdpa" in result.notes


@pytest.mark.usefixtures("instant_pictures")
@pytest.mark.parametrize(
    "policy", ["flowcache + radial", *(pytest.param(n, marks=SLOW) for n in ("radial", "svg", "flowcache", "annca"))]
)
def test_a_baseline_row_is_timed_through_the_product(policy: str) -> None:
    result = make_row(policy, TINY, CPU)
    assert result.seconds_3000_frames, result.notes
    assert result.fps_with_vae
    assert "{" in result.notes, "its settings stand in the row"


@pytest.mark.usefixtures("instant_pictures")
@pytest.mark.parametrize(("policy", "seen"), [("fastar-lsh", 0.1), pytest.param("tempcache", 1.0, marks=SLOW)])
def test_a_row_over_the_table_says_what_is_seen_and_chosen(policy: str, seen: float) -> None:
    result = make_row(policy, TINY, CPU)
    assert result.seconds_3000_frames, result.notes
    assert result.fps_last_100
    assert result.fps_with_vae
    assert result.cache_keys == 16 * 12
    tiles = sum(-(-num // 16) for num in (12, 14 * 12, 12))
    assert f"{max(1, round(seen * tiles))} cached tiles chosen" in result.notes


@pytest.mark.usefixtures("instant_pictures")
def test_annsa_alone_merges_nothing_and_says_that_its_history_is_replayed() -> None:
    result = make_row("annsa-lsh", TINY, CPU)
    assert result.seconds_3000_frames, result.notes
    assert result.cache_keys == 54 * 12
    assert result.density == pytest.approx(rollout_table.ANNSA_DENSITY, abs=0.02)
    assert "replayed throughout" in result.notes


def test_a_replayed_table_gives_what_attention_over_its_keys_gives() -> None:
    table = rollout_table.ReplayedTable(TINY, 3)
    k_NTD, v_NTD = table.own(0)
    torch.manual_seed(0)
    k_NTD.normal_(), v_NTD.normal_()
    layer = table.layers[0]
    q = torch.randn(12, *k_NTD.shape[::2])
    wide = F.pad(q, (0, EXTRA_CHANNELS))
    wide[..., q.shape[-1] : q.shape[-1] + 2] = 1
    index = torch.arange(4, dtype=torch.int32).expand(len(k_NTD), 1, 4)
    found = attend_listed_plain(wide, layer.k_NLW, layer.v_NLD, index, table.tile)
    places = [16 * chunk + token for chunk in range(4) for token in range(12)]  # the other four of each tile are none
    k, v = layer.k_NLW[:, places, : q.shape[-1]], layer.v_NLD[:, places]
    expected = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None])[0].transpose(0, 1)
    torch.testing.assert_close(found, expected)
    table.remember(0, torch.zeros(12, 3))
    assert torch.equal(layer.v_NLD[:, 16:28], v_NTD)


def test_rows_come_in_the_order_in_which_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(rollout, "supervise", lambda folder, names, asked: seen.extend(names))
    rollout.main(["--rows", "svg,dense,radial"])
    assert seen == ["svg", "dense", "radial"]


@pytest.mark.usefixtures("instant_pictures")
def test_the_large_model_is_timed_with_its_bounded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "of", lambda self, name: self)
    monkeypatch.setattr(rollout_native, "LARGE_BUDGET", 20)  # small heads have more overhead
    monkeypatch.setattr(rollout_native, "make_vae", lambda settings: (None, "no VAE"))
    result = rollout_native.large_row(TINY, CPU)
    assert result.fps_300_400
    assert result.fps_with_vae == 12.0
    assert "with pictures" in result.notes
    assert "20 latent frames' worth" in result.notes
    assert result.cache_keys
    assert result.cache_keys > 6 * 4


@pytest.mark.parametrize("kind", ["chunkwise", "rolling"])
def test_a_native_row_is_timed_with_its_pictures(kind: str) -> None:
    sizes = replace(TINY.backbone, rollout=kind)
    if kind == "rolling":
        native = Native(num_steps=3, shift=5.0, window_chunks=3, attended_latent_frames=15, sink_latent_frames=3)
        sizes = replace(sizes, native=native)
    settings = replace(TINY, backbone=sizes)
    result = rollout_native.native_row(None, False, settings, CPU)
    assert result.fps_with_vae
    assert result.fps_last_100
    assert result.cache_keys == (6 if kind == "chunkwise" else 15) * 4


class _Named:
    def __init__(self, name: str) -> None:
        self.version = name


@pytest.mark.parametrize(
    ("compute", "missing", "expected"),
    [
        ((9, 0), (), ["attention: flash-attn-4"]),
        ((9, 0), ("flash-attn-4",), ["attention: flashinfer", "not flash-attn-4: its package cannot be imported"]),
        ((9, 0), ("flash-attn-4", "flashinfer", "flash-attn-3"), ["attention: sdpa", "not flashinfer: its package"]),
        ((8, 0), ("flashinfer",), ["attention: sdpa", "not flash-attn-4: it needs compute capability 9.0 to 11.9"]),
    ],
)
def test_one_line_says_what_a_gpu_lacks(
    compute: tuple[int, int], missing: tuple[str, ...], expected: list[str]
) -> None:
    def load(name: str, hardware: Hardware, need: KernelNeed) -> object:
        if name in missing:
            raise ImportError(f"No module named {name!r}")
        return _Named(name)

    line = rollout.kernel_line(Hardware("cuda", compute), KernelNeed(torch.bfloat16, 128), load)
    assert "\n" not in line
    assert all(part in line for part in expected), line

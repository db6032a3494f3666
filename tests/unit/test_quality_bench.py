"""The quality bench: its paths show a place once, its pieces are measured once, its tables compare like with like."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.bench import quality, quality_items
from tests.bench.quality_items import Item, claim, list_items, marks_of, work
from tests.bench.quality_lab import held_bytes
from tests.bench.quality_places import CHUNK_FRAMES, DISTANCES, GROUPS, place_before, sweep
from tests.bench.quality_policies import ALL, config_of
from tests.bench.quality_rows import adaptive_rows, add_times
from tests.bench.quality_tables import SETTINGS, row
from tests.bench.quality_turns import paired
from workers.cache.dense import DenseCache
from workers.cache.temporal_merge import MergeSettings, TemporalCache
from workers.config import RenderConfig
from workers.config_tiles import TileCacheConfig
from workers.contracts import KeyValues
from workers.model.rope import grid_positions
from workers.search.exact import ExactSearch
from workers.worlds.clips import VIEW_SIZE


@pytest.mark.parametrize("group", ["still", "slow camera", "fast camera"])
def test_a_place_that_is_returned_to_was_seen_once(group: str) -> None:
    frames = 1500 if group == "fast camera" else 3000
    for seed in range(4):
        path = sweep(frames, GROUPS[group], np.random.default_rng(seed))
        assert path.shape == (frames, 2)
        last = frames // CHUNK_FRAMES - 1
        for place in (place_before(last, distance) for distance in DISTANCES):
            if place < 1:
                continue
            views = path[place * CHUNK_FRAMES : (place + 1) * CHUNK_FRAMES]
            gone = place * CHUNK_FRAMES + int(300 / GROUPS[group].speed)  # a corner and a row farther
            later = path[gone : last * CHUNK_FRAMES]
            if len(later) == 0:
                continue
            apart = np.abs(views[:, None] - later[None]).max(-1)
            assert apart.min() >= VIEW_SIZE


def test_cuts_keep_every_frame_of_the_sweep() -> None:
    cut, whole = (sweep(960, GROUPS[name], np.random.default_rng(3)) for name in ("cuts", "still"))
    assert not np.array_equal(cut, whole)
    assert sorted(map(tuple, cut.tolist())) == sorted(map(tuple, whole.tolist()))


def test_every_setting_is_a_valid_render() -> None:
    for name in ALL:
        assert config_of(name).policy is not None


def test_pieces_cover_all_worlds_once_and_have_names_of_their_own() -> None:
    items = list_items(["walk", "rollout"], ["dense", "window"], worlds=10, batch=4, frames=3000)
    walks = [item for item in items if item.part == "walk" and item.policy == "window"]
    assert [world for item in walks for world in item.worlds] == list(range(10))
    assert len({item.name for item in items}) == len(items)
    assert items[0].policy == "dense", "all others are compared with it"
    first, second = Item("walk", "dense", "still", 3, 5, 60).halves()
    assert [*first.worlds, *second.worlds] == [3, 4, 5, 6, 7]


def test_a_walk_is_looked_at_at_600_1500_and_3000_frames() -> None:
    assert [CHUNK_FRAMES * (mark + 1) for mark in marks_of(250, "walk")] == [600, 1500, 3000]
    assert marks_of(125, "groups") == [124]


def test_a_target_is_compared_with_fixed_settings_around_it() -> None:
    def row(policy: str, density: float, recall: float) -> dict[str, object]:
        return {"part": "adaptive", "policy": policy, "frames": 3000, "n": 2, "density": density, "recall": recall}

    rows = [
        row("annsa, density 0.2", 0.2, 0.7),
        row("annsa, density 0.6", 0.6, 0.9),
        row("annsa, recall 0.9", 0.4, 0.88),
        row("annsa, recall 0.98", 0.7, 0.97),
    ]
    inside, beyond = adaptive_rows(rows)
    assert inside["recall_of_fixed_at_this_density"] == pytest.approx(0.8)
    assert inside["density_of_fixed_at_this_recall"] == pytest.approx(0.56)
    assert "recall_of_fixed_at_this_density" not in beyond


def test_files_that_are_merged_say_where_each_row_is_from_and_the_later_measurement_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    walk = {"part": "walk", "group": "still", "frames": 3000}
    for name, device, rows in (
        ("old", "one GPU", [walk | {"policy": "dense", "recall": 1.0}, walk | {"policy": "annsa", "recall": 0.8}]),
        ("new", "another", [walk | {"policy": "annsa", "recall": 0.9}]),
    ):
        record = {"device": device, "commit": name, "command": name, "notes": name, "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    rows, notes = quality.merge(["old", "new"])
    assert {(row["policy"], row["recall"], row["device"]) for row in rows} == {
        ("dense", 1.0, "one GPU"),
        ("annsa", 0.9, "another"),
    }
    assert notes == "old new"


def test_a_piece_is_claimed_once(tmp_path: Path) -> None:
    assert claim(tmp_path / "a.claim")
    assert not claim(tmp_path / "a.claim")


def test_what_finds_no_memory_is_given_back_and_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others, a piece that is too large for the moment must not use up the whole list, nor stay claimed."""
    pieces = [Item("walk", name, "still", 0, 2, 600) for name in ("dense", "tempcache", "window")]
    asked: list[tuple[str, int]] = []

    def measure(item: Item, lab: object) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        asked.append((item.policy, item.num))
        if item.policy == "dense" or (item.policy == "tempcache" and len(asked) < 5):
            raise torch.OutOfMemoryError("none left")
        return {}, {"made": torch.zeros(item.num)}

    monkeypatch.setattr(quality_items, "_measure_walk", measure)
    monkeypatch.setattr(quality_items, "_TO_MAKE_ROOM_S", 0.0)
    lab = SimpleNamespace(revision="0", dtype="float32")
    work(pieces, cast(Any, lab), tmp_path, takes_heavy=True, until=time.time() + 60)
    # Each as a whole, then its first half alone, and once more after the others.
    first = [("dense", 2), ("dense", 1), ("tempcache", 2), ("tempcache", 1), ("window", 2)]
    assert asked == [*first, ("dense", 2), ("dense", 1), ("tempcache", 2)]
    assert {path.stem for path in tmp_path.glob("*.json")} == {piece.name for piece in pieces[1:]}
    assert [path.stem for path in tmp_path.glob("*.error")] == [pieces[0].name]


@pytest.mark.parametrize("frames", [1200, 3000])
def test_every_table_that_is_tried_is_a_valid_render_and_keeps_its_share_of_a_shorter_walk(frames: int) -> None:
    share = frames / 3000
    for setting in SETTINGS:
        scaled = setting.scaled(share)
        config = RenderConfig.model_validate(scaled.record)
        assert isinstance(config.cache, TileCacheConfig)
        assert abs(scaled.kept - setting.kept * share) <= 1.5
        config.cache.chunks(3)


def test_losses_of_tables_are_paired_by_world() -> None:
    def of(first: float, second: float) -> dict[str, object]:
        named = dict.fromkeys(("recall", "strict_recall", "density", "kv_share_of_full"), 0.5)
        return {"psnr_db": {"42": first, "600": second}, **named}

    made = row(SETTINGS[0], [of(28.0, 27.0), of(20.0, 19.0)], [of(30.0, 30.0), of(21.0, 21.0)], 3000)
    assert made["loss_to_dense_db"] == pytest.approx((2.5 + 1.5) / 2)
    assert made["loss_at_distance"] == {"42": 1.5, "600": 2.5}
    assert (made["n"], made["places"], made["kept"]) == (2, 4, SETTINGS[0].kept)


def test_a_merging_cache_takes_its_memory_once_and_a_full_one_ever_more() -> None:
    held: dict[str, list[int]] = {"temporal": [], "dense": []}
    settings = MergeSettings(sink_tokens=16, recent_tokens=32, num_groups=320, min_cosine=0.9, storage="int8")
    caches = {"temporal": TemporalCache(1, settings, ExactSearch().top1), "dense": DenseCache(1)}
    generator = torch.Generator().manual_seed(0)
    for at in range(40):
        k, v = torch.randn(2, 1, 16, 2, 16, generator=generator)
        for name, cache in caches.items():
            cache.append(0, KeyValues(k, v, grid_positions(torch.tensor([at]), 4, 4)))
            held[name].append(held_bytes(cache))
            assert held[name][-1] >= cache.num_bytes
            if name == "temporal":
                assert held[name][-1] == cache.num_bytes
    assert len(set(held["temporal"][4:])) == 1
    assert held["dense"][-1] > 3 * held["dense"][9]


@pytest.mark.parametrize(("weights", "found"), [("0123456789abcdef", {"600": 1.1}), ("fedcba9876543210", None)])
def test_seconds_per_chunk_come_from_the_bench_of_turns_if_it_had_the_same_weights(
    weights: str, found: dict[str, float] | None
) -> None:
    rows: list[dict[str, Any]] = [{"part": "walk", "policy": name} for name in ("dense", "svg")]
    rows.append({"part": "rollout", "policy": "dense"})
    turns = {
        "notes": f"weights {weights}; 2 threads.",
        "rows": [{"policy": "dense", "seconds_per_chunk_at": {"600": 1.1}}],
    }
    add_times(rows, turns, "0123456789abcdef" * 4)
    assert [row.get("seconds_per_chunk_at") for row in rows] == [found, None, None]
    assert "seconds_per_chunk_at" not in rows[2]


def test_a_rollout_behind_another_is_compared_with_it_while_both_take_turns() -> None:
    seconds = {"ahead": [9.0] * 30 + [1.0, 1.1, 1.2, 1.3] * 5, "behind": [9.0] * 30 + [1.0] * 20}
    ahead, behind = (SimpleNamespace(seconds=found, cpu_seconds=found) for found in seconds.values())
    found = paired(cast(Any, ahead), cast(Any, behind))
    assert found["paired_time_end_to_600"] == pytest.approx(1.15)
    assert found["paired_mean_cpu_time_end_to_600"] == pytest.approx(1.15)

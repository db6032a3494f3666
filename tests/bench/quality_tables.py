"""How much a tile table must keep and show: many settings of it on one true history, against dense attention.

`python -m tests.bench.quality_tables` walks through each world once (clean passes over sink and newest latent frames),
keeps all keys, lays them into table after table, and cuts back to places seen before, as `quality` does. There every
policy makes its own history; here all settings share one, so that a setting costs seconds and not minutes. World by
world: the result file grows with each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.bench.quality_lab import QualityLab, Run, full_bytes, mean_and_ci, stored_bytes
from tests.bench.quality_places import Walks, place_before
from tests.bench.record import keep, report
from tests.plain_tables import PlainTable, PlainTileChoice
from workers.assemble import LoadedModel, TakeParts, prepare_take
from workers.assemble_tiles import table_settings
from workers.attention.measure import RecallMeter
from workers.cache.dense import DenseCache
from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.contracts import Attending, KeyValues, KVCache
from workers.model.rope import make_rotation, rotate

Figures = dict[str, Any]
DISTANCES = (42, 135, 228, 414, 600)
"""Latent frames since a place was seen, as far as the walk reaches."""
_NOTES = (
    "One true history for all settings: clean passes of true latents over the sink and the newest latent frames, all "
    "keys kept; each table takes them over in the order of time. At the end the next chunk is made, and the camera "
    "cuts back to places seen so many latent frames ago. kept, seen: latent frames' worth of slots in the table, and "
    "of those that a query sees (its own chunk not counted); spare: of those kept, what a full history frees at once; "
    "bits of a stored channel of the history; history_at: steps that look at the history, for the others too "
    "(empty: all look); always_recent: the newest chunk, among those seen, is attended to afresh in each. Losses "
    "are against dense attention over the same history, paired by world and place; ci95 is half the width over worlds. "
    "recall as in docs/memory.md."
)


_STORED = {16: "model", 8: "int8", 4: "int4"}
_COLUMNS = ("kept", "seen", "spare", "bits", "decay", "choose_at", "history_at", "always_recent")
_RECENT = 3
"""Latent frames of the newest chunk."""


@dataclass(frozen=True)
class Setting:
    """Of a table and of what is seen of it."""

    merging: str
    kept: int
    seen: float
    spare: int = 15
    bits: int = 16
    decay: float = 16.0
    choose_at: tuple[int, ...] = (0,)
    """Denoising steps that choose tiles."""
    history_at: tuple[int, ...] | None = None
    """Denoising steps that look at the history; None: all."""
    always_recent: bool = False
    """The newest chunk is always seen, and counts among what is."""

    @property
    def record(self) -> dict[str, Any]:
        cache: dict[str, Any] = {
            "merging": self.merging,
            "budget_latent_frames": self.kept,
            "spare_latent_frames": self.spare,
        }
        cache |= {"mass_decay": self.decay, "storage": _STORED[self.bits]}
        always = _RECENT if self.always_recent else 0
        attention = {"density": min(1.0, (self.seen - always) / (self.kept - always)), "choose_at": self.choose_at}
        attention |= {"history_at": self.history_at, "always_recent": self.always_recent}
        return {"policy": "fastar-tiles", "cache": cache, "attention": attention}

    def scaled(self, share: float) -> Setting:
        """For a walk that is as much shorter: the same share of the history is kept and seen."""
        kept, spare = (max(3, 3 * round(value * share / 3)) for value in (self.kept, self.spare))
        return replace(self, kept=kept, spare=spare, seen=round(self.seen * share, 1))

    @property
    def columns(self) -> dict[str, Any]:
        return {"policy": self.merging} | {name: getattr(self, name) for name in _COLUMNS}

    @property
    def file_name(self) -> str:
        """Without what most settings do not have."""
        parts = [str(value) for value in self.columns.values() if value is not None and value is not False]
        return "-".join(parts).replace(" ", "")


SETTINGS = [
    *(Setting("pairs", 120, 24, decay=decay) for decay in (16.0, 0.0)),
    Setting("chains", 120, 24),
    Setting("pairs", 240, 24),
    Setting("pairs", 240, 24, decay=0.0),
    Setting("pairs", 240, 12),
    Setting("pairs", 240, 48),
    Setting("pairs", 240, 96),
    Setting("pairs", 240, 24, bits=8),
    Setting("pairs", 180, 24),
    Setting("pairs", 120, 12),
    Setting("pairs", 120, 48),
    Setting("pairs", 120, 96),
    Setting("pairs", 120, 24, decay=64.0),
    Setting("chains", 48, 4.8),
    Setting("pairs", 48, 4.8),
    Setting("pairs", 48, 12),
    Setting("pairs", 81, 12),
    Setting("pairs", 120, 12, choose_at=(0, 1)),
    Setting("pairs", 240, 24, history_at=(0,), always_recent=True),
    Setting("pairs", 240, 24, history_at=(0,)),
    Setting("pairs", 240, 24, always_recent=True),
    Setting("pairs", 240, 48, history_at=(0,), always_recent=True),
    Setting("pairs", 240, 24, choose_at=(0, 1), history_at=(0, 1), always_recent=True),
    Setting("pairs", 180, 30, history_at=(0,), always_recent=True),
    Setting("pairs", 240, 24, bits=4),
]
"""For 3000 frames, in the order of their worth; those of one table that follow one another fill it once."""


class BothCaches:
    """Reads one cache and fills two."""

    def __init__(self, read: KVCache, filled: KVCache) -> None:
        self._read, self._filled = read, filled

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        self._filled.append(layer_index, chunk)
        self._read.append(layer_index, chunk)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._read, name)


class FilledMeter(RecallMeter):
    """Knows the whole history from the start, and its keys after RoPE, whose times never change."""

    def __init__(self, cache: KVCache, history: History) -> None:
        super().__init__(cache, num_queries=12, dtype=torch.float32)
        for layer, keys in enumerate(history.layers):
            self._k[layer] = [keys.k_BKND]
        self._position, self._rotated = history.layers[0].position_K3, history.rotated

    def observe(self, attending: Attending) -> None:
        rotated = self._rotated[attending.layer_index]
        super().observe(replace(attending, rotate=lambda keys: replace(keys, k_BKND=rotated)))


@dataclass(eq=False)
class History:
    """All keys of one walk."""

    cache: DenseCache
    layers: list[KeyValues]
    rotated: list[Tensor]

    @classmethod
    def of(cls, cache: DenseCache, lab: QualityLab) -> History:
        """What a cache holds."""
        backbone = lab.model({"policy": "dense"}).backbone
        layers = [keys for layer in range(backbone.num_layers) if (keys := cache.read(layer)) is not None]
        rotation = make_rotation(layers[0].position_K3, backbone.head_dim, backbone.rope_theta)
        return cls(cache, layers, [rotate(keys.k_BKND, rotation) for keys in layers])


def walk(lab: QualityLab, walks: Walks) -> History:
    """The true history, all of it."""
    model = lab.model({"policy": "window"})
    parts = prepare_take(model, 0)
    dense = DenseCache(model.backbone.num_layers)
    run = Run(lab, walks, model, replace(parts, cache=BothCaches(parts.cache, dense)), None)
    for chunk in range(walks.num_chunks - 1):
        run.remember(chunk)
    return History.of(dense, lab)


def fill(cache: KVCache, history: History, chunk_tokens: int) -> None:
    """Lay the history into a cache, chunk by chunk."""
    for start in range(0, history.layers[0].num_tokens, chunk_tokens):
        for layer, keys in enumerate(history.layers):
            cache.append(layer, keys.narrow(start, start + chunk_tokens))


def make_table(model: LoadedModel) -> tuple[PlainTable, int]:
    """An empty one, and the tokens of a chunk."""
    config = model.config.cache
    assert isinstance(config, TileCacheConfig)
    sizes = table_settings(config, model.backbone, model.latent_size)
    return PlainTable(sizes), sizes.chunk_tokens


def parts_of(table: PlainTable, model: LoadedModel) -> TakeParts:
    """A render over a table that is filled already."""
    config, attention = model.config.cache, model.config.attention
    assert isinstance(config, TileCacheConfig)
    assert isinstance(attention, TileAttentionConfig)
    policy = PlainTileChoice(attention, table, table_settings(config, model.backbone, model.latent_size))
    return replace(prepare_take(model, 0), cache=table, policy=policy, on_table=False)


def look_back(lab: QualityLab, walks: Walks, model: LoadedModel, parts: TakeParts, meter: RecallMeter) -> Figures:
    """The next chunk and the places that are cut back to."""
    mark = walks.num_chunks - 1
    distances = [distance for distance in DISTANCES if place_before(mark, distance) >= 1]
    made = list(Run(lab, walks, model, parts, meter).try_out(mark, distances))
    tokens = model.backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)
    share = stored_bytes(model, made[0].kv_bytes, lab.dtype) / full_bytes(model, 3 * mark * tokens)
    return {
        "psnr_db": {str(one.distance): float(one.psnr_B) for one in made if one.distance is not None},
        "recall": float(np.mean([float(one.recall_B) for one in made])),
        "strict_recall": float(np.mean([float(one.strict_recall_B) for one in made])),
        "density": float(np.mean([one.density for one in made])),
        "kv_share_of_full": share,
    }


class World:
    """One walk; what is measured on it lies in a folder, and is not measured again.

    Args:
        lab: The model.
        index: Of the world.
        frames: Of the walk.
        folder: Keeps the history too, for as long as it is there.
    """

    def __init__(self, lab: QualityLab, index: int, frames: int, folder: Path) -> None:
        self._lab, self._index, self._frames, self._folder = lab, index, frames, folder
        self._history: History | None = None
        self._table: tuple[Any, PlainTable] | None = None

    def measure(self, setting: Setting | None) -> Figures:
        """Of one setting; None is dense attention."""
        name = "dense" if setting is None else setting.file_name
        path = self._folder / f"world-{self._index}-{self._frames}-{name}.json"
        if path.exists():
            found: Figures = json.loads(path.read_text())
            return found
        found = self._measure(setting)
        path.write_text(json.dumps(found))
        return found

    def _measure(self, setting: Setting | None) -> Figures:
        lab, walks, history = self._lab, self._walks(), self._all_keys()
        if setting is None:
            model = lab.model({"policy": "dense"})
            parts = replace(prepare_take(model, 0), cache=history.cache)
            return look_back(lab, walks, model, parts, FilledMeter(history.cache, history))
        model = lab.model(setting.record)
        if self._table is None or self._table[0] != model.config.cache:
            table, chunk_tokens = make_table(model)
            fill(table, history, chunk_tokens)
            self._table = model.config.cache, table
        table = self._table[1]
        return look_back(lab, walks, model, parts_of(table, model), FilledMeter(table, history))

    def _walks(self) -> Walks:
        return self._lab.walks("still", [self._index], self._frames)

    def _all_keys(self) -> History:
        path = self._folder / f"history-{self._index}-{self._frames}.safetensors"
        if self._history is None and path.exists():
            dense = DenseCache(self._lab.model({"policy": "dense"}).backbone.num_layers)
            dense.restore(load_file(path))
            self._history = History.of(dense, self._lab)
        if self._history is None:
            self._history = walk(self._lab, self._walks())
            save_file({name: x.clone() for name, x in self._history.cache.state().items()}, path)
        return self._history


def row(setting: Setting | None, found: Sequence[Figures], dense: Sequence[Figures], frames: int) -> dict[str, Any]:
    """The figures of one setting over all its worlds."""
    named = {"policy": "dense"} | dict.fromkeys(_COLUMNS) if setting is None else setting.columns
    distances = list(dense[0]["psnr_db"])
    psnr, best = (np.array([list(one["psnr_db"].values()) for one in some]) for some in (found, dense))
    mean, ci = mean_and_ci((best - psnr).mean(1).tolist())
    by_distance = dict(zip(distances, np.round((best - psnr).mean(0), 2).tolist(), strict=True))
    figures: dict[str, Any] = {"frames": frames, "n": len(found), "places": len(found) * len(distances)}
    figures |= {"loss_to_dense_db": mean, "loss_ci95": ci, "loss_at_distance": by_distance}
    figures["revisit_psnr_db"] = float(psnr.mean())
    for name in ("recall", "strict_recall", "density", "kv_share_of_full"):
        figures[name] = float(np.mean([one[name] for one in found]))
    return named | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="*", default=[0, 1, 2, 3])
    parser.add_argument("--frames", type=int, default=3000, help="fewer make the tables as much smaller")
    parser.add_argument("--settings", type=int, nargs="*", help="their places in the list; all unless told")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="what is measured is kept there; a run goes on from what it finds")
    parser.add_argument("--name", default="quality_tiles")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    lab = QualityLab(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "float32")
    folder: Path = asked.folder or Path(tempfile.mkdtemp(prefix="quality-tables-"))
    folder.mkdir(parents=True, exist_ok=True)
    chosen = SETTINGS if asked.settings is None else [SETTINGS[place] for place in asked.settings]
    settings = [setting.scaled(asked.frames / 3000) for setting in chosen]
    notes = f"weights {lab.revision[:16]}; float32. {_NOTES}"
    found: dict[Setting | None, list[Figures]] = {}
    rows: list[dict[str, Any]] = []
    for index in asked.worlds:
        world, began = World(lab, index, asked.frames, folder), time.monotonic()
        for setting in (None, *settings):
            figures = found.setdefault(setting, [])
            figures.append(world.measure(setting))
            rows = [row(name, some, found[None][: len(some)], asked.frames) for name, some in found.items()]
            keep(asked.name, rows, notes)
            print(f"world {index}, {time.monotonic() - began:.0f} s: {setting} {figures[-1]}", flush=True)
    report(asked.name, rows, notes)


if __name__ == "__main__":
    main()

"""How much a tile table must keep and show: many settings of it on one true history, against dense attention.

`python -m tests.bench.quality_tables` walks through each world once (clean passes over sink and newest latent frames),
keeps all keys, lays them into table after table, and cuts back to places seen before, as `quality` does. There every
policy makes its own history; here all settings share one, so that a setting costs seconds and not minutes. World by
world: the result file grows with each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.bench.quality_lab import Made, QualityLab, Run, full_bytes, mean_and_ci, stored_bytes
from tests.bench.quality_places import CHUNK_FRAMES, Walks, place_before
from tests.bench.record import keep, report
from tests.plain_tables import PlainTable, PlainTileChoice
from workers.assemble import LoadedModel, TakeParts, prepare_take
from workers.assemble_tiles import table_settings
from workers.attention.measure import RecallMeter
from workers.cache.dense import DenseCache
from workers.config_tiles import TileAttentionConfig, TileCacheConfig
from workers.contracts import Attending, KeyValues, KVCache
from workers.model.rope import make_rotation, rotate

DISTANCES = (42, 228, 414, 600)
_NOTES = (
    "One true history for all settings: clean passes of true latents over the sink and the newest latent frames, all "
    "keys kept; each table takes them over in the order of time. At the end the next chunk is made, and the camera "
    "cuts back to places seen so many latent frames ago. kept, seen: latent frames' worth of slots in the table, and "
    "of those that a query sees (its own chunk not counted); spare: of those kept, what a full history frees at once; "
    "bits of a stored channel of the history. Losses are against dense attention over the same history, paired by "
    "world and place; ci95 is half the width over worlds. recall as in docs/memory.md."
)


@dataclass(frozen=True)
class Setting:
    """Of a table and of what is seen of it."""

    merging: str
    kept: int
    seen: float
    spare: int = 15
    bits: int = 16

    @property
    def cache(self) -> dict[str, Any]:
        return {"merging": self.merging, "budget_latent_frames": self.kept, "spare_latent_frames": self.spare}

    @property
    def record(self) -> dict[str, Any]:
        density = min(1.0, self.seen / self.kept)
        return {"policy": "fastar-tiles", "cache": self.cache, "attention": {"density": density}}


SETTINGS = [
    *(Setting("pairs", 120, seen) for seen in (12, 24, 48, 96)),
    Setting("chains", 48, 4.8),
    *(Setting("pairs", 48, seen) for seen in (4.8, 12)),
    *(Setting("pairs", 81, seen) for seen in (12, 24, 48)),
    Setting("pairs", 120, 6),
    *(Setting("pairs", 159, seen) for seen in (12, 24, 48)),
    Setting("chains", 120, 36),
]
"""In the order of their worth should the time run out; those of one table follow one another."""


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


@dataclass
class Collected:
    """Figures of one setting by world."""

    psnr: list[dict[int, float]] = field(default_factory=list)
    loss: list[dict[int, float]] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    strict: list[float] = field(default_factory=list)
    kv_bytes: float = 0.0
    density: float = 0.0


def walk(lab: QualityLab, walks: Walks) -> History:
    """The true history, all of it."""
    model = lab.model({"policy": "window"})
    parts = prepare_take(model, 0)
    dense = DenseCache(model.backbone.num_layers)
    run = Run(lab, walks, model, replace(parts, cache=BothCaches(parts.cache, dense)), None)
    for chunk in range(walks.num_chunks - 1):
        run.remember(chunk)
    layers = [keys for layer in range(model.backbone.num_layers) if (keys := dense.read(layer)) is not None]
    b = model.backbone
    rotation = make_rotation(layers[0].position_K3, b.head_dim, b.rope_theta)
    return History(dense, layers, [rotate(keys.k_BKND, rotation) for keys in layers])


def fill(cache: KVCache, history: History, chunk_tokens: int) -> None:
    """Lay the history into a cache, chunk by chunk."""
    for start in range(0, history.layers[0].num_tokens, chunk_tokens):
        for layer, keys in enumerate(history.layers):
            cache.append(layer, keys.narrow(start, start + chunk_tokens))


def look_back(lab: QualityLab, walks: Walks, model: LoadedModel, parts: TakeParts, meter: RecallMeter) -> list[Made]:
    """The next chunk and the places that are cut back to."""
    mark = walks.num_chunks - 1
    distances = [distance for distance in DISTANCES if place_before(mark, distance) >= 1]
    return list(Run(lab, walks, model, parts, meter).try_out(mark, distances))


def measure_world(
    lab: QualityLab, world: int, frames: int, settings: Sequence[Setting]
) -> Iterator[tuple[Setting | None, list[Made], LoadedModel]]:
    """All settings on one world, dense attention (None) first."""
    walks = lab.walks("still", [world], frames)
    history = walk(lab, walks)
    model = lab.model({"policy": "dense"})
    parts = replace(prepare_take(model, 0), cache=history.cache)
    yield None, look_back(lab, walks, model, parts, FilledMeter(parts.cache, history)), model
    cache: PlainTable | None = None
    of: tuple[Any, ...] = ()
    for setting in settings:
        model = lab.model(setting.record)
        config, attention = model.config.cache, model.config.attention
        assert isinstance(config, TileCacheConfig)
        assert isinstance(attention, TileAttentionConfig)
        sizes = table_settings(config, model.backbone, model.latent_size)
        if of != (config, setting.bits):
            cache = PlainTable(sizes, in_8_bits=setting.bits == 8)
            of = config, setting.bits
            fill(cache, history, sizes.chunk_tokens)
        assert cache is not None
        policy = PlainTileChoice(attention, cache, sizes)
        parts = replace(prepare_take(model, 0), cache=cache, policy=policy, on_table=False)
        yield setting, look_back(lab, walks, model, parts, FilledMeter(cache, history)), model


def add(found: Collected, made: list[Made], dense: list[Made]) -> None:
    """One world's figures."""
    psnr = {one.distance: float(one.psnr_B) for one in made if one.distance is not None}
    best = {one.distance: float(one.psnr_B) for one in dense if one.distance is not None}
    found.psnr.append(psnr)
    found.loss.append({distance: best[distance] - value for distance, value in psnr.items()})
    found.recall.append(float(np.mean([float(one.recall_B) for one in made])))
    found.strict.append(float(np.mean([float(one.strict_recall_B) for one in made])))
    found.kv_bytes = made[0].kv_bytes
    found.density = float(np.mean([one.density for one in made]))


def row(setting: Setting | None, found: Collected, frames: int, model: LoadedModel, dtype: str) -> dict[str, Any]:
    """The figures of one setting."""
    tokens = model.backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)
    full = full_bytes(model, (frames // CHUNK_FRAMES - 1) * 3 * tokens)
    named = {"policy": "dense", "kept": None, "seen": None, "spare": None, "bits": None}
    if setting is not None:
        named = {"policy": setting.merging} | {x: getattr(setting, x) for x in ("kept", "seen", "spare", "bits")}
    loss, loss_ci = mean_and_ci([float(np.mean(list(one.values()))) for one in found.loss])
    psnr, _ = mean_and_ci([float(np.mean(list(one.values()))) for one in found.psnr])
    by_distance = {d: round(float(np.mean([one[d] for one in found.loss])), 2) for d in found.loss[0]}
    return named | {
        "frames": frames,
        "n": len(found.loss),
        "places": sum(len(one) for one in found.loss),
        "loss_to_dense_db": loss,
        "loss_ci95": loss_ci,
        "loss_at_distance": by_distance,
        "revisit_psnr_db": psnr,
        "recall": float(np.mean(found.recall)),
        "strict_recall": float(np.mean(found.strict)),
        "density": found.density,
        "kv_share_of_full": stored_bytes(model, found.kv_bytes, dtype) / full,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=4)
    parser.add_argument("--first", type=int, default=0, help="first world")
    parser.add_argument("--frames", type=int, default=3000)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="so many of them")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="quality_tiles")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    lab = QualityLab(torch.device("cuda" if torch.cuda.is_available() else "cpu"), "float32")
    found: dict[Setting | None, Collected] = {}
    models: dict[Setting | None, LoadedModel] = {}
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    notes = f"weights {lab.revision[:16]}; float32. {_NOTES}"
    for world in range(asked.first, asked.first + asked.worlds):
        dense: list[Made] = []
        for setting, made, model in measure_world(lab, world, asked.frames, SETTINGS[: asked.settings]):
            dense = dense or made
            models[setting] = model
            add(found.setdefault(setting, Collected()), made, dense)
            rows = [row(name, one, asked.frames, models[name], lab.dtype) for name, one in found.items()]
            keep(asked.name, rows, notes)
            of = f"world {world}, {time.monotonic() - began:.0f} s: {setting}"
            print(of, found[setting].loss[-1], f"recall {found[setting].recall[-1]:.3f}", flush=True)
            if time.monotonic() - began > asked.until:
                break
    report(asked.name, rows, notes)


if __name__ == "__main__":
    main()

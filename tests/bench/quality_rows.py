"""From the pieces that were measured apart to the rows of the quality table; every figure is paired by world."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.bench.quality_lab import QualityLab, full_bytes, mean_and_ci, stored_bytes
from tests.bench.quality_places import CHUNK_FRAMES
from tests.bench.quality_policies import ADAPTIVE, ALL, FAMILIES
from workers.quality.reference import psnr_db, ssim

_SAID = 60
"""Letters of a failure: which memory ran out, not how much each process had of it."""

Row = dict[str, Any]
Values = dict[str, list[float]]
"""By world, in the order of the worlds."""


@dataclass
class Found:
    """One policy on all its worlds of one part, group and length."""

    record: dict[str, Any]
    """Of the first piece: what does not depend on the world."""
    worlds: list[int] = field(default_factory=list)
    made: dict[tuple[int, int | None], Values] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    """(chunk, distance) -> figures; distance None is the chunk that goes on with the walk."""
    latents: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    vae_psnr_db: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    sums: Values = field(default_factory=lambda: defaultdict(list))
    """One number a piece, once for each of its worlds."""


Key = tuple[str, str, str, int]
"""Part, policy, group, frames."""


def read_pieces(folder: Path, revision: str) -> dict[Key, Found]:
    """All in the folder that was measured with these weights; most rows need the records alone, without latents."""
    found: dict[Key, Found] = {}
    records = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    for path, record in sorted(records, key=lambda pair: pair[1]["first"]):
        if record["revision"] != revision:
            continue
        key = record["part"], record["policy"], record["group"], record["frames"]
        one = found.setdefault(key, Found(record))
        if record["first"] not in one.worlds:
            latents = path.with_suffix(".safetensors")
            _add(one, record, load_file(latents) if latents.exists() else {})
    return found


def _add(found: Found, record: dict[str, Any], latents: dict[str, Tensor]) -> None:
    num = record["num"]
    found.worlds += range(record["first"], record["first"] + num)
    for made in record.get("made", []):
        values = found.made[made["chunk"], made["distance"]]
        for name in ("psnr_db", "ssim", "recall", "strict_recall"):
            values[name] += made[name]
        for name in ("density", "kv_bytes"):
            values[name] += [made[name]] * num
        values["guarded"] += [float(made["guard"] == "dense")] * num
    for mark, values_B in record.get("vae_psnr_db", {}).items():
        found.vae_psnr_db[int(mark)] += values_B
    for name in ("density", "kv_bytes", "peak_kv_bytes", "peak_kv_bytes_to_a_fifth"):
        if name in record:
            found.sums[name] += [record[name]] * num
    for name, tensor in latents.items():
        found.latents[name] += list(tensor)


def make_rows(found: dict[Key, Found], lab: QualityLab) -> Iterator[Row]:
    """All rows; what has no dense run to be compared with says so by None."""
    walks = {key: one for key, one in found.items() if key[0] != "rollout"}
    rows = [row for key, one in walks.items() for row in walk_rows(key, one, _dense_of(found, key), lab)]
    yield from sorted(rows, key=lambda row: (row["part"], row["group"], row["frames"]))
    for key, one in found.items():
        if key[0] == "rollout":
            yield rollout_row(key, one, _dense_of(found, key), lab)
    yield from adaptive_rows(rows)


def walk_rows(key: Key, one: Found, dense: Found | None, lab: QualityLab) -> Iterator[Row]:
    """One row for each length at which chunks were made."""
    part, policy, group, _ = key
    model = lab.model(ALL[policy])
    tokens = model.backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)
    for mark in sorted({chunk for chunk, _ in one.made}):
        back = [distance for chunk, distance in one.made if chunk == mark and distance is not None]
        all_made = [one.made[mark, distance] for distance in (None, *back)]
        psnr = _by_world([one.made[mark, distance]["psnr_db"] for distance in back])
        recall, strict = (_by_world([made[name] for made in all_made]) for name in ("recall", "strict_recall"))
        kv_bytes = float(np.mean(one.made[mark, None]["kv_bytes"]))
        row: Row = {"part": part, "policy": policy, "group": group, "frames": CHUNK_FRAMES * (mark + 1)}
        row |= {"n": len(one.worlds), "places": len(one.worlds) * len(back)}
        row |= _named("recall", recall) | _named("strict_recall", strict)
        row |= {
            "density": float(np.mean([made["density"] for made in all_made])),
            "kv_bytes": int(kv_bytes),
            "kv_share_of_full": stored_bytes(model, kv_bytes, one.record["dtype"])
            / full_bytes(model, 3 * mark * tokens),
        }
        if back:
            row |= _named("revisit_psnr_db", psnr)
            row |= {"revisit_ssim": float(np.mean([one.made[mark, distance]["ssim"] for distance in back]))}
            row |= _losses(one, dense, mark, back)
        row |= _compared(one, dense, mark, lab)
        if part == "groups" and model.config.guard.enabled:
            row |= {"guarded_share": float(np.mean([made["guarded"] for made in all_made]))}
        yield row | {"lpips": None}


def rollout_row(key: Key, one: Found, dense: Found | None, lab: QualityLab) -> Row:
    """Free rollouts: how far from dense with the same noise, by video frame."""
    row: Row = {"part": "rollout", "policy": key[1], "group": key[2], "frames": key[3], "n": len(one.worlds)}
    row |= {name: float(np.mean(values)) for name, values in one.sums.items()}
    row["peak_bytes_end_to_a_fifth"] = row["peak_kv_bytes"] / row["peak_kv_bytes_to_a_fifth"]
    frames = sorted(int(name.split(".")[1]) for name in one.latents if name.startswith("made."))
    if dense is not None and dense is not one:
        pairs = {frame: _compare(one, dense, f"made.{frame}", f"before.{frame}", lab) for frame in frames}
        row |= {"psnr_db_at_frame": {frame: round(mean_and_ci(pair[0])[0], 2) for frame, pair in pairs.items()}}
        row |= {"psnr_ci95_at_frame": {frame: round(mean_and_ci(pair[0])[1], 2) for frame, pair in pairs.items()}}
        row |= {"ssim_at_frame": {frame: round(mean_and_ci(pair[1])[0], 3) for frame, pair in pairs.items()}}
    return row | {"lpips": None}


def adaptive_rows(rows: Sequence[Row]) -> Iterator[Row]:
    """Recall targets against the fixed density that comes out as dense as they do, by interpolation between fixed ones.

    A target is compared where fixed settings lie on both sides of it.
    """
    longest = max((row["frames"] for row in rows if row["part"] == "adaptive"), default=0)
    at = {row["policy"]: row for row in rows if row["part"] == "adaptive" and row["frames"] == longest}
    for family in FAMILIES:
        names = [name for name in ADAPTIVE if name.startswith(f"{family},") and name in at]
        fixed = sorted((at[name]["density"], at[name]["recall"]) for name in names if "density" in name)
        for name in (name for name in names if "recall" in name):
            density, recall = at[name]["density"], at[name]["recall"]
            row: Row = {"part": "adaptive against fixed", "policy": name, "frames": longest, "n": at[name]["n"]}
            row |= {"density": density, "recall": recall}
            if fixed and fixed[0][0] <= density <= fixed[-1][0]:
                row["recall_of_fixed_at_this_density"] = float(np.interp(density, *zip(*fixed, strict=True)))
            by_recall = sorted((r, d) for d, r in fixed)
            if fixed and by_recall[0][0] <= recall <= by_recall[-1][0]:
                row["density_of_fixed_at_this_recall"] = float(np.interp(recall, *zip(*by_recall, strict=True)))
            yield row


def _dense_of(found: dict[Key, Found], key: Key) -> Found | None:
    """Dense attention on the same worlds; parts of one group and length have the same walks."""
    parts = (key[0],) if key[0] in ("rollout", "tune") else (key[0], "walk")
    return next((found[p, "dense", *key[2:]] for p in parts if (p, "dense", *key[2:]) in found), None)


def _losses(one: Found, dense: Found | None, mark: int, back: Sequence[int]) -> Row:
    """How much worse than dense attention the places are that are seen again."""
    if dense is None:
        return {"loss_to_dense_db": None}
    at = _places(one, dense)
    by_distance = {
        distance: [
            dense.made[mark, distance]["psnr_db"][there] - psnr
            for psnr, there in zip(one.made[mark, distance]["psnr_db"], at, strict=True)
        ]
        for distance in back
    }
    row = _named("loss_to_dense_db", _by_world(list(by_distance.values())), "loss_ci95")
    row["loss_at_distance"] = {distance: round(float(np.mean(values)), 2) for distance, values in by_distance.items()}
    if dense.vae_psnr_db[mark]:
        row["vae_psnr_db"] = float(np.mean([dense.vae_psnr_db[mark][there] for there in at]))
    return row


def _compared(one: Found, dense: Found | None, mark: int, lab: QualityLab) -> Row:
    """The chunk that goes on with the walk, and one single step, against dense attention on the same history."""
    if dense is None or dense is one or not one.latents or not dense.latents:
        return {"psnr_db": None, "ssim": None, "one_step_error": None}
    psnr, similarity = _compare(one, dense, f"made.{mark}.next", f"before.{mark}", lab)
    row = _named("psnr_db", psnr, "psnr_ci95") | {"ssim": float(np.mean(similarity))}
    pairs = zip(one.latents[f"one_step.{mark}"], _places(one, dense), strict=True)
    errors = [(mine - dense.latents[f"one_step.{mark}"][there]).square().mean().sqrt().item() for mine, there in pairs]
    return row | {"one_step_error": float(np.mean(errors))}


def _compare(one: Found, dense: Found, name: str, before: str, lab: QualityLab) -> tuple[list[float], list[float]]:
    """PSNR and SSIM of decoded chunks by world; both are decoded after the latent frame that dense has before."""
    at = _places(one, dense)
    mine, theirs, previous = (
        torch.stack(x)
        for x in (one.latents[name], *([dense.latents[n][there] for there in at] for n in (name, before)))
    )
    frames, reference = (lab.decode(latents, previous).clamp(-1, 1) for latents in (mine, theirs))
    similarity = ssim(frames.flatten(0, 1), reference.flatten(0, 1)).view(len(at), -1).mean(1)
    return psnr_db(frames, reference).tolist(), similarity.tolist()


def _places(one: Found, dense: Found) -> list[int]:
    """Where the worlds of a policy stand among those of dense attention."""
    return [dense.worlds.index(world) for world in one.worlds]


def _by_world(values: Sequence[list[float]]) -> list[float]:
    """Means over several figures of each world; nothing of nothing."""
    return np.mean(np.array(values), axis=0).tolist() if values else []


def _named(name: str, values: list[float], half: str | None = None) -> Row:
    mean, ci = mean_and_ci(values)
    return {name: mean, half or f"{name}_ci95": ci}


def failures(folder: Path) -> list[str]:
    """Pieces that failed, with the beginning of the last line of what they said."""
    return [
        f"{path.stem}: {path.read_text().strip().splitlines()[-1][:_SAID]}" for path in sorted(folder.glob("*.error"))
    ]


def add_times(rows: Sequence[Row], turns: dict[str, Any], revision: str) -> None:
    """Give walks of a policy the seconds of its chunks by video frame, as `quality_turns` timed them, and the time of
    its last chunks over that of those at frame 600 which another rollout made beside them.

    Args:
        rows: Changed in place; what was not timed gets None.
        turns: Record of `quality_turns`.
        revision: Of the weights of the rows; other weights are not theirs.
    """
    is_same = f"weights {revision[:16]}" in turns["notes"]
    timed = {row["policy"]: row for row in turns["rows"]} if is_same else {}
    for row in rows:
        if row["part"] == "walk":
            for name in ("seconds_per_chunk_at", "paired_time_end_to_600"):
                row[name] = timed.get(row["policy"], {}).get(name)

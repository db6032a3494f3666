"""What compression and sparsity cost: every policy on the bundled world model, with known ground truth.

`python -m tests.bench.quality --worlds 32` (a GPU), `--worlds 4 --distances 159 --parts revisit` (a CPU, 15 minutes).

Parts: `revisit` (a place left and seen again, the true history in the policy's own cache), `groups` (the same by kind
of world), `forced` (a long walk with the true history; every now and then the next chunk is made from it: recall, and
distance to what dense attention makes of the same), `rollout` (free rollouts that take turns: time per chunk, bytes,
distance to dense with the same noise).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tests.bench.quality_lab import (
    Forced,
    QualityLab,
    Returned,
    Runner,
    full_bytes,
    mean_and_ci,
    model_of,
    stored_bytes,
)
from tests.bench.quality_places import GROUPS, Group
from tests.bench.record import RESULTS, report
from workers.config import RenderConfig
from workers.quality.reference import psnr_db, ssim

Row = dict[str, Any]
_NUM_MARKS = 12
"""Chunks of a long walk that are made."""

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"policy": "dense"},
    "window": {"policy": "window"},
    "window at the same bytes": {"policy": "window", "cache": {"recent_latent_frames": 57}},
    "tempcache": {"policy": "tempcache"},
    "tempcache, full log m": {"policy": "tempcache", "cache": {"mass_decay": 0.0}},
    "tempcache, int4": {"policy": "tempcache", "cache": {"storage": "int4"}},
    "tempcache, twice the bytes": {"policy": "tempcache", "cache": {"budget_latent_frames": 120}},
    "annsa": {"policy": "annsa"},
    "annca": {"policy": "annca"},
    "fastar-lsh": {"policy": "fastar-lsh"},
    "fastar-quant": {"policy": "fastar-quant"},
    "fastar-adaptive": {"policy": "fastar-adaptive"},
    "annsa 0.2": {"policy": "annsa", "attention": {"density": 0.2}},
    "annsa 0.45": {"policy": "annsa", "attention": {"density": 0.45}},
    "annsa, recall 0.85": {"policy": "annsa", "attention": {"target_recall": 0.85}},
    "annsa, recall 0.95": {"policy": "annsa", "attention": {"target_recall": 0.95}},
    "streaming": {"policy": "streaming"},
    "radial": {"policy": "radial"},
    "svg": {"policy": "svg"},
    "svg2": {"policy": "svg2"},
    "teacache": {"policy": "teacache"},
    "flowcache": {"policy": "flowcache"},
    "flowcache + radial": {"policy": "flowcache", "attention": {"kind": "radial"}},
}


def config_of(name: str) -> RenderConfig:
    """The render of a policy; budgets are counted in latent frames of a bfloat16 cache."""
    return RenderConfig.model_validate(POLICIES[name])


def revisit_rows(
    lab: QualityLab, names: Sequence[str], distance: int, worlds: int, group: tuple[str, Group]
) -> Iterator[Row]:
    """All policies on the same places."""
    places = list(lab.places(distance, range(worlds), group[1]))
    frames = 4 * places[0].latents_BTCHW.shape[1]
    vae = mean_and_ci([lab.vae_psnr(place) for place in places])
    dense: list[Returned] = []
    for name in names:
        model = model_of(config_of(name))
        results = [lab.come_back(place, model) for place in places]
        dense = dense or results  # the first policy is what the others are compared with
        psnr, half = mean_and_ci([r.psnr_db for r in results])
        loss, loss_half = mean_and_ci([d.psnr_db - r.psnr_db for d, r in zip(dense, results, strict=True)])
        to_dense = mean_and_ci(
            [psnr_db(r.frames_BFCHW, d.frames_BFCHW).item() for d, r in zip(dense, results, strict=True)]
        )
        history = places[0].latents_BTCHW.shape[1] - 3
        kv_bytes = mean_and_ci([r.kv_bytes for r in results])[0]
        tokens = history * model.backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)
        yield {
            "part": "revisit",
            "policy": name,
            "group": group[0],
            "distance": distance,
            "frames": frames,
            "n": worlds,
            "revisit_psnr_db": psnr,
            "ci95": half,
            "loss_to_dense_db": loss,
            "loss_ci95": loss_half,
            "vae_psnr_db": vae[0],
            "ssim": mean_and_ci([r.ssim for r in results])[0],
            "psnr_db": None if name == names[0] else to_dense[0],
            "recall": mean_and_ci([r.recall for r in results])[0],
            "kept_mass": mean_and_ci([r.kept_mass for r in results])[0],
            "density": mean_and_ci([r.density for r in results])[0],
            "kv_bytes": int(kv_bytes),
            "kv_share_of_full": stored_bytes(model, kv_bytes) / full_bytes(model, tokens),
            "lpips": None,
        }


def forced_rows(lab: QualityLab, names: Sequence[str], frames: int, worlds: int) -> Iterator[Row]:
    """Long walks with the true history."""
    places = [lab.walk(index, frames) for index in range(worlds)]
    chunks = places[0].num_chunks
    marks = sorted({max(1, chunks * turn // _NUM_MARKS - 1) for turn in range(1, _NUM_MARKS + 1)})
    dense: list[list[Forced]] = []
    for name in names:
        model = model_of(config_of(name))
        made = [lab.follow(place, model, marks) for place in places]
        dense = dense or made
        tokens = (
            3 * marks[-1] * model.backbone.tokens_per_latent_frame(model.config.video.width, model.config.video.height)
        )
        forced = [
            [psnr_db(a.frames_BFCHW, b.frames_BFCHW).item() for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(made, dense, strict=True)
        ]
        recall, half = mean_and_ci([sum(f.recall for f in run) / len(run) for run in made])
        yield {
            "part": "forced",
            "policy": name,
            "frames": frames,
            "n": worlds,
            "recall": recall,
            "recall_ci95": half,
            "recall_at_frame": {12 * (m + 1): sum(r[i].recall for r in made) / worlds for i, m in enumerate(marks)},
            "kept_mass": sum(f.kept_mass for run in made for f in run) / sum(map(len, made)),
            "density": sum(f.density for run in made for f in run) / sum(map(len, made)),
            "density_at_end": sum(run[-1].density for run in made) / worlds,
            "kv_bytes": made[0][-1].kv_bytes,
            "kv_share_of_full": stored_bytes(model, made[0][-1].kv_bytes) / full_bytes(model, tokens),
            "psnr_db": None if name == names[0] else mean_and_ci([sum(run) / len(run) for run in forced])[0],
            "psnr_db_at_frame": None
            if name == names[0]
            else {12 * (m + 1): sum(run[i] for run in forced) / worlds for i, m in enumerate(marks)},
        }


def rollout_rows(lab: QualityLab, names: Sequence[str], frames: int, worlds: int) -> Iterator[Row]:
    """Free rollouts with the same noise; they take turns, chunk by chunk."""
    runs: dict[str, list[Runner]] = {name: [] for name in names}
    for index in range(worlds):
        place = lab.walk(index, frames)
        turn = {name: Runner(lab, place, model_of(config_of(name))) for name in names}
        for chunk in range(place.num_chunks):
            for runner in turn.values():
                runner.step()
            if chunk % 50 == 49:
                seconds = {name: round(sum(runner.seconds), 1) for name, runner in turn.items()}
                print(f"world {index}, chunk {chunk + 1} of {place.num_chunks}: {seconds}", flush=True)
        for name, runner in turn.items():
            runs[name].append(runner)
    dense = runs[names[0]]
    dense_seconds = sum(sum(r.seconds) for r in dense)
    for name, made in runs.items():
        yield (
            {"part": "rollout", "policy": name, "frames": frames, "n": worlds}
            | _facts(lab, made, dense)
            | {"speedup": dense_seconds / sum(sum(r.seconds) for r in made)}
        )


def _facts(lab: QualityLab, made: list[Runner], dense: list[Runner]) -> Row:
    chunks = len(made[0].seconds)
    marks = sorted({m for m in (50, 100, chunks // 2, chunks) if 10 <= m <= chunks})

    def at(values: list[float] | list[int], mark: int) -> float:
        return sum(values[mark - 10 : mark]) / 10

    row: Row = {
        "seconds": sum(sum(r.seconds) for r in made) / len(made),
        "density": sum(r.density[-1] for r in made) / len(made),
        "kv_bytes": made[0].kv_bytes[-1],
        "kv_bytes_at_frame_600": made[0].kv_bytes[min(49, chunks - 1)],
        "seconds_per_chunk_at": {12 * m: sum(at(r.seconds, m) for r in made) / len(made) for m in marks},
    }
    psnr: dict[int, float] = {}
    similarity: dict[int, float] = {}
    for mark in marks:
        pairs = [
            (lab.decode(r.latents[mark - 1])[0], lab.decode(d.latents[mark - 1])[0])
            for r, d in zip(made, dense, strict=True)
        ]
        psnr[12 * mark] = sum(psnr_db(a[None], b[None]).item() for a, b in pairs) / len(pairs)
        similarity[12 * mark] = sum(ssim(a, b).mean().item() for a, b in pairs) / len(pairs)
    if made is not dense:
        row |= {"psnr_db_at_frame": psnr, "ssim_at_frame": similarity}
    return row


def kept_rows(name: str, revision: str, fresh: list[Row]) -> list[Row]:
    """Rows of earlier runs with the same weights that this run did not measure again."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(column) for column in ("part", "policy", "group", "distance", "frames"))

    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    measured = {key(row) for row in fresh}
    return [row for row in record["rows"] if revision[:16] in record["notes"] and key(row) not in measured]


def collect(names: Sequence[str], revision: str) -> list[Row]:
    """Rows of result files that were measured apart (side by side, say); each row keeps its commit and command."""
    rows: list[Row] = []
    for name in names:
        record = json.loads((RESULTS / f"{name}.json").read_text())
        if revision[:16] not in record["notes"]:
            raise SystemExit(f"{name}: measured with other weights than {revision[:16]}")
        rows += [row | {"commit": record["commit"], "command": record["command"]} for row in record["rows"]]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=32, help="worlds of each test")
    parser.add_argument("--distances", type=int, nargs="*", default=[39, 159, 600], help="latent frames away")
    parser.add_argument("--frames", type=int, nargs="*", default=[600, 1500, 3000], help="lengths of free rollouts")
    parser.add_argument("--parts", nargs="*", default=["revisit", "groups", "forced", "rollout"])
    parser.add_argument("--policies", nargs="*", default=list(POLICIES), choices=list(POLICIES), metavar="POLICY")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves them to torch")
    parser.add_argument("--name", default="quality", help="name of the result file")
    parser.add_argument("--collect", nargs="*", default=[], help="put these result files together; measures nothing")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    lab = QualityLab(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[Row] = []

    def take(new: Iterator[Row]) -> None:
        for row in new:
            rows.append(row)
            print(row, flush=True)

    if options.collect:
        rows, options.parts = collect(options.collect, lab.revision), []
    if "revisit" in options.parts:
        for distance in options.distances:
            take(revisit_rows(lab, options.policies, distance, options.worlds, ("still", GROUPS["still"])))
    if "groups" in options.parts:
        for group in list(GROUPS.items())[1:]:
            take(revisit_rows(lab, options.policies, options.distances[0], options.worlds, group))
    if "forced" in options.parts:
        for frames in options.frames:
            take(forced_rows(lab, options.policies, frames, options.worlds))
    if "rollout" in options.parts:
        for frames in options.frames:
            take(rollout_rows(lab, options.policies, frames, options.worlds))
    notes = (
        f"weights {lab.revision[:16]}; held-out worlds; kv_share_of_full is of a bfloat16 cache of the whole history; "
        "LPIPS is null: its weights are not bundled; loss_to_dense_db and psnr_db are paired by world"
    )
    report(options.name, kept_rows(options.name, lab.revision, rows) + rows, notes)


if __name__ == "__main__":
    main()

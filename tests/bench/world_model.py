"""What the bundled world model can do, on held-out worlds: `python -m tests.bench.world_model` (a GPU: six minutes).

VAE fidelity, memory of places by distance and history, following of prompts, sharpness of land never seen, drift over
3000 frames. The result file is written anew after every row. On a CPU ask for a few worlds and parts (`--worlds 4
--parts cut-39 sharpness`). The speed there has its own bench, `world_model_cpu`. A measurement that was made in several
calls becomes one file with `--collect FILE..`: date, device and command are the first file's, and a row of another file
keeps its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.record import RESULTS, keep, report, write_record
from workers.checkpoints.files import open_weights
from workers.config import BUNDLED_WEIGHTS
from workers.model.backbones import find_backbone
from workers.model.vae import VideoVAE
from workers.quality.drift import BANDS, compare_looks, is_stable, measure_look
from workers.quality.reference import confidence_95, psnr_db
from workers.quality.revisit import plan_revisit
from workers.training.fast_rollout import FastRollout, sees_all, sees_window
from workers.training.measure import STILL_AIR, Laboratory, Sampling, sharpness_ratio
from workers.training.sequence import WorldModel
from workers.training.vae_train import HELD_OUT_SEED, held_out_psnr
from workers.worlds.camera import CameraMove
from workers.worlds.captions import write_caption
from workers.worlds.clips import VIEW_SIZE, WorldSpec, draw_path, draw_spec, render_views
from workers.worlds.terrain import WORLD_SIZE

DISTANCES = (159, 39, 81, 318)
"""Latent frames away; 81 stands for 80, because chunks are 3 latent frames long."""
LONG_PROMPT = 200
"""Words, of which one sentence says what to show; the model was trained on at most 127."""
WANDER = CameraMove("wander", 0, 2.0)

Row = dict[str, Any]


def load(device: torch.device, folder: Path = BUNDLED_WEIGHTS) -> tuple[Laboratory, str]:
    """The model of these weights and their revision."""
    weights, backbone = open_weights(folder), find_backbone("longtake-world")
    model, vae = WorldModel(backbone), VideoVAE()
    weights.fill("dit", model.dit)
    weights.fill("text", model.text_encoder)
    weights.fill("vae", vae)
    return Laboratory(model.to(device).eval(), vae.to(device).eval(), device), weights.revision


def vae_rows(lab: Laboratory, num: int) -> Iterator[Row]:
    """Reconstruction of held-out clips."""
    psnr = held_out_psnr(lab.vae, lab.device, num)
    mean, half = confidence_95(psnr)
    yield {
        "figure": "vae_psnr_db",
        "n": num,
        "value": mean,
        "ci95": half,
        "p10": psnr.quantile(0.1).item(),
        "goal": 32.0,
    }


def revisit_rows(lab: Laboratory, num: int, sampling: Sampling, form: str, distance: int) -> Iterator[Row]:
    """Returned views, full history against the window of sink 3 and 21 latent frames.

    Judged are the pixels whose land was in view before, ``seen_share`` of the view; ``whole_view_db`` is of all of it.
    """
    result = lab.revisit(distance, num, sampling, form=form, policies=("full", "window"))
    full, window = confidence_95(result.psnr["full"]), confidence_95(result.psnr["window"])
    gain, gain_half = confidence_95(result.psnr["full"] - result.psnr["window"])
    row: Row = {"figure": "revisit", "form": form, "distance": distance, "n": num, "value": full[0], "ci95": full[1]}
    row |= {"window_db": window[0], "window_ci95": window[1], "gain_db": gain, "gain_ci95": gain_half, "goal": 27.0}
    below, below_half = confidence_95(result.psnr["vae"] - result.psnr["full"])
    row |= {"vae_db": result.psnr["vae"].mean().item(), "below_vae_db": below, "below_vae_ci95": below_half}
    if form == "shifted":
        assert result.seen is not None
        row |= {"seen_share": result.seen.float().mean().item()}
        whole = confidence_95(result.whole_psnr["full"])
        row |= {"whole_view_db": whole[0], "whole_view_ci95": whole[1]}
        row |= {"whole_view_vae_db": result.whole_psnr["vae"].mean().item()}
    row |= {"ssim": result.ssim["full"].mean().item()}
    row |= {"window_ssim": result.ssim["window"].mean().item()}
    if result.landmarks:
        asked = result.landmarks["vae"][1]
        row |= {"landmarks": asked}
        row |= {f"landmarks_{name}": right / max(1, asked) for name, (right, _) in result.landmarks.items()}
    yield row


def after_cut_rows(lab: Laboratory, num: int) -> Iterator[Row]:
    """The first pictures of a place after a hard cut, by the VAE alone: decoded on from the place before, and anew."""
    rng = np.random.default_rng(DISTANCES[1])
    paths = [plan_revisit(DISTANCES[1], rng, WORLD_SIZE, VIEW_SIZE, cut=True).positions_F2 for _ in range(num)]
    found: dict[str, list[torch.Tensor]] = {"on": [], "anew": []}
    for index, path in enumerate(paths):
        world = lab.worlds([draw_spec(HELD_OUT_SEED + 7000 + index, STILL_AIR)])
        positions = torch.from_numpy(path[None, -16:-8]).to(lab.device)
        truth, z = render_views(world.pictures_BCHW, positions)[:, 4:], lab.encode(world, positions)
        found["on"].append(psnr_db(lab.decode(z[:, 1:], z[:, 0]), truth))
        found["anew"].append(psnr_db(lab.decode(z[:, 1:]), truth))
    on, anew = torch.cat(found["on"]).cpu(), torch.cat(found["anew"]).cpu()
    (mean, half), (gain, gain_half) = confidence_95(anew), confidence_95(anew - on)
    row: Row = {"figure": "after_cut_vae_db", "n": num, "value": mean, "ci95": half, "decoded_on_db": on.mean().item()}
    yield row | {"gain_db": gain, "gain_ci95": gain_half, "least_gain_db": (anew - on).min().item()}


def sharpness_rows(lab: Laboratory, num: int, sampling: Sampling) -> Iterator[Row]:
    """Land never seen before, from noise and a caption."""
    made, true, coded, _ = lab.explore(num, 8, sampling)
    row: Row = {"figure": "new_land_sharpness", "n": num, "value": sharpness_ratio(made, true), "goal": 0.75}
    row |= {"first_chunk": sharpness_ratio(made[:, :12], true[:, :12])}
    yield row | {"last_chunk": sharpness_ratio(made[:, -12:], true[:, -12:]), "vae": sharpness_ratio(coded, true)}


def follow_rows(lab: Laboratory, num: int, sampling: Sampling, num_words: int = 0) -> Iterator[Row]:
    """Prompts that name a biome and a direction, planned and rendered as the service does it."""
    biome, direction = lab.follow(num, sampling, num_words)
    form = f"prompts of {num_words} words" if num_words else "short prompts"
    row: Row = {
        "figure": "follow_accuracy",
        "form": form,
        "n": num,
        "goal": 0.9,
        "value": (biome & direction).float().mean().item(),
    }
    yield row | {"biome": biome.float().mean().item(), "direction": direction.float().mean().item()}


def long_walks(lab: Laboratory, num: int, frames: int) -> tuple[list[WorldSpec], list[str], torch.Tensor]:
    """Worlds, captions and camera positions of walks that explore."""
    rng = np.random.default_rng(HELD_OUT_SEED + 3)
    specs = [draw_spec(HELD_OUT_SEED + 30_000 + index, STILL_AIR) for index in range(num)]
    captions = [write_caption(spec.scene, WANDER, rng) for spec in specs]
    return specs, captions, torch.from_numpy(np.stack([draw_path(WANDER, frames, rng) for _ in specs])).to(lab.device)


def true_changes(lab: Laboratory, specs: list[WorldSpec], positions: torch.Tensor) -> list[dict[str, float]]:
    """How the land itself changes between the early and the late stretch of each walk."""
    changes = []
    for index, spec in enumerate(specs):
        world, at = lab.worlds([spec]).pictures_BCHW, positions[index : index + 1]
        early, late = (render_views(world, at[:, span])[0] for span in (slice(52, 148), slice(-96, None)))
        changes.append(compare_looks(measure_look(early), measure_look(late)))
    return changes


def drift_rows(lab: Laboratory, num: int, sampling: Sampling, policy: str, frames: int) -> Iterator[Row]:
    """A long walk: the last 96 frames against those around frame 100; `true` is the share of true walks that pass.

    The policy `true` renders nothing: it measures the land that the cameras see, whose changes are no drift.
    """
    specs, captions, positions = long_walks(lab, num, frames)
    true = true_changes(lab, specs, positions)
    changes = true
    if policy != "true":
        times = torch.arange(frames / 4, device=lab.device).expand(num, -1)
        visible = {"full": sees_all, "window": sees_window}[policy]
        rollout = FastRollout(lab.model, positions.unflatten(1, (-1, 4)) + 512, times, lab.prompts(captions), visible)
        latents = lab.run(rollout, torch.zeros(0), 0, sampling, seed=3)
        parts = latents.split(1)
        looks = [
            [measure_look(lab.decode(part[:, span])[0]) for span in (slice(13, 37), slice(-24, None))] for part in parts
        ]
        changes = [compare_looks(early, late) for early, late in looks]
    row: Row = {"figure": "drift_band", "form": policy, "n": num, "frames": frames}
    row |= {"value": sum(map(is_stable, changes)) / num, "true": sum(map(is_stable, true)) / num, "goal": 1.0}
    for name, band in BANDS.items():
        values = [change[name] for change in changes]
        row |= {name: float(np.median(values)), f"{name}_extremes": [min(values), max(values)], f"{name}_band": band}
    yield row | {"medians_in_band": medians_in_band(row)}


def medians_in_band(row: Row) -> bool:
    """Whether the medians over all worlds lie in their bands: one walk may end in other land, many do not."""
    return all(low <= row[name] <= high for name, (low, high) in BANDS.items())


def parts_of(lab: Laboratory, num: int) -> dict[str, Callable[[], Iterator[Row]]]:
    """All parts by name, the most important ones first, for so many worlds."""
    sampling = Sampling(renoise=lab.model.backbone.sampler == "renoise")

    def revisit(form: str, distance: int) -> Callable[[], Iterator[Row]]:
        return lambda: revisit_rows(lab, num, sampling, form, distance)

    walks = min(num, 64)
    return {
        **{f"cut-{distance}": revisit("cut", distance) for distance in DISTANCES},
        **{f"rollout-{distance}": revisit("rollout", distance) for distance in DISTANCES},
        "sharpness": lambda: sharpness_rows(lab, num, sampling),
        "follow": lambda: follow_rows(lab, 200 if num >= 64 else 4 * num, sampling),
        "follow-long": lambda: follow_rows(lab, 200 if num >= 64 else 4 * num, sampling, LONG_PROMPT),
        "vae": lambda: vae_rows(lab, 2 * num),
        "after-cut": lambda: after_cut_rows(lab, num),
        **{f"shifted-{distance}": revisit("shifted", distance) for distance in DISTANCES},
        "drift-window": lambda: drift_rows(lab, walks, sampling, "window", 3000),
        "generated-159": revisit("generated", 159),
        "drift-full": lambda: drift_rows(lab, walks, sampling, "full", 3000),
        **{f"generated-{distance}": revisit("generated", distance) for distance in DISTANCES if distance != 159},
        "drift-true": lambda: drift_rows(lab, walks, sampling, "true", 3000),
    }


def measure(parts: dict[str, Callable[[], Iterator[Row]]], seconds: float, keep_row: Callable[[Row], None]) -> None:
    """Rows of the parts in turn; those that the time does not reach, or that fail, are named as not measured."""
    start = time.monotonic()
    for name, part in parts.items():
        if time.monotonic() - start > seconds:
            keep_row({"figure": name, "value": None, "form": "not measured: out of time"})
            continue
        try:
            for row in part():
                keep_row(row)
                print(round(time.monotonic() - start, 1), row, flush=True)
        except RuntimeError as error:  # out of memory, most likely: the other rows must not go with it
            keep_row({"figure": name, "value": None, "form": f"failed: {str(error)[:200]}"})
            print(f"{name} failed: {error}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def row_name(row: Row) -> tuple[Any, ...]:
    """What a row measures: two rows of one name are two measurements of the same."""
    return row["figure"], row.get("form"), row.get("distance"), row.get("dtype")


def part_name(row: Row) -> str:
    """The part that measures this row, or the row's own figure where it says that a part was not measured."""
    if row["figure"] == "revisit":
        return f"{row['form']}-{row['distance']}"
    return f"drift-{row['form']}" if row["figure"] == "drift_band" else str(row["figure"])


def kept_rows(record: dict[str, Any], revision: str, fresh: list[Row]) -> list[Row]:
    """Rows of an earlier run of other parts, with the same weights, that this run did not measure again."""
    measured = {row_name(row) for row in fresh}
    return [row for row in record["rows"] if revision[:16] in record["notes"] and row_name(row) not in measured]


def collect(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of several of the same weights: the first one's head, and what the others measured beside it.

    A row of a later record replaces one of the same name and names its own device, command and commit.

    Raises:
        ValueError: The records are of different weights.
    """
    first, rows = records[0], list[Row]()
    for record in records:
        if _weights_of(record) != _weights_of(first):
            raise ValueError(f"{record['command']}: {record['notes']!r}, not {first['notes']!r}")
        own = {name: record[name] for name in ("device", "command", "commit")} if record is not first else {}
        fresh = [row | own for row in record["rows"]]
        rows = kept_rows(first | {"rows": rows}, "", fresh) + fresh
    measured = {part_name(row) for row in rows if row["value"] is not None}
    rows = [row for row in rows if row["value"] is not None or part_name(row) not in measured]
    judged = [row | {"medians_in_band": medians_in_band(row)} if row["figure"] == "drift_band" else row for row in rows]
    return first | {"rows": judged}


def _weights_of(record: dict[str, Any]) -> str:
    """What the notes of a record begin with."""
    return str(record["notes"]).partition(";")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=64, help="worlds of each test")
    parser.add_argument("--parts", nargs="*", help="only these parts")
    parser.add_argument("--name", default="world_model", help="name of the result file")
    parser.add_argument("--weights", type=Path, default=BUNDLED_WEIGHTS, help="folder of the weights to measure")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no further part after this time")
    parser.add_argument(
        "--collect", nargs="+", type=Path, help="measure nothing: make one file of these, called --name"
    )
    options = parser.parse_args()
    if options.collect:
        one = collect([json.loads(file.read_text()) for file in options.collect])
        print(f"wrote {write_record(one | {'name': options.name}, options.folder)}")
        return
    lab, revision = load(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.weights)
    parts = parts_of(lab, options.worlds)
    if unknown := set(options.parts or ()) - parts.keys():
        parser.error(f"no parts {sorted(unknown)}; known: {', '.join(parts)}")
    chosen = {name: part for name, part in parts.items() if not options.parts or name in options.parts}
    notes = f"weights {revision[:16]}; {Sampling().num_steps} denoising steps; revisit and VAE in dB"
    earlier, rows = options.folder / f"{options.name}.json", list[Row]()
    known = json.loads(earlier.read_text()) if options.parts and earlier.exists() else {"rows": [], "notes": ""}

    def keep_row(row: Row) -> None:
        rows.append(row)
        keep(options.name, kept_rows(known, revision, rows) + rows, notes, options.folder)

    measure(chosen, options.seconds, keep_row)
    report(options.name, kept_rows(known, revision, rows) + rows, notes, options.folder)


if __name__ == "__main__":
    main()

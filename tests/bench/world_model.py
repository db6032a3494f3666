"""What the bundled world model can do, on held-out worlds: `python -m tests.bench.world_model` (a GPU: two minutes).

VAE fidelity, memory of places by distance and history, following of prompts, sharpness of land never seen, drift over
3000 frames. On a CPU ask for a few worlds and parts (`--worlds 4 --parts cut-39 sharpness`). The speed there has its
own bench, `world_model_cpu`.
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

from tests.bench.record import RESULTS, report
from workers.checkpoints.files import open_weights
from workers.model.backbones import find_backbone
from workers.model.vae import VideoVAE
from workers.quality.drift import BANDS, compare_looks, is_stable, measure_look
from workers.quality.following import recognise_biome, recognise_direction
from workers.quality.reference import confidence_95
from workers.training.fast_rollout import FastRollout, sees_all, sees_window
from workers.training.measure import STILL_AIR, Laboratory, Sampling, sharpness_ratio
from workers.training.sequence import WorldModel
from workers.training.vae_train import HELD_OUT_SEED, held_out_psnr
from workers.worlds.camera import CameraMove, plan_camera, read_move
from workers.worlds.captions import write_caption
from workers.worlds.clips import Difficulty, build_worlds, draw_path, draw_spec, render_views

WEIGHTS = Path(__file__).parents[2] / "workers" / "training" / "weights"
DISTANCES = (39, 159, 318, 81)
"""Latent frames away; 81 stands for 80, because chunks are 3 latent frames long."""

Row = dict[str, Any]


def load(device: torch.device) -> tuple[Laboratory, str]:
    """The bundled model and the revision of its weights."""
    weights, backbone = open_weights(WEIGHTS), find_backbone("longtake-world")
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
    """Returned views, full history against the window of sink 3 and 21 latent frames."""
    result = lab.revisit(distance, num, sampling, form=form, policies=("full", "window"))
    full, window = confidence_95(result.psnr["full"]), confidence_95(result.psnr["window"])
    gain, gain_half = confidence_95(result.psnr["full"] - result.psnr["window"])
    row: Row = {"figure": "revisit", "form": form, "distance": distance, "n": num, "value": full[0], "ci95": full[1]}
    row |= {"window_db": window[0], "window_ci95": window[1], "gain_db": gain, "gain_ci95": gain_half, "goal": 27.0}
    row |= {"vae_db": result.psnr["vae"].mean().item(), "ssim": result.ssim["full"].mean().item()}
    row |= {"window_ssim": result.ssim["window"].mean().item()}
    if result.landmarks:
        asked = result.landmarks["vae"][1]
        row |= {"landmarks": asked}
        row |= {f"landmarks_{name}": right / max(1, asked) for name, (right, _) in result.landmarks.items()}
    yield row


def sharpness_rows(lab: Laboratory, num: int, sampling: Sampling) -> Iterator[Row]:
    """Land never seen before, from noise and a caption."""
    made, true, coded, _ = lab.explore(num, 8, sampling)
    row: Row = {"figure": "new_land_sharpness", "n": num, "value": sharpness_ratio(made, true), "goal": 0.75}
    row |= {"first_chunk": sharpness_ratio(made[:, :12], true[:, :12])}
    yield row | {"last_chunk": sharpness_ratio(made[:, -12:], true[:, -12:]), "vae": sharpness_ratio(coded, true)}


def follow_rows(lab: Laboratory, num: int, sampling: Sampling) -> Iterator[Row]:
    """Prompts that name a biome and a direction, planned and rendered as the service does it."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    calm = Difficulty(second_biome=0.0, max_movers=0, mover_share=0.0)
    specs, captions, directions, paths = [], [], [], []
    while len(specs) < num:
        seed = HELD_OUT_SEED + 20_000 + int(rng.integers(10**6))
        spec, move = draw_spec(seed, calm), CameraMove("pan", len(specs) % 8, 2.0)
        caption = write_caption(spec.scene, move, rng)
        heard = read_move(caption, np.random.default_rng(0)), read_move(caption, np.random.default_rng(1))
        if heard[0] == heard[1] and heard[0].kind == "pan":  # the words alone decide
            specs.append(spec)
            captions.append(caption)
            directions.append(move.direction)
            paths.append(plan_camera(caption, seed, 48))
    biome_right, direction_right = [], []
    for start in range(0, num, 50):
        part = slice(start, min(num, start + 50))
        camera = torch.from_numpy(np.stack(paths[part])).to(lab.device).unflatten(1, (-1, 4))
        times = torch.arange(12.0, device=lab.device).expand(len(camera), -1)
        rollout = FastRollout(lab.model, camera, times, lab.prompts(captions[part]))
        frames = lab.decode(lab.run(rollout, torch.zeros(0), 0, sampling, seed=start))
        for clip, spec, direction in zip(frames, specs[part], directions[part], strict=True):
            biome_right.append(recognise_biome(clip[::4]) == spec.biomes[0])
            direction_right.append(recognise_direction(clip) == direction)
    both = [a and b for a, b in zip(biome_right, direction_right, strict=True)]
    row: Row = {"figure": "follow_accuracy", "n": num, "value": sum(both) / num, "goal": 0.9}
    yield row | {"biome": sum(biome_right) / num, "direction": sum(direction_right) / num}


def drift_rows(lab: Laboratory, num: int, sampling: Sampling, policy: str, frames: int) -> Iterator[Row]:
    """A long walk: the last 96 frames against those around frame 100; `true` is the share of true walks that pass."""
    rng = np.random.default_rng(HELD_OUT_SEED + 3)
    specs = [draw_spec(HELD_OUT_SEED + 30_000 + index, STILL_AIR) for index in range(num)]
    move = CameraMove("wander", 0, 2.0)
    captions = [write_caption(spec.scene, move, rng) for spec in specs]
    positions = torch.from_numpy(np.stack([draw_path(move, frames, rng) for _ in specs])).to(lab.device)
    times = torch.arange(frames / 4, device=lab.device).expand(num, -1)
    visible = {"full": sees_all, "window": sees_window}[policy]
    rollout = FastRollout(lab.model, positions.unflatten(1, (-1, 4)) + 512, times, lab.prompts(captions), visible)
    latents = lab.run(rollout, torch.zeros(0), 0, sampling, seed=3)
    changes, true_changes = [], []
    for index, spec in enumerate(specs):
        part, at = latents[index : index + 1], positions[index : index + 1]
        early, late = lab.decode(part[:, 13:37])[0], lab.decode(part[:, -24:])[0]
        changes.append(compare_looks(measure_look(early), measure_look(late)))
        world = build_worlds([spec], lab.device).pictures_BCHW
        true_early, true_late = (render_views(world, at[:, span])[0] for span in (slice(52, 148), slice(-96, None)))
        true_changes.append(compare_looks(measure_look(true_early), measure_look(true_late)))
    row: Row = {"figure": "drift_band", "form": policy, "n": num, "frames": frames}
    row |= {"value": sum(map(is_stable, changes)) / num, "true": sum(map(is_stable, true_changes)) / num, "goal": 1.0}
    yield row | {name: float(np.median([change[name] for change in changes])) for name in BANDS}


def parts_of(lab: Laboratory, num: int) -> dict[str, Callable[[], Iterator[Row]]]:
    """All parts by name, the most important ones first, for so many worlds."""
    sampling = Sampling(renoise=lab.model.backbone.sampler == "renoise")

    def revisit(form: str, distance: int) -> Callable[[], Iterator[Row]]:
        return lambda: revisit_rows(lab, num, sampling, form, distance)

    return {
        "vae": lambda: vae_rows(lab, 2 * num),
        "sharpness": lambda: sharpness_rows(lab, num, sampling),
        "follow": lambda: follow_rows(lab, 200 if num >= 64 else 4 * num, sampling),
        **{f"cut-{distance}": revisit("cut", distance) for distance in DISTANCES},
        **{f"rollout-{distance}": revisit("rollout", distance) for distance in DISTANCES},
        "drift-window": lambda: drift_rows(lab, max(2, num // 4), sampling, "window", 3000),
        **{f"shifted-{distance}": revisit("shifted", distance) for distance in DISTANCES},
        "generated-39": revisit("generated", 39),
        "drift-full": lambda: drift_rows(lab, max(2, num // 16), sampling, "full", 3000),
        "generated-159": revisit("generated", 159),
    }


def measure(parts: dict[str, Callable[[], Iterator[Row]]], seconds: float) -> list[Row]:
    """Rows of the parts in turn; those that the time does not reach are named as not measured."""
    start, rows = time.monotonic(), list[Row]()
    for name, part in parts.items():
        if time.monotonic() - start > seconds:
            rows.append({"figure": name, "value": None, "form": "not measured: out of time"})
            continue
        for row in part():
            rows.append(row)
            print(round(time.monotonic() - start, 1), row, flush=True)
    return rows


def kept_rows(path: Path, revision: str, fresh: list[Row]) -> list[Row]:
    """Rows of an earlier run of other parts, with the same weights, that this run did not measure again."""

    def name(row: Row) -> tuple[Any, ...]:
        return row["figure"], row.get("form"), row.get("distance")

    if not path.exists():
        return []
    record = json.loads(path.read_text())
    measured = {name(row) for row in fresh}
    return [row for row in record["rows"] if revision[:16] in record["notes"] and name(row) not in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=64, help="worlds of each test")
    parser.add_argument("--parts", nargs="*", help="only these parts")
    parser.add_argument("--name", default="world_model", help="name of the result file")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no further part after this time")
    options = parser.parse_args()
    lab, revision = load(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parts = parts_of(lab, options.worlds)
    if unknown := set(options.parts or ()) - parts.keys():
        parser.error(f"no parts {sorted(unknown)}; known: {', '.join(parts)}")
    chosen = {name: part for name, part in parts.items() if not options.parts or name in options.parts}
    rows = measure(chosen, options.seconds)
    if options.parts:
        rows = kept_rows(RESULTS / f"{options.name}.json", revision, rows) + rows
    notes = f"weights {revision[:16]}; {Sampling().num_steps} denoising steps; revisit and VAE in dB"
    report(options.name, rows, notes)


if __name__ == "__main__":
    main()

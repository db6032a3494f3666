"""Which weights to ship? A quick look at one: `python -m tests.bench.candidates DIR --out OUT` (a GPU: a minute).

A few rows of `world_model.py` on fewer worlds, full history only, and a picture of new land: generated views of three
moments beside true ones. Two candidates are compared on the same worlds and noise; what is published is measured by
`world_model.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.bench.world_model import drift_rows, follow_rows, load
from workers.quality.reference import confidence_95
from workers.training.measure import Laboratory, Sampling, sharpness_ratio

MOMENTS = (5, 47, 90)
"""Video frames of new land that the picture shows."""
PICTURED = 12
WALK_FRAMES = 3000

Figures = dict[str, Any]


def look_at_returns(lab: Laboratory, num: int, sampling: Sampling, form: str, distance: int) -> Figures:
    """Returned views: PSNR and how far below the VAE's own."""
    result = lab.revisit(distance, num, sampling, form=form, policies=("full",))
    below, half = confidence_95(result.psnr["vae"] - result.psnr["full"])
    psnr = result.psnr["full"].mean().item()
    return {"psnr_db": psnr, "below_vae_db": below, "below_vae_ci95": half, "n": num}


def look_at_new_land(lab: Laboratory, num: int, sampling: Sampling, picture: Path) -> Figures:
    """Sharpness against the truth, and the picture."""
    made, true, _, _ = lab.explore(num, 8, sampling)
    rows = []
    for clip, truth in zip(made[:PICTURED], true[:PICTURED], strict=True):
        rows.append(torch.cat([clip[list(MOMENTS)], truth[list(MOMENTS)]]).movedim(0, -2).flatten(-2))
    sheet = torch.cat(rows, 1).movedim(0, -1)
    Image.fromarray(((sheet + 1) * 127.5).clamp(0, 255).byte().cpu().numpy()).save(picture)
    first, last = (sharpness_ratio(made[:, part], true[:, part]) for part in (slice(12), slice(-12, None)))
    return {"sharpness": sharpness_ratio(made, true), "first_chunk": first, "last_chunk": last, "n": num}


def parts_of(lab: Laboratory, num: int, walks: int, picture: Path) -> dict[str, Callable[[], Figures]]:
    """What is looked at, the quickest first."""
    sampling = Sampling(renoise=True)

    def returns(form: str) -> Callable[[], Figures]:
        return lambda: look_at_returns(lab, num, sampling, form, 159)

    def drift(policy: str) -> Callable[[], Figures]:
        return lambda: next(iter(drift_rows(lab, walks, sampling, policy, WALK_FRAMES)))

    return {
        "new land": lambda: look_at_new_land(lab, 2 * num, sampling, picture),
        "follow": lambda: next(iter(follow_rows(lab, 4 * num, sampling))),
        "follow-long": lambda: next(iter(follow_rows(lab, 4 * num, sampling, 200))),
        "cut-159": returns("cut"),
        "shifted-159": returns("shifted"),
        "rollout-159": returns("rollout"),
        "drift-window": drift("window"),
        "drift-full": drift("full"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="folder of the weights")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures and the picture")
    parser.add_argument("--worlds", type=int, default=32)
    parser.add_argument("--walks", type=int, default=16)
    parser.add_argument("--parts", nargs="*", help="only these parts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lab, revision = load(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.weights)
    name, begin = f"{options.weights.parent.name}-{options.weights.name}", time.monotonic()
    figures: Figures = {"weights": revision}
    for part, look in parts_of(lab, options.worlds, options.walks, options.out / f"{name}.png").items():
        if options.parts and part not in options.parts:
            continue
        try:
            figures[part] = look()
        except RuntimeError as error:  # out of memory, most likely: the other parts must not go with it
            figures[part] = {"failed": str(error)[:200]}
        print(name, round(time.monotonic() - begin, 1), part, figures[part], flush=True)
        (options.out / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

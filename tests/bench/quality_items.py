"""Pieces of the quality bench that are measured apart: each leaves its figures and its latents in a folder.

Several processes share a folder: who creates the claim of a piece measures it. What is there is not measured again, so
a run that was cut off goes on; `quality_rows.py` makes the table of whatever is there.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from tests.bench.quality_lab import QualityLab, Runner, Walked
from tests.bench.quality_places import CHUNK_FRAMES, CHUNK_LATENTS, GROUPS, Walks
from tests.bench.quality_policies import ADAPTIVE, ALL, BY_GROUP, CANDIDATES, POLICIES, VARIANTS, is_heavy, slow_first
from tests.bench.record import hardware

Part = Literal["walk", "variants", "groups", "rollout", "adaptive", "tune"]
PARTS: tuple[Part, ...] = ("walk", "groups", "adaptive", "rollout", "variants")
"""Measured unless others are asked for."""
TUNING_WORLDS = 900
"""First of the worlds on which settings are chosen: none of those that the table is about."""
_SHORT = 0.5
"""Of the frames: length of the walks by kind of world, for which the fast camera finds new land."""
_TO_MAKE_ROOM_S = 20.0
"""For which a process leaves its memory to the others when there is none for its next piece."""
_LOOKED_AT = (100, 600, 1500, 3000)
"""Video frames of a free rollout that are compared with those of dense attention."""


@dataclass(frozen=True)
class Item:
    """One policy on some worlds."""

    part: Part
    policy: str
    group: str
    first: int
    num: int
    frames: int

    @property
    def name(self) -> str:
        """Of its files."""
        policy = "".join(letter if letter.isalnum() else "_" for letter in self.policy)
        return f"{self.part}-{policy}-{self.group.replace(' ', '_')}-{self.frames}-{self.first}-{self.num}"

    @property
    def worlds(self) -> range:
        return range(self.first, self.first + self.num)

    def halves(self) -> tuple[Item, Item]:
        """The same in two pieces; there are at least two worlds."""
        half = self.num // 2
        return replace(self, num=half), replace(self, first=self.first + half, num=self.num - half)


def list_items(parts: Sequence[Part], policies: Sequence[str], worlds: int, batch: int, frames: int) -> list[Item]:
    """Everything that is to be measured, in the order of its worth should the time run out.

    Args:
        parts: `walk` has all worlds, the others the first half of them; `variants` are walks of single settings varied.
        policies: Of `walk` and `rollout`; the others have their own.
        worlds: How many.
        batch: Worlds side by side.
        frames: Longest length.
    """
    half = (worlds + 1) // 2
    short = max(1, int(frames * _SHORT) // CHUNK_FRAMES) * CHUNK_FRAMES
    walks = slow_first([name for name in POLICIES if name in policies])
    kinds = [group for group in GROUPS if group != "still"]
    found: dict[Part, list[Item]] = {
        "walk": [item for name in walks for item in _pieces("walk", name, "still", worlds, batch, frames)],
        "variants": [
            item
            for name in VARIANTS
            if name in policies
            for item in _pieces("walk", name, "still", half, batch, frames)
        ],
        "groups": [
            item
            for kind in kinds
            for name in BY_GROUP
            if name in policies
            for item in _pieces("groups", name, kind, half, batch, short)
        ],
        "adaptive": [
            item
            for name in ADAPTIVE
            if name in policies
            for item in _pieces("adaptive", name, "still", half, batch, frames)
        ],
        "tune": [
            Item("tune", name, "still", TUNING_WORLDS, min(worlds, batch, 8), frames)
            for name in ("dense", *CANDIDATES)
            if name in policies
        ],
        "rollout": [item for name in walks for item in _pieces("rollout", name, "still", half, batch, frames)],
    }
    return [item for part in parts for item in found[part]]


def measure(item: Item, lab: QualityLab, folder: Path) -> None:
    """One piece; in two halves where it does not fit into the device's memory."""
    found = None
    try:
        found = (_measure_rollout if item.part == "rollout" else _measure_walk)(item, lab)
    except torch.OutOfMemoryError:
        if item.num == 1:
            raise
    if found is None:  # after the error, which holds what there was no room for
        torch.cuda.empty_cache()
        for half in item.halves():
            measure(half, lab, folder)
        return
    figures, latents = found
    save_file({name: x.float().cpu().contiguous() for name, x in latents.items()}, folder / f"{item.name}.safetensors")
    record = asdict(item) | {"revision": lab.revision, "dtype": lab.dtype, "device": hardware()} | figures
    unfinished = folder / f"{item.name}.unfinished"
    unfinished.write_text(json.dumps(record))
    unfinished.rename(folder / f"{item.name}.json")


def work(items: Sequence[Item], lab: QualityLab, folder: Path, *, takes_heavy: bool, until: float) -> None:
    """Measure what nobody has claimed, until it is late; a piece that fails leaves its trace and does not stop others.

    A piece for which there is no memory beside those of the other processes is given back, and tried once more when all
    others have been claimed.

    Args:
        items: In the order in which they are tried.
        lab: The model.
        folder: Shared with the other processes.
        takes_heavy: Also policies whose cache grows.
        until: `time.time()` from which on nothing new is begun.
    """
    for is_second_round in (False, True):
        for item in items:
            if time.time() > until:
                return
            path = folder / f"{item.name}.claim"
            if (is_heavy(item.policy) and not takes_heavy) or not claim(path):
                continue
            started = time.perf_counter()
            try:
                measure(item, lab, folder)
                print(f"{item.name}: {time.perf_counter() - started:.1f} s", flush=True)
            except torch.OutOfMemoryError as error:
                if is_second_round:
                    (folder / f"{item.name}.error").write_text(f"{error}")
                else:
                    path.unlink()
                    time.sleep(_TO_MAKE_ROOM_S)
                print(f"{item.name}: no memory", flush=True)
            except Exception:
                (folder / f"{item.name}.error").write_text(traceback.format_exc())
                print(f"{item.name} FAILED\n{traceback.format_exc()}", flush=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def release_claims(folder: Path) -> None:
    """Let pieces be measured that an earlier run began and did not end."""
    for path in folder.glob("*.claim"):
        if not path.with_suffix(".json").exists():
            path.unlink()
            path.with_suffix(".error").unlink(missing_ok=True)


def marks_of(num_chunks: int, part: Part) -> list[int]:
    """Chunks that are made: at a fifth, a half and the end of a walk, or at its end alone."""
    shares = (0.2, 0.5, 1.0) if part == "walk" else (1.0,)
    return sorted({max(1, round(num_chunks * share) - 1) for share in shares})


def _pieces(part: Part, policy: str, group: str, worlds: int, batch: int, frames: int) -> Iterator[Item]:
    for first in range(0, worlds, batch):
        yield Item(part, policy, group, first, min(batch, worlds - first), frames)


def claim(path: Path) -> bool:
    """Whether this process is the first that asks for it."""
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


def _measure_walk(item: Item, lab: QualityLab) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    walks, model = lab.walks(item.group, item.worlds, item.frames), lab.model(ALL[item.policy])
    marks = marks_of(walks.num_chunks, item.part)
    started = time.perf_counter()
    walked = lab.walk(walks, model, marks)
    figures: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "cache": model.config.cache.kind,
        "made": [
            {
                "chunk": made.chunk,
                "distance": made.distance,
                "psnr_db": made.psnr_B.tolist(),
                "ssim": made.ssim_B.tolist(),
                "recall": made.recall_B.tolist(),
                "strict_recall": made.strict_recall_B.tolist(),
                "density": made.density,
                "kv_bytes": made.kv_bytes,
                "guard": made.guard,
            }
            for made in walked.made
        ],
    }
    if item.policy == "dense":
        figures["vae_psnr_db"] = {mark: lab.vae_psnr(walks, mark).tolist() for mark in marks}
    return figures, _latents_of(walked, walks, marks)


def _latents_of(walked: Walked, walks: Walks, marks: Sequence[int]) -> dict[str, torch.Tensor]:
    """By name: what was made, single steps, and the latent frame before each mark."""
    found = {f"made.{made.name}": made.latents_BTCHW for made in walked.made}
    found |= {f"one_step.{mark}": walked.one_step[mark] for mark in marks}
    return found | {f"before.{mark}": walks.latents_BTCHW[:, CHUNK_LATENTS * mark - 1] for mark in marks}


def _measure_rollout(item: Item, lab: QualityLab) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    walks = lab.walks(item.group, item.worlds, item.frames)
    runner = Runner(lab, walks, lab.model(ALL[item.policy]))
    for _ in range(walks.num_chunks):
        runner.step()
    found: dict[str, torch.Tensor] = {}
    for frame in (*(frame for frame in _LOOKED_AT if frame < item.frames), item.frames):
        chunk = -(-frame // CHUNK_FRAMES) - 1
        found[f"before.{frame}"] = runner.latents[chunk - 1][:, -1]
        found[f"made.{frame}"] = runner.latents[chunk]
    fifth = max(1, walks.num_chunks // 5) - 1
    figures = {
        "seconds": sum(runner.seconds),
        "density": runner.density[-1],
        "kv_bytes": runner.kv_bytes[-1],
        "peak_kv_bytes": max(runner.kv_bytes),
        "peak_kv_bytes_to_a_fifth": max(runner.kv_bytes[: fifth + 1]),
        "guard": None if runner.guard is None else [runner.guard.num_tightened, runner.guard.num_dense_chunks],
    }
    return figures, found

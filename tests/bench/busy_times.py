"""When an actor's GPU had a take, and what of a run's capacity was lost before, between and after takes. Pure."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Hold:
    """A take held an actor's GPU between these times (seconds since the epoch)."""

    actor: str
    task: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Losses:
    """Seconds of all actors together in which no take held a GPU, from the first take's start to a given end."""

    before_s: float
    """Until an actor's first take: it was still loading when another one began."""
    between_s: float
    after_s: float
    """From an actor's last take on: the list had ended, its video was being finished and committed."""

    @property
    def all_s(self) -> float:
        return self.before_s + self.between_s + self.after_s


def read_holds(logs: Iterable[Path], job_id: str) -> list[Hold]:
    """From the lines that the actors of a job logged, in the order of their ends."""
    holds = []
    for file in logs:
        for text in file.read_text(errors="replace").splitlines():
            line = _json_line(text)
            if line.get("job") == job_id and line.get("message") == "take left the GPU" and "task" in line:
                end = datetime.fromisoformat(line["time"]).timestamp()
                holds.append(Hold(line["actor"], line["task"], end - line["held_s"], end))
    return sorted(holds, key=lambda hold: hold.end)


def _json_line(text: str) -> dict[str, Any]:
    try:
        line: dict[str, Any] = json.loads(text) if text.startswith("{") else {}
    except ValueError:
        return {}
    return line


def by_actor(holds: Sequence[Hold]) -> Mapping[str, list[Hold]]:
    """Holds of each actor in order."""
    found: defaultdict[str, list[Hold]] = defaultdict(list)
    for hold in sorted(holds, key=lambda hold: hold.begin):
        found[hold.actor].append(hold)
    return dict(sorted(found.items()))


def losses(holds: Sequence[Hold], until: float) -> Losses:
    """What was lost from the first take's start to `until`."""
    first = min(hold.begin for hold in holds)
    before = between = after = 0.0
    for own in by_actor(holds).values():
        before += own[0].begin - first
        between += sum(max(0.0, b.begin - a.end) for a, b in pairwise(own))
        after += max(0.0, until - own[-1].end)
    return Losses(before, between, after)


def steady_window(holds: Sequence[Hold]) -> tuple[float, float]:
    """From the moment at which all actors have begun to that at which the first one has nothing left."""
    actors = by_actor(holds).values()
    return max(own[0].begin for own in actors), min(own[-1].end for own in actors)


def idle_shares(holds: Sequence[Hold]) -> dict[str, float]:
    """Share of an actor's own time, from its first take to the end of its last one, in which it had no take."""
    return {
        actor: 1 - sum(hold.seconds for hold in own) / (own[-1].end - own[0].begin)
        for actor, own in by_actor(holds).items()
    }


def steady_takes_per_s(holds: Sequence[Hold]) -> float | None:
    """Takes finished a second in the steady window, parts of takes counted as parts; None if there is no such time."""
    begin, end = steady_window(holds)
    if end <= begin:
        return None
    parts = (max(0.0, min(end, hold.end) - max(begin, hold.begin)) / hold.seconds for hold in holds)
    return sum(parts) / (end - begin)


def second_half_frames_per_s(takes: Sequence[Sequence[float]], num_frames: int) -> float:
    """Of takes of so many frames each, given the seconds of their chunks: pictures of the later half of each.

    The first chunk of a take may be shorter; beyond that all have the same number of frames.
    """
    halves = [take[len(take) // 2 :] for take in takes]
    num = sum(num_frames * len(half) / len(take) for take, half in zip(takes, halves, strict=True))
    return num / sum(sum(half) for half in halves)

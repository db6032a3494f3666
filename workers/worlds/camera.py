"""Camera paths over a procedural world: scripted for training, derived from the prompt's words when rendering.

A position is the world pixel of the view's top left corner, (x, y) with y growing to the south, and always a whole
number: a return to a place shows the very same pixels. Light on purpose (NumPy only), so that anybody may plan a path.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.float32]

DIRECTIONS: tuple[tuple[str, tuple[int, int]], ...] = (
    ("east", (1, 0)),
    ("south-east", (1, 1)),
    ("south", (0, 1)),
    ("south-west", (-1, 1)),
    ("west", (-1, 0)),
    ("north-west", (-1, -1)),
    ("north", (0, -1)),
    ("north-east", (1, -1)),
)
KINDS = ("hold", "pan", "out_and_back", "loop", "wander", "cut")
SPEEDS: tuple[tuple[str, float], ...] = (("slow", 1.0), ("even", 2.0), ("fast", 4.0))
"""World pixels a video frame along each moving axis."""

RANGE = 1920.0
"""A planned path stays inside [0, RANGE] on both axes: the coordinates that the bundled model was trained on."""

_DIRECTION_WORDS = {
    "east": (1, 0), "right": (1, 0), "rightwards": (1, 0), "eastwards": (1, 0), "eastward": (1, 0),
    "west": (-1, 0), "left": (-1, 0), "leftwards": (-1, 0), "westwards": (-1, 0), "westward": (-1, 0),
    "south": (0, 1), "down": (0, 1), "downwards": (0, 1), "southwards": (0, 1), "southward": (0, 1),
    "north": (0, -1), "up": (0, -1), "upwards": (0, -1), "northwards": (0, -1), "northward": (0, -1),
    "southeast": (1, 1), "southwest": (-1, 1), "northwest": (-1, -1), "northeast": (1, -1),
}  # fmt: skip
_MOVING = (
    r"(?:pan(?:s|ning)?|drift(?:s|ing)?|mov(?:es?|ing)|glid(?:es?|ing)|travel(?:s|ling|ing)?|slid(?:es?|ing)|"
    r"fl(?:y|ies|ying)|track(?:s|ing)?|sail(?:s|ing)?|scroll(?:s|ing)?|sweep(?:s|ing)?|head(?:s|ing)?|goes|go|going|"
    r"turn(?:s|ing)?|truck(?:s|ing)?|tilt(?:s|ing)?|ris(?:es?|ing))"
)
_KIND_PATTERNS: tuple[tuple[str, str], ...] = (
    (
        "out_and_back",
        r"out and back|(?:comes?|goes|returns?|turns?) back|there and back|back again|retraces|returns to",
    ),
    ("loop", r"\bloops?\b|\blooping\b|\bcircl(?:es?|ing)\b|\borbit(?:s|ing)?\b|round trip"),
    ("cut", r"\b(?:hard |jump )?cuts? to\b|\bhard cuts?\b|\bjump cuts?\b"),
    (
        "hold",
        r"holds? still|stands? still|static (?:shot|camera)|\bmotionless\b|\bstationary\b|does not move|fixed camera",
    ),
    ("wander", r"\bwander(?:s|ing)?\b|\broams?\b|\broaming\b|\bexplor(?:es?|ing)\b|\bstrolls?\b"),
)
_SPEED_PATTERNS: tuple[tuple[float, str], ...] = (
    (1.0, r"\bslow(?:ly)?\b|\bgent(?:le|ly)\b|\bcalm(?:ly)?\b|\bunhurried(?:ly)?\b"),
    (4.0, r"\bfast\b|\bquick(?:ly)?\b|\brapid(?:ly)?\b|\brac(?:es|ing)\b|\brush(?:es|ing)\b|\bswift(?:ly)?\b"),
)


@dataclass(frozen=True)
class CameraMove:
    """A scripted path: its kind (one of `KINDS`), index into `DIRECTIONS`, speed in pixels a video frame."""

    kind: str
    direction: int
    speed: float

    @property
    def step(self) -> tuple[float, float]:
        """Pixels moved along x and y in one video frame of a straight leg."""
        x, y = DIRECTIONS[self.direction][1]
        return x * self.speed, y * self.speed


def plan_camera(prompt: str, seed: int, num_frames: int) -> Positions:
    """Derive the camera path of a take: the prompt's words decide, and where they are silent the seed does.

    Args:
        prompt: Any text; words such as "pans left", "drifts north", "out and back", "loops", "holds still" are heard.
        seed: Of the take.
        num_frames: Video frames to plan.
    Returns:
        float32 [num_frames, 2] of whole numbers inside [0, RANGE]: top left corner of the view, (x, y).
    """
    rng = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), 0xCA3E]))
    move = read_move(prompt, rng)
    box = (0.0, RANGE)
    return trace(move, num_frames, _roomy_start(move, num_frames, box, rng), box, rng)


def read_move(prompt: str, rng: np.random.Generator) -> CameraMove:
    """What the prompt says about the camera; draws from ``rng`` whatever it leaves open."""
    text = re.sub(r"\b(north|south)[- ](east|west)", r"\1\2", prompt.lower())
    direction, speed = int(rng.integers(len(DIRECTIONS))), float(rng.choice([1.0, 2.0, 2.0]))
    kind = str(rng.choice(["pan", "pan", "out_and_back", "wander"]))
    for value, pattern in _SPEED_PATTERNS:
        if re.search(pattern, text):
            speed = value
    said = next((name for name, pattern in _KIND_PATTERNS if re.search(pattern, text)), None)
    heard = _read_direction(text)
    if heard is not None:
        direction, kind = heard, "pan"
    return CameraMove(said or kind, direction, speed)


def _read_direction(text: str) -> int | None:
    words = "|".join(sorted(_DIRECTION_WORDS, key=len, reverse=True))
    match = re.search(rf"\b{_MOVING}\b(?:\s+\w+){{0,3}}?\s+(?:to(?:wards?)?\s+the\s+)?({words})\b", text)
    if match is None:
        match = re.search(rf"\bto(?:wards?)? the ({words})\b|\b({words})ward\b", text)
    if match is None:
        return None
    word = next(group for group in match.groups() if group)
    vectors = [vector for _, vector in DIRECTIONS]
    return vectors.index(_DIRECTION_WORDS[word])


def trace(
    move: CameraMove, num_frames: int, start: tuple[float, float], box: tuple[float, float], rng: np.random.Generator
) -> Positions:
    """Positions of a path; what would leave the box is folded back into it, as a ball bounces off a wall.

    Args:
        move: What the camera does.
        num_frames: How many positions.
        start: First position.
        box: Least and greatest coordinate, the same for x and y.
        rng: Draws what the move leaves open: lengths of legs, corners, places after a cut.
    """
    if move.kind == "cut":
        path = _trace_cuts(move, num_frames, start, box, rng)
    else:
        path = np.array(start) + _offsets(move, num_frames, rng)
    low, high = box
    span = high - low
    folded = low + span - np.abs((path - low) % (2 * span) - span)
    return np.asarray(np.rint(folded), dtype=np.float32)


def _offsets(move: CameraMove, num_frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    step = np.array(move.step)
    frames = np.arange(num_frames)
    if move.kind == "hold":
        return np.zeros((num_frames, 2))
    if move.kind == "pan":
        return np.asarray(frames[:, None] * step)
    if move.kind == "out_and_back":
        turn = max(1, int(num_frames // 2 if num_frames <= 240 else rng.integers(80, 240)))
        return np.asarray((turn - np.abs(frames % (2 * turn) - turn))[:, None] * step)
    if move.kind == "loop":
        side = max(24.0, min(float(rng.uniform(90, 260)), num_frames * move.speed / 4))
        along, across = step / move.speed, np.array([-step[1], step[0]]) / move.speed
        corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]) @ np.stack([along, across]) * side
        return _walk(corners, move.speed * math.hypot(*along), num_frames, closed=True)
    legs = [np.zeros(2)]
    length, heading = 0.0, move.direction
    while length < num_frames * move.speed * 1.5 + 1:
        leg = float(rng.uniform(60, 240))
        legs.append(legs[-1] + np.array(DIRECTIONS[heading % 8][1]) * leg)
        length += leg
        heading += int(rng.choice([-2, -1, 1, 2]))
    return _walk(np.array(legs), move.speed, num_frames, closed=False)


def _walk(corners: NDArray[np.float64], speed: float, num_frames: int, *, closed: bool) -> NDArray[np.float64]:
    """Positions along a polyline at a constant speed; a closed one is walked again and again."""
    lengths = np.abs(np.diff(corners, axis=0)).max(1)  # each moving axis keeps the speed, so diagonals stay on pixels
    reached = np.concatenate([[0.0], np.cumsum(lengths)])
    at = np.arange(num_frames) * speed
    at = at % reached[-1] if closed else np.minimum(at, reached[-1])
    return np.stack([np.interp(at, reached, corners[:, axis]) for axis in (0, 1)], axis=1)


def _trace_cuts(
    move: CameraMove, num_frames: int, start: tuple[float, float], box: tuple[float, float], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Pans with hard cuts between them; every second cut goes back to where an earlier shot began."""
    shots: list[NDArray[np.float64]] = []
    begins = [np.array(start)]
    left = num_frames
    while left > 0:
        length = min(left, 12 * int(rng.integers(3, 9)))
        pan = CameraMove("pan", (move.direction + 2 * len(shots)) % 8, move.speed)
        shots.append(begins[-1] + _offsets(pan, length, rng))
        left -= length
        back = len(begins) >= 2 and len(begins) % 2 == 0
        begins.append(begins[int(rng.integers(len(begins) - 1))] if back else rng.uniform(*box, size=2))
    return np.concatenate(shots)


def _roomy_start(
    move: CameraMove, num_frames: int, box: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float]:
    """A start from which a straight path fits into the box whenever it can fit at all."""
    low, high = box
    place = []
    for pace in move.step:
        reach = pace * num_frames if move.kind in ("pan", "out_and_back") else 0.0
        least, greatest = low - min(0.0, reach), high - max(0.0, reach)
        place.append(float(rng.uniform(least, greatest)) if least < greatest else (low if reach > 0 else high))
    return place[0], place[1]

"""Captions of procedural clips, from a small grammar with much variety: what the ground is, what stands there, how the
camera moves. Short ones of a few words, long ones of which only a part concerns what is in view, and very long ones
on request.

Pure text: needs neither torch nor a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workers.worlds.camera import DIRECTIONS, CameraMove

_OPENINGS = (
    "", "", "", "a view of ", "an aerial shot of ", "seen from above, ", "a calm film of ", "a bird's-eye view of ",
    "a painted map of ", "a journey over ", "top-down footage of ", "we look down on ",
)  # fmt: skip
_MANY = ("with {}", "dotted with {}", "where {} stand", "full of {}", "with scattered {}", "and its {}", "with many {}")
_FEW = ("with a few {}", "with here and there {}", "with some {}", "where a few {} stand")
_WATER = (
    ("without water", "dry ground everywhere", "no water in sight", ""),
    ("with some water", "with a few lakes", "with ponds and lakes", ""),
    ("with much water", "islands in a wide sea", "with broad water", "an archipelago"),
)
_HOLD = ("the camera holds still", "static shot", "the camera stands still", "a fixed camera", "the view is motionless")
_PAN = (
    "the camera pans {d}", "the camera drifts {d}", "moving {d}", "panning {d}", "we glide {d}", "the view slides {d}",
    "flying {d}", "the camera travels to the {d}", "drifting {d}",
)  # fmt: skip
_BACK = (
    "the camera goes {d} and comes back", "out and back to the {d}", "panning {d}, then it returns to where it began",
    "drifting {d} and back again",
)  # fmt: skip
_LOOP = ("the camera loops around", "circling, starting {d}", "a looping path", "the camera circles over the land")
_WANDER = ("the camera wanders about", "exploring the land", "roaming freely", "wandering, first {d}")
_CUT = ("with hard cuts", "hard cuts to other places and back", "jump cuts between places", "it cuts to another place")
_MOTIONS = {"hold": _HOLD, "pan": _PAN, "out_and_back": _BACK, "loop": _LOOP, "wander": _WANDER, "cut": _CUT}
_PACES = {1.0: ("slowly", "gently", "calmly"), 2.0: ("", ""), 4.0: ("fast", "quickly", "rapidly")}
_TWINS = {"east": "right", "west": "left", "north": "up", "south": "down"}
_MOODS = (
    "Soft light lies on the hills.", "Nothing hurries here.", "The colours are bright and clear.", "It is a quiet day.",
    "The air is clear.", "Old stories are told about this land.", "Far away, bells can be heard.",
    "Long ago travellers crossed it on foot.", "A mild wind blows from the sea.",
    "The edges are crisp, like cut paper.",
    "People say that the winters are short.", "It looks like an illustrated map.", "Shadows fall to the lower right.",
    "High quality, detailed, 4k.", "The mood is peaceful.", "The year is young and the roads are empty.",
)  # fmt: skip

_TELLERS = (
    "The old miller", "A shepherd", "The innkeeper", "My grandmother", "A map maker", "The ferryman", "A young teacher",
    "The keeper of the archive", "A retired captain", "The baker", "Someone in the next valley", "An old song",
)  # fmt: skip
_TELLING = ("remembers", "tells", "has written down", "never forgot", "likes to repeat", "heard as a child")
_TALES = (
    "a story about the first travellers", "why the bells were cast", "the names of all the seasons",
    "how the great market began", "what the letters of that year said", "the tale of two brothers and a clock",
    "a recipe for bread with seeds", "the long winter before the war", "how the school got its roof",
    "which stars the sailors trusted", "a quarrel about a violin", "the price of salt in those days",
)  # fmt: skip
_ASIDES = (
    "", "and smiles", "though nobody asked", "in every detail", "more than once", "with great patience",
    "to anyone who listens", "when the evenings are long",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What a caption may tell: words for things as they are called, none of them an index.

    Attributes:
        grounds: One or two biomes, each as the words that may name it.
        water: Index into `terrain.WATER`.
        things: (colour, plural noun) of what stands there.
        dense: Whether the things are many.
        movers: (colour, plural noun) of what flies.
    """

    grounds: tuple[tuple[str, ...], ...]
    water: int
    things: tuple[tuple[str, str], ...]
    dense: bool
    movers: tuple[tuple[str, str], ...]


def write_caption(scene: Scene, move: CameraMove, rng: np.random.Generator) -> str:
    """One caption; a tenth are very short, a sixth are long with sentences that concern nothing in view."""
    style = rng.random()
    if style < 0.1:
        return _ground(scene, rng)
    clauses = [_pick(rng, _OPENINGS) + _ground(scene, rng)]
    if scene.things and style < 0.9:
        clauses.append(_pick(rng, _MANY if scene.dense else _FEW).format(_things(scene, rng)))
    if style > 0.3 and (water := _pick(rng, _WATER[scene.water])):
        clauses.append(water)
    if scene.movers and style > 0.15:
        clauses.append(_flock(scene, rng))
    if style > 0.2:
        motion = describe_move(move, rng)
        clauses.insert(0 if rng.random() < 0.2 else len(clauses), motion)
    text = ", ".join(clauses)
    if style > 0.84:
        moods = [_MOODS[int(index)] for index in rng.permutation(len(_MOODS))[: int(rng.integers(2, 9))]]
        cut = int(rng.integers(len(moods) + 1))
        text = " ".join([*moods[:cut], text[0].upper() + text[1:] + ".", *moods[cut:]])
    return text


def write_long_caption(scene: Scene, move: CameraMove, rng: np.random.Generator, num_words: int) -> str:
    """A caption of at least so many words, of which one sentence concerns what is in view and how the camera moves."""
    seen = f"{_ground(scene, rng)}, {describe_move(move, rng)}."
    before, after = list[str](), list[str]()
    while len(" ".join((*before, seen, *after)).split()) < num_words:
        told = f"{_pick(rng, _TELLERS)} {_pick(rng, _TELLING)} {_pick(rng, _TALES)} {_pick(rng, _ASIDES)}".strip()
        (before if rng.random() < 0.5 else after).append(f"{told}.")
    return " ".join((*before, seen[0].upper() + seen[1:], *after))


def describe_move(move: CameraMove, rng: np.random.Generator) -> str:
    """The camera's motion in words that `camera.read_move` understands."""
    name = DIRECTIONS[move.direction][0]
    if rng.random() < 0.4:
        name = _TWINS.get(name, name)
    pace = _pick(rng, _PACES.get(move.speed, ("",))) if move.kind != "hold" else ""
    text = _pick(rng, _MOTIONS[move.kind]).format(d=name)
    return f"{text} {pace}".strip()


def _ground(scene: Scene, rng: np.random.Generator) -> str:
    first = _pick(rng, scene.grounds[0])
    if len(scene.grounds) == 1:
        return first
    second = _pick(rng, scene.grounds[1])
    return _pick(rng, ("{} beside {}", "{} that gives way to {}", "{} and {}", "{} next to {}")).format(first, second)


def _things(scene: Scene, rng: np.random.Generator) -> str:
    names = [f"{colour} {noun}" for colour, noun in scene.things]
    if len(names) > 1 and rng.random() < 0.25:
        names = names[:1]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _flock(scene: Scene, rng: np.random.Generator) -> str:
    colour, noun = scene.movers[0]
    return _pick(rng, ("{} fly over it", "{} in the air", "{} pass by", "with {} above")).format(f"{colour} {noun}")


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]

"""How many actors a job gets, and what reaches the driver's limits."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.ground import Room, limits_of, size_fleet
from jobs.limits import Limits
from jobs.spec import LimitsPart
from jobs.spec_text import build_spec

BASE: dict[tuple[str, ...], Any] = {("prompts", "url"): "p.txt", ("out",): "out"}


@pytest.mark.parametrize(
    ("actors", "gpus", "room", "num_tasks", "expected"),
    [
        ("auto", None, Room(0, 2), 100, (2, 0.0)),
        ("auto", None, Room(8, 128), 100, (8, 1.0)),
        ("auto", None, Room(8, 4), 100, (4, 1.0)),
        ("auto", 0.5, Room(2, 16), 100, (4, 0.5)),
        ("auto", 0.0, Room(8, 4), 100, (4, 0.0)),
        ("auto", None, Room(8, 128), 3, (3, 1.0)),
        ("auto", 2.0, Room(1, 4), 100, (1, 2.0)),
        (6, None, Room(0, 2), 100, (6, 0.0)),
    ],
)
def test_the_fleet_is_what_was_asked_for_or_what_has_room(
    actors: int | str, gpus: float | None, room: Room, num_tasks: int, expected: tuple[int, float]
) -> None:
    spec = build_spec(flags=BASE | {("actors", "count"): actors, ("actors", "gpus_per_actor"): gpus})
    sizing = size_fleet(spec, room, num_tasks)
    assert (sizing.num_actors, sizing.resources.num_gpus) == expected


def test_every_limit_of_the_spec_reaches_the_driver() -> None:
    assert set(LimitsPart.model_fields) <= set(Limits.model_fields)
    limits = limits_of(build_spec(flags=BASE | {("limits", "attempts"): 9, ("actors", "in_flight"): 1}), 4)
    assert (limits.attempts, limits.in_flight, limits.num_actors) == (9, 1, 4)


def test_the_defaults_of_spec_and_driver_agree() -> None:
    defaults = {name: field.default for name, field in LimitsPart.model_fields.items()}
    assert defaults == {name: Limits.model_fields[name].default for name in defaults}

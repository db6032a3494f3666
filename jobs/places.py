"""Where things fail: machines, and single GPUs of a machine, that get no more work. Pure.

A place is avoided when different items fail at it with no success between, and only while another one is known.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from workers.task import FailureKind


class Place(NamedTuple):
    """A GPU of a machine; `gpu_id` is empty where there is none."""

    node_id: str
    gpu_id: str = ""


@dataclass
class PlaceBlocklist:
    """Counts failures by machine and by GPU; `num_items` different ones in a row are too many."""

    num_items: int
    nodes: set[str] = field(default_factory=set)
    """Machines that are avoided."""
    gpus: set[Place] = field(default_factory=set)
    """GPUs that are avoided, on machines that are not."""
    _known: set[Place] = field(default_factory=set)
    _failed: dict[Place, set[str]] = field(default_factory=lambda: defaultdict(set))

    def knows(self, place: Place) -> None:
        """An actor came up there."""
        self._known.add(place)

    def is_blocked(self, place: Place) -> bool:
        return place.node_id in self.nodes or place in self.gpus

    def succeeded(self, place: Place) -> None:
        self._failed.pop(place, None)

    def failed(self, place: Place, item_id: str, kind: FailureKind) -> Literal["node", "gpu"] | None:
        """Count a failure, unless prompt or picture are to blame, and say what is avoided because of it.

        A machine with several GPUs is avoided as a whole only when each of them fails.
        """
        if kind in ("invalid_input", "quality"):
            return None
        self._failed[place].add(item_id)
        if self.is_blocked(place) or not self._is_bad(place):
            return None
        others = {known for known in self._known if not self.is_blocked(known)} - {place}
        here = {known for known in self._known if known.node_id == place.node_id} | {place}
        if all(self._is_bad(gpu) for gpu in here) and any(other.node_id != place.node_id for other in others):
            self.nodes.add(place.node_id)
            return "node"
        if place.gpu_id and others:
            self.gpus.add(place)
            return "gpu"
        return None

    def _is_bad(self, place: Place) -> bool:
        return len(self._failed.get(place, ())) >= self.num_items

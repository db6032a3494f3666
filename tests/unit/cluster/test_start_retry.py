"""A local Ray that does not come up in time gets a second chance; what is left of the first one is removed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from cluster import start
from cluster.errors import ClusterUnreachable


class Slow:
    """Stands for ray.init; fails so many times as Ray does when its raylet is slow."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.folders: list[Path] = []

    def __call__(self, **options: object) -> None:
        self.folders.append(Path(str(options["_temp_dir"])))
        if len(self.folders) <= self.times:
            raise Exception("The current node timed out during startup.")


@pytest.mark.parametrize("times", [1, 2])
def test_a_start_that_times_out_is_tried_once_more(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(times)
    monkeypatch.setattr(start.ray, "init", slow)
    monkeypatch.setattr(start.ray, "get_runtime_context", lambda: type("Context", (), {"gcs_address": "here:1"}))
    if times == 1:
        with start.connect("local") as cluster:
            assert cluster.address == "here:1"
    else:
        with pytest.raises(ClusterUnreachable, match="timed out"):
            start.connect("local")
    assert len(slow.folders) == 2
    assert not any(folder.exists() for folder in slow.folders)


def test_a_signal_that_ray_turns_into_an_exit_ends_the_start_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders: list[Path] = []

    def terminated(**options: object) -> None:
        folders.append(Path(str(options["_temp_dir"])))
        raise SystemExit(int(signal.SIGTERM))

    monkeypatch.setattr(start.ray, "init", terminated)
    with pytest.raises(KeyboardInterrupt):
        start.connect("local")
    assert [folder.exists() for folder in folders] == [False]

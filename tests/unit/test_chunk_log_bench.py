"""The bench of chunk logs tells recorded chunks from others, and finds that what was replayed is what was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.bench import history_log, rollout_history
from tests.tiny_wan import TINY


def test_a_log_is_timed_beside_chunks_without_and_its_replay_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_log, "_CYCLES", 1)  # more are for the median of times
    variant = replace(rollout_history.VARIANTS["fastar-tiles"], kept_chunks=3, spare_chunks=2)
    (row,) = rollout_history.chunk_logs(variant, replace(TINY, num_frames=650))
    assert row["table_is_equal"]
    assert row["goes_on_equal"]
    assert row["chunks_replayed"] == 1 + 1 + 3 + 2 + 1 + 2 * 2
    # Lists of a small table are of one size throughout; the last of 55 chunks is in no log.
    assert row["log_gb_all_frames"] * 1e3 == pytest.approx(54 * row["log_mb_per_chunk"])


def test_turns_are_recorded_after_the_first_chunks(tmp_path: Any) -> None:
    engine = rollout_history.engine_for(rollout_history.VARIANTS["fastar-tiles"], TINY)
    turns = history_log._Turns(engine, tmp_path, 3, 2)
    for index in range(turns.stop + 3):
        turns.record(index, engine.latents, engine.rollout.clean_lists)()
    turns.close()
    names = {
        path.name: [int(file.stem.split("-")[1]) for file in sorted(path.iterdir())] for path in tmp_path.iterdir()
    }
    assert names == {"0": [0, 1, 2]} | {str(1 + cycle): [3 + 4 * cycle, 4 + 4 * cycle] for cycle in range(5)}
    recorded, plain = turns.split([float(index) for index in range(turns.stop)])
    assert recorded[:4] == [3, 4, 7, 8]
    assert plain[:4] == [5, 6, 9, 10]

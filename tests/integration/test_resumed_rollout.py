"""A rollout that is killed and taken up by another process makes the latents that it would have made."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.resumed_rollout import make_model, make_task, roll
from workers.errors import CheckpointMismatch
from workers.snapshot import RolloutId, read_snapshot, write_snapshot

ROOT = Path(__file__).resolve().parents[2]
FRAMES = 132  # 11 chunks


def start(policy: str, file: Path, waits_after: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.resumed_rollout", policy, str(file), str(FRAMES), str(waits_after)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "file"),
    [("fastar-tiles", "snapshot"), ("fastar-quant", "snapshot"), ("fastar-tiles", "chunks.log")],
)
def test_killed_and_taken_up_elsewhere_it_goes_on_bit_for_bit(tmp_path: Path, policy: str, file: str) -> None:
    unbroken = dict(roll(make_model(policy), make_task(FRAMES), None))
    made: dict[int, str] = {}
    with start(policy, tmp_path / file, waits_after=9) as first:
        assert first.stdout is not None
        for line in first.stdout:
            made[int(line.split()[0])] = line.split()[1]
            if len(made) == 7:
                first.send_signal(signal.SIGKILL)
                break
    with start(policy, tmp_path / file) as second:
        answer, _ = second.communicate()
        after = {int(index): digest for index, digest in map(str.split, answer.splitlines())}
    assert second.returncode == 0
    assert min(after) >= 7, "it went on, and did not begin anew"
    assert made.items() <= unbroken.items()
    assert after.items() <= unbroken.items()
    assert max(after) == max(unbroken)


def test_a_snapshot_of_another_rollout_is_refused(tmp_path: Path) -> None:
    model = make_model("fastar-tiles")
    assert model.seat is not None
    model.seat.begin_take()
    rollout = RolloutId(model.config.fingerprint, model.revision, "a-0", 7)
    num_bytes = write_snapshot(tmp_path / "file", rollout, 3, model.seat.table)
    assert num_bytes == (tmp_path / "file").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    assert read_snapshot(tmp_path / "file", rollout, model.seat.table) == 3
    other = RolloutId(model.config.fingerprint, model.revision, "a-0", 8)
    with pytest.raises(CheckpointMismatch, match=r"a snapshot with seed 7, this rollout has 8"):
        read_snapshot(tmp_path / "file", other, model.seat.table)

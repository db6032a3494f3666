"""A take of any length costs an actor the same host memory: pictures, segments and uploads are held in pieces only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RENDER = """
import json, sys
from pathlib import Path
from workers.actor import RenderActor
from workers.config import BackboneConfig, RenderConfig, VideoConfig, WindowCacheConfig
from workers.pipeline import rss_bytes
from workers.task import PromptSegment, RenderSetup, RenderTask

config = RenderConfig(
    backbone=BackboneConfig(name="tiny-test"), video=VideoConfig(width=256, height=128),
    cache=WindowCacheConfig(sink_latent_frames=1, recent_latent_frames=2),
)
actor = RenderActor(RenderSetup(job_id="job", config=config, store_url=sys.argv[1]))
actor.load()
loaded = rss_bytes()
peaks = []
for name, num_frames in (("warm", 48), ("short", 96), ("long", 960)):
    segments = (PromptSegment(frame=0, prompt="a valley"),)
    names = {"task_id": f"{name}-0", "item_id": name, "sample_index": 0, "attempt": "e1a1"}
    task = RenderTask(**names, segments=segments, seed=1, num_frames=num_frames)
    (outcome,) = actor.run([task])
    assert outcome.num_frames == num_frames, outcome
    peaks.append(outcome.peak_rss_bytes)
print(json.dumps({"loaded": loaded, "peaks": peaks}))
"""
MB = 1 << 20


@pytest.mark.slow
def test_host_memory_of_an_actor_does_not_grow_with_the_length_of_a_take(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RENDER, str(tmp_path)], capture_output=True, text=True, timeout=1000, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    _, short, long = found["peaks"]
    # 864 more frames of 256x128 are 85 MB as pictures; threads' heaps alone move by 25 MB from run to run.
    assert long - short < 55 * MB, found
    assert long - found["loaded"] < 300 * MB, found

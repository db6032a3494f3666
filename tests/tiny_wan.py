"""Settings of rollout benches in which a row is made in seconds on a CPU: two denoising steps, pictures of 32x32."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.bench.rollout_rows import Settings
from workers.model.backbones import Native, find_backbone

TINY = Settings(
    backbone=replace(find_backbone("tiny-wan-test"), native=Native(num_steps=2, shift=5.0, attended_latent_frames=9)),
    width=32,
    height=32,
    device=torch.device("cpu"),
    dtype=torch.float32,
    num_frames=96,
    timed_chunks=1,
    compiled=False,
)

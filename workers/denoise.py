"""Flow matching: noise levels, steps between them, and noise itself.

A latent at level sigma is `(1 - sigma) * clean + sigma * noise`; the model predicts the flow `noise - clean` at
timestep 1000 * sigma. Noise is a function of (seed, chunk, step) and never of call order, device or history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_TRAINING_TIMESTEPS = 1000  # Wan's schedule is a table of this length


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Noise level of a schedule position u in [0, 1] (1 is noise); `shift` > 1 spends more steps on noisy levels."""
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class Schedule:
    """Noise levels of one chunk's denoising steps, noisiest first, float32 values as plain numbers."""

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        return len(self.sigmas)

    def next_sigma(self, step_index: int) -> float:
        """Level after this step; 0 after the last one."""
        return self.sigmas[step_index + 1] if step_index + 1 < self.num_steps else 0.0


def warp_steps(step_list: Sequence[int], shift: float) -> Schedule:
    """Entries of Wan's shifted table by their place before the shift: 1000 is noise, 1 nearly clean.

    Computed in float32 like the published models: the last bits of a timestep reach the sinusoid.

    Raises:
        ValueError: The places do not fall from at most 1000 to at least 1.
    """
    places = [_TRAINING_TIMESTEPS + 1, *step_list, 0]
    if not step_list or not all(a > b for a, b in pairwise(places)):
        raise ValueError(f"steps {list(step_list)}: expected places that fall from at most {_TRAINING_TIMESTEPS} to 1")
    u = torch.linspace(1.0, 0.0, _TRAINING_TIMESTEPS + 1)[:-1]
    return _as_schedule(shift_sigma(u, shift)[[_TRAINING_TIMESTEPS - step for step in step_list]])


def make_schedule(num_steps: int, shift: float) -> Schedule:
    """`num_steps` equally spaced entries of that table, from pure noise on (Self-Forcing, Rolling-Forcing)."""
    return warp_steps(
        [_TRAINING_TIMESTEPS - round(_TRAINING_TIMESTEPS * i / num_steps) for i in range(num_steps)], shift
    )


def make_flow_schedule(num_steps: int, shift: float) -> Schedule:
    """`num_steps` levels from pure noise on, equally spaced before the shift, for many Euler steps (LongVie 2).

    The same levels as `make_schedule` where both exist, up to the last bit of float32.
    """
    return _as_schedule(shift_sigma(torch.linspace(1.0, 0.0, num_steps + 1)[:-1], shift))


def _as_schedule(sigma: Tensor) -> Schedule:
    return Schedule(tuple(sigma.tolist()), tuple((sigma * _TRAINING_TIMESTEPS).tolist()))


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """The latent at level `sigma` (a number, or a tensor that broadcasts)."""
    return (1 - sigma) * clean + sigma * noise


def flow_target(clean: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict."""
    return noise - clean


def clean_estimate(noisy: Tensor, flow: Tensor, sigma: Tensor | float) -> Tensor:
    """The clean latent that a flow points to."""
    return noisy - sigma * flow


def step_euler(noisy: Tensor, flow: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """Go along the flow to the next level."""
    return noisy + (next_sigma - sigma) * flow


def step_renoise(noisy: Tensor, flow: Tensor, sigma: float, next_sigma: float, noise: Tensor) -> Tensor:
    """Take the clean estimate and add fresh noise of the next level (distilled models)."""
    return add_noise(clean_estimate(noisy, flow, sigma), noise, next_sigma)


def draw_noise(seed: int, chunk_index: int, step_index: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers for one chunk and step, float32 on the CPU: the same for every device.

    Step 0 is the noise that a chunk starts from; step k > 0 is the fresh noise added before step k.
    The counter's upper half holds chunk and step, so streams cannot meet before 2^128 numbers.
    """
    bits = np.random.Philox(key=[seed, 0], counter=[0, 0, step_index, chunk_index])
    return torch.from_numpy(np.random.Generator(bits).standard_normal(shape, dtype=np.float32))


def to_device(noise: Tensor, device: torch.device) -> Tensor:
    """Noise where it is needed; a GPU fetches it while the host goes on."""
    if device.type == "cuda" and noise.device.type == "cpu":
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)

"""3-D rotary positions as in Wan: time, row and column share the head dimension; pairs are neighbouring channels.

Positions are an argument (whole or fractional numbers, any order), so a caller may re-index time or place tokens in
world coordinates. Tables are made in float64 and kept in float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 8
"""Of a token: what caches round rows and columns to."""
_TABLE_STEPS = 1024
"""Tables begin and end at multiples of it, so that one serves many chunks."""
_MOST_STEPS = 2**17
"""Beyond, a table costs more than the rotations themselves: 16,000 latent frames."""


class Rotation(NamedTuple):
    """Cosines and sines of a set of tokens, float32, [B or 1, Q, N or 1, D/2]: a 1 spans the heads."""

    cos: Tensor
    sin: Tensor


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """Channels for time, row and column: 44, 42, 42 of 128."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def make_rotation(position_BQ3: Tensor, head_dim: int, theta: float) -> Rotation:
    """Rotation of tokens at (time, row, column).

    Args:
        position_BQ3: [Q, 3], [B, Q, 3], or [B, Q, N, 3] where heads differ; any real dtype and device.
        head_dim: Channels of one head, even.
        theta: Base of the wavelengths, 10000 in Wan.
    """
    if position_BQ3.dim() == 4 and position_BQ3.is_cpu and position_BQ3.numel():
        # Each head has its own tokens, but few times, rows and columns: seven times faster than so many cosines.
        steps = position_BQ3 * _STEPS
        if _are_whole(steps):
            return _look_up(steps.long(), head_dim, theta)
    angles = []
    for axis, size in enumerate(split_head_dim(head_dim)):
        frequency = _frequencies(size, theta, position_BQ3.device)
        angles.append(position_BQ3[..., axis, None].double() * frequency)
    angle = torch.cat(angles, dim=-1)
    if angle.dim() == 2:
        angle = angle[None]
    if angle.dim() == 3:
        angle = angle[:, :, None]
    return Rotation(angle.cos().float(), angle.sin().float())


def _look_up(steps_BQN3: Tensor, head_dim: int, theta: float) -> Rotation:
    """The same for positions counted in steps, int64, from one table for each axis."""
    cos, sin = [], []
    for axis, size in enumerate(split_head_dim(head_dim)):
        step = steps_BQN3[..., axis].flatten()
        first, table = _table_for(step, size, theta)
        turn = table.index_select(0, step - first)
        cos.append(turn.real)
        sin.append(turn.imag)
    shape = (*steps_BQN3.shape[:-1], -1)
    return Rotation(torch.cat(cos, -1).view(shape), torch.cat(sin, -1).view(shape))


def _table_for(step: Tensor, size: int, theta: float) -> tuple[int, Tensor]:
    """Turns by all steps of an axis from the first returned on, complex64 [steps, size / 2]; kept for the next call."""
    first, last = (int(x) for x in step.aminmax())
    first = first // _TABLE_STEPS * _TABLE_STEPS
    return first, _turns(first, (last // _TABLE_STEPS + 1) * _TABLE_STEPS, size, theta)


@lru_cache(maxsize=16)
def _turns(first: int, stop: int, size: int, theta: float) -> Tensor:
    with torch.inference_mode(False):  # such a tensor may be read in any mode
        known = torch.arange(first, stop, dtype=torch.float64) / _STEPS
        angle = known[:, None] * _frequencies(size, theta, known.device)
        return torch.complex(angle.cos().float(), angle.sin().float())


def rotate_in_place(x_BQND: Tensor, position_BQN3: Tensor, theta: float) -> None:
    """`rotate` by the rotation of these positions, written over keys that nobody else has.

    On a CPU no rotation of every key is laid down: what heads merged for themselves have few times, rows and columns.

    Args:
        x_BQND: Contiguous.
        position_BQN3: In whole eighths, as caches that merge keep them.
        theta: Base of the wavelengths.
    """
    head_dim = x_BQND.shape[-1]
    if not x_BQND.is_cpu or x_BQND.dtype != torch.float32:
        x_BQND.copy_(rotate(x_BQND, make_rotation(position_BQN3, head_dim, theta)))
        return
    pairs = torch.view_as_complex(x_BQND.view(-1, head_dim // 2, 2))
    steps_3R, start = (position_BQN3.reshape(-1, 3).mT * _STEPS).int().contiguous(), 0
    for step, size in zip(steps_3R, split_head_dim(head_dim), strict=True):
        first, table = _table_for(step, size, theta)
        pairs[:, start : start + size // 2].mul_(table.index_select(0, step - first))
        start += size // 2


def _are_whole(steps: Tensor) -> bool:
    return steps.numel() > 0 and bool((steps == steps.round()).all()) and bool((steps.abs() < _MOST_STEPS).all())


def _frequencies(size: int, theta: float, device: torch.device) -> Tensor:
    index = torch.arange(0, size, 2, dtype=torch.float64, device=device)
    return theta ** (-index / size)


def rotate(x_BQND: Tensor, rotation: Rotation) -> Tensor:
    """Turn queries or keys; computed in float32, returned in the dtype of the input."""
    if torch.compiler.is_compiling():
        return rotate_in_parts(x_BQND, rotation)
    if x_BQND.is_cuda and not x_BQND.requires_grad:
        out_BQND = torch.empty(x_BQND.shape, dtype=x_BQND.dtype, device=x_BQND.device)
        rotate_into(out_BQND, x_BQND, rotation)
        return out_BQND
    # One complex product is nine times faster than its four real ones on a CPU, but the compiler cannot fuse it.
    pairs = torch.view_as_complex(x_BQND.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(*rotation)).flatten(-2).to(x_BQND.dtype)


def rotate_into(out_BQND: Tensor, x_BQND: Tensor, rotation: Rotation) -> None:
    """`rotate`, written to where it is wanted; knows no gradient."""
    if x_BQND.is_cuda and x_BQND.stride(-1) == out_BQND.stride(-1) == 1 and x_BQND.dtype != torch.float64:
        from workers.model import fused  # Triton comes with CUDA builds of torch alone

        fused.rotate_into(out_BQND, x_BQND, *rotation)
    elif x_BQND.is_cuda:
        out_BQND.copy_(rotate_in_parts(x_BQND, rotation))
    else:
        out_BQND.copy_(rotate(x_BQND, rotation))


def rotate_in_parts(x_BQND: Tensor, rotation: Rotation) -> Tensor:
    """The same in real numbers, for compiled code."""
    even, odd = x_BQND.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BQND.dtype)


def grid_positions(time_T: Tensor, rows: int, columns: int, origin_T2: Tensor | None = None) -> Tensor:
    """Positions [..., T*rows*columns, 3] of whole latent frames in token order (frame, row, column), float32.

    Args:
        time_T: Time of each latent frame, [T] or [B, T].
        rows, columns: Tokens of a latent frame.
        origin_T2: (x, y) of the upper left corner of each latent frame in the world, in tokens ([T, 2] or [B, T, 2]):
            for models with `world_rope`. Without it rows and columns count from 0.
    """
    time = time_T.float()[..., None, None]
    row = torch.arange(rows, device=time.device, dtype=torch.float32)[:, None]
    column = torch.arange(columns, device=time.device, dtype=torch.float32)[None, :]
    if origin_T2 is not None:
        column = column + origin_T2[..., 0, None, None].float()
        row = row + origin_T2[..., 1, None, None].float()
    return torch.stack(torch.broadcast_tensors(time, row, column), dim=-1).flatten(-4, -2)

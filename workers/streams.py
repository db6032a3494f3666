"""CUDA streams of a process, one for each purpose and never a new one."""

from __future__ import annotations

import functools

import torch


@functools.cache
def stream_for(purpose: str, device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """The same for all takes: memory that was used on a stream is given to no other one, and cuBLAS keeps a workspace
    for each that it has computed on, of 32 MB on Hopper."""
    return torch.cuda.Stream(device, priority=priority)

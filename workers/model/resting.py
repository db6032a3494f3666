"""Weights that wait in host memory while codes in 8 bits stand for them on the GPU (`fp8_linears.py`).

What is left in a parameter is empty: no product can be computed with it, and the model's own forward says why. One
thread at a time, as all that computes with a model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from workers.model.dit import CausalDiT


@torch.inference_mode(mode=False)
def rest_weights(model: CausalDiT, linears: Iterable[nn.Linear]) -> None:
    """Take the weights of these linear layers of the model to host memory, until `wake_weights`; biases stay."""
    for linear in linears:
        weight = linear.weight.data
        model.resting.append((linear, weight.to("cpu", copy=True)))
        linear.weight.data = weight.new_empty(0)
    for layer in model.layers:
        if not layer.self_attn.q.weight.numel():
            layer.self_attn.unfuse()


@torch.inference_mode(mode=False)
def wake_weights(model: CausalDiT) -> None:
    """Bring all back to where the model is; codes made of them stay good.

    Where it was cut off, by memory that ran out, it can be called again.
    """
    if not model.resting:
        return
    like = model.head.modulation
    while model.resting:
        linear, weight = model.resting[-1]
        linear.weight.data = weight.to(like.device, like.dtype)
        model.resting.pop()
    for layer in model.layers:
        _ = layer.self_attn.fused
    give_back_memory(like.device)


def give_back_memory(device: torch.device) -> None:
    """To the device, what was freed: in pieces of one weight nothing larger would find room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()

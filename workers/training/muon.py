"""Muon: momentum whose matrix is made orthogonal before each step; for weight matrices and convolution kernels.

Kernels count as matrices [out, in * height * width]. Matrices of one shape are made orthogonal in one batched product,
so that a step is a few dozen launches, not thousands, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # pulls singular values to about 1 in five rounds (Jordan et al., 2024)
_ROUNDS = 5
_RMS = 0.2  # the size of an AdamW update, so that both share one learning rate


class Muon(torch.optim.Optimizer):
    """Steps of equal size in every direction of each matrix; Nesterov momentum, decoupled weight decay."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float | Tensor, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[(parameter.shape[0], parameter[0].numel())].append(parameter)
            for shape, members in shapes.items():
                self._step_bucket(members, shape, group)

    def _step_bucket(self, members: list[Tensor], shape: tuple[int, int], group: dict[str, Any]) -> None:
        grads = [parameter.grad for parameter in members if parameter.grad is not None]
        assert len(grads) == len(members)
        moments = [self.state[parameter]["momentum"] for parameter in members]
        torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, moments, group["momentum"])
        updates = orthogonalise(torch.stack([update.flatten(1) for update in ahead]))
        if group["weight_decay"]:
            torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * (_RMS * math.sqrt(max(shape)))
        steps = (updates.float() * scale).unbind()
        torch._foreach_sub_(members, [step.view(p.shape) for step, p in zip(steps, members, strict=True)])


def orthogonalise(matrices_BRC: Tensor) -> Tensor:
    """Bring all singular values of each matrix near 1, by Newton-Schulz rounds; in bfloat16 on a GPU."""
    wide = matrices_BRC.shape[1] <= matrices_BRC.shape[2]
    x = matrices_BRC.to(torch.bfloat16 if matrices_BRC.is_cuda else torch.float32)
    x = x if wide else x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    result: Tensor = x if wide else x.transpose(1, 2)
    return result

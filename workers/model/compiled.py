"""The transformer compiled around its attention, for rendering: norms, modulation and products between are fused.

Attention itself stays as it is called (caches, policies and kernels are not the compiler's business), so a layer is
three compiled pieces with the two attentions between them. All layers share the pieces; each number of latent frames in
a call compiles them once. Results differ from the plain ones in the last bits, and are the same in every process: the
compiler may not choose by timing where its choice shows in the numbers (the order of a sum).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from workers.contracts import PromptKeys
from workers.model.dit import Attend, AttendPrompt, CausalDiT, Layer, add_gated, modulate


def compile_around_attention(model: CausalDiT, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have all layers of a model run in compiled pieces from its next call on.

    Args:
        model: With its weights where they stay.
        backend: Of torch.compile.
    """
    model.run_layers_by(_CompiledLayers(backend))


class _CompiledLayers:
    """Runs one layer, as `CausalDiT` does it plainly."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        can_be_deterministic = backend == "inductor" and "deterministic" in torch._inductor.list_options()
        options: dict[str, Any] | None = {"deterministic": True} if can_be_deterministic else None

        def compiled(piece: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(piece, dynamic=False, fullgraph=True, backend=backend, options=options)

        self._enter, self._between, self._leave = compiled(_enter), compiled(_between), compiled(_leave)

    def __call__(
        self,
        layer: Layer,
        x_BQE: Tensor,
        time_BT6E: Tensor,
        keys: PromptKeys,
        layer_index: int,
        attend: Attend,
        attend_prompt: AttendPrompt,
    ) -> Tensor:
        q, k, v = self._enter(layer, x_BQE, time_BT6E)
        x_BQE, q = self._between(layer, x_BQE, attend(layer_index, q, k, v), time_BT6E)
        return cast(Tensor, self._leave(layer, x_BQE, attend_prompt(layer_index, q, keys), time_BT6E))


def _enter(layer: Layer, x_BQE: Tensor, time_BT6E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of self-attention."""
    return layer.self_attn.project(layer.modulate_input(x_BQE, time_BT6E))


def _between(layer: Layer, x_BQE: Tensor, out_BQND: Tensor, time_BT6E: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream after self-attention, and the queries of cross-attention."""
    gate = (layer.modulation + time_BT6E)[:, :, 2].unsqueeze(2)
    x_BQE = add_gated(x_BQE, layer.self_attn.o(out_BQND.flatten(-2)), gate)
    return x_BQE, layer.cross_attn.project_queries(layer.norm3(x_BQE))


def _leave(layer: Layer, x_BQE: Tensor, out_BQND: Tensor, time_BT6E: Tensor) -> Tensor:
    """The residual stream after cross-attention and feed-forward."""
    x_BQE = x_BQE + layer.cross_attn.o(out_BQND.flatten(-2))
    shift, scale, gate = (layer.modulation + time_BT6E)[:, :, 3:].unsqueeze(3).unbind(2)
    return add_gated(x_BQE, layer.ffn(modulate(x_BQE, shift, scale, layer.eps)), gate)

"""One transformer layer in two pieces around self-attention, for calls whose buffers never move: one video, one chunk.

The pieces are functions of tensors alone, so each is compiled once for all layers, and a call can be captured in a CUDA
graph. The first writes queries and keys (after RoPE) and values where attention reads them; the second goes from the
result of attention to the end of the layer. Large products may run in 8-bit floats (`Fp8Linears`), which rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.contracts import PromptKeys
from workers.model.dit import CausalDiT, Layer, add_gated, modulate
from workers.model.rope import Rotation, rotate_in_parts

Fp8Linears = Literal["none", "ffn", "large"]
"""Which products run in 8-bit floats: those of the feed-forward, or those of queries, keys and values as well."""

_FP8_MAX = 448.0
"""Largest number of torch.float8_e4m3fn."""


class LinearWeights(NamedTuple):
    """One linear layer; a scale for each output where the weight is in 8-bit floats."""

    weight_OI: Tensor
    bias_O: Tensor
    scale_1O: Tensor | None = None


class LayerWeights(NamedTuple):
    """One layer; views of the model's parameters where they are not in 8-bit floats."""

    modulation_6E: Tensor
    qkv: LinearWeights
    norm_q_E: Tensor
    norm_k_E: Tensor
    out: LinearWeights
    norm3_E: Tensor
    norm3_bias_E: Tensor
    cross_q: LinearWeights
    norm_cross_q_E: Tensor
    cross_out: LinearWeights
    up: LinearWeights
    down: LinearWeights


class PromptTable(NamedTuple):
    """Cross-attention keys of one layer, heads outside, filled up to a round number of rows with ones of no weight."""

    k_NPD: Tensor
    v_NPD: Tensor
    log_mass_P: Tensor
    """float32."""


class Targets(NamedTuple):
    """Where the first piece writes."""

    q_QND: Tensor
    k_NQD: Tensor
    v_NQD: Tensor


Enter = Callable[[LayerWeights, Tensor, Tensor, Rotation, Targets], None]
Leave = Callable[[LayerWeights, PromptTable, Tensor, Tensor, Tensor], Tensor]


class StaticLayers:
    """The layers of one model.

    Args:
        model: In evaluation mode, its weights where they stay; without image tokens.
        fp8: Products in 8-bit floats; needs a GPU that has them.
    """

    def __init__(self, model: CausalDiT, fp8: Fp8Linears = "none") -> None:
        assert not model.backbone.image_dim
        self.weights = [_read_layer(layer, fp8) for layer in model.layers]
        self.eps = model.backbone.eps
        eps = self.eps

        def enter(w: LayerWeights, x_QE: Tensor, time_T6E: Tensor, rotation: Rotation, to: Targets) -> None:
            _enter(w, x_QE, time_T6E, rotation, to, eps)

        def leave(w: LayerWeights, prompt: PromptTable, x_QE: Tensor, out_QND: Tensor, time_T6E: Tensor) -> Tensor:
            return _leave(w, prompt, x_QE, out_QND, time_T6E, eps)

        self.enter: Enter = enter
        self.leave: Leave = leave

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Fuse each piece."""
        self.enter = cast(Enter, torch.compile(self.enter, dynamic=False, fullgraph=True, backend=backend))
        self.leave = cast(Leave, torch.compile(self.leave, dynamic=False, fullgraph=True, backend=backend))


def hold_prompt(prompt: Sequence[PromptKeys], multiple: int = 16) -> list[PromptTable]:
    """Prompt keys as the layers read them; what holds the keys of another prompt can be copied over them."""
    tables = []
    for keys in prompt:
        k, v = keys.k_BPND[0].transpose(0, 1), keys.v_BPND[0].transpose(0, 1)
        rows = k.shape[1]
        pad = -rows % multiple
        mass = torch.zeros(rows, device=k.device) if keys.log_mass_BP is None else keys.log_mass_BP[0].float()
        tables.append(
            PromptTable(
                F.pad(k, (0, 0, 0, pad)).contiguous(),
                F.pad(v, (0, 0, 0, pad)).contiguous(),
                F.pad(mass, (0, pad), value=-torch.inf),
            )
        )
    return tables


def _enter(w: LayerWeights, x_QE: Tensor, time_T6E: Tensor, rotation: Rotation, to: Targets, eps: float) -> None:
    m = (w.modulation_6E + time_T6E)[None, :, :, None]
    h = modulate(x_QE[None], m[:, :, 0], m[:, :, 1], eps)[0]
    norm_rotate_into(apply_linear(w.qkv, h), w.norm_q_E, w.norm_k_E, rotation.cos, rotation.sin, eps, *to)


@torch.library.custom_op("longtake::norm_rotate_into", mutates_args=("q_QND", "k_NQD", "v_NQD"))
def norm_rotate_into(
    qkv_QF: Tensor, norm_q_E: Tensor, norm_k_E: Tensor, cos: Tensor, sin: Tensor, eps: float,
    q_QND: Tensor, k_NQD: Tensor, v_NQD: Tensor,
) -> None:  # fmt: skip
    """RMSNorm over all heads and RoPE of queries and keys, and values, to where attention reads them.

    On a GPU by a kernel of our own, whose arguments are these; see `fused.norm_rotate`.
    """
    if qkv_QF.is_cuda:
        from workers.model.fused import norm_rotate

        norm_rotate(qkv_QF, (norm_q_E, norm_k_E), (cos, sin), eps, (q_QND, k_NQD, v_NQD))
        return
    norm_rotate_plain(qkv_QF, norm_q_E, norm_k_E, Rotation(cos, sin), eps, Targets(q_QND, k_NQD, v_NQD))


def norm_rotate_plain(
    qkv_QF: Tensor, norm_q_E: Tensor, norm_k_E: Tensor, rotation: Rotation, eps: float, to: Targets
) -> None:
    """The reference."""
    q, k, v = qkv_QF.chunk(3, dim=-1)
    q = F.rms_norm(q, (q.shape[-1],), None, eps) * norm_q_E
    k = F.rms_norm(k, (k.shape[-1],), None, eps) * norm_k_E
    heads = to.q_QND.shape[1:]
    to.q_QND.copy_(rotate_in_parts(q.unflatten(-1, heads)[None], rotation)[0])
    to.k_NQD.copy_(rotate_in_parts(k.unflatten(-1, heads)[None], rotation)[0].transpose(0, 1))
    to.v_NQD.copy_(v.unflatten(-1, heads).transpose(0, 1))


def _leave(w: LayerWeights, prompt: PromptTable, x_QE: Tensor, out_QND: Tensor, time_T6E: Tensor, eps: float) -> Tensor:
    m = (w.modulation_6E + time_T6E)[None, :, :, None]
    x_QE = add_gated(x_QE[None], apply_linear(w.out, out_QND.flatten(1))[None], m[:, :, 2])[0]
    h = F.layer_norm(x_QE, (x_QE.shape[-1],), w.norm3_E, w.norm3_bias_E, eps)
    q = F.rms_norm(apply_linear(w.cross_q, h), (x_QE.shape[-1],), None, eps) * w.norm_cross_q_E
    x_QE = x_QE + apply_linear(w.cross_out, _attend_prompt(q, prompt))
    h = modulate(x_QE[None], m[:, :, 3], m[:, :, 4], eps)[0]
    h = apply_linear(w.down, apply_linear_gelu(w.up, h))
    return add_gated(x_QE[None], h[None], m[:, :, 5])[0]


def _attend_prompt(q_QE: Tensor, prompt: PromptTable) -> Tensor:
    """Plain products: a prompt is one or two tiles long once its padding is folded."""
    heads, _, dim = prompt.k_NPD.shape
    q_NQD = q_QE.unflatten(-1, (heads, dim)).transpose(0, 1)
    logit = torch.bmm(q_NQD, prompt.k_NPD.mT).float() / math.sqrt(dim) + prompt.log_mass_P
    out_NQD = torch.bmm(logit.softmax(-1).to(q_QE.dtype), prompt.v_NPD)
    return out_NQD.transpose(0, 1).flatten(1)


def apply_linear(linear: LinearWeights, x_QI: Tensor) -> Tensor:
    """The product; inputs get a scale for each row where the weight is in 8-bit floats."""
    if linear.scale_1O is None:
        return F.linear(x_QI, linear.weight_OI, linear.bias_O)
    scale_Q1 = x_QI.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / _FP8_MAX
    code = (x_QI.float() / scale_Q1).to(torch.float8_e4m3fn)
    product = torch._scaled_mm(
        code, linear.weight_OI.t(), scale_a=scale_Q1, scale_b=linear.scale_1O, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    return product + linear.bias_O


def apply_linear_gelu(linear: LinearWeights, x_QI: Tensor) -> Tensor:
    """`apply_linear` and GELU by tanh, on a GPU at the end of the product, unless it is one of 8-bit floats."""
    if linear.scale_1O is None:
        return cast(Tensor, linear_gelu(x_QI, linear.weight_OI, linear.bias_O))
    return F.gelu(apply_linear(linear, x_QI), approximate="tanh")


@torch.library.custom_op("longtake::linear_gelu", mutates_args=())
def linear_gelu(x_QI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """An operation of its own, so that compiling does not take it apart: the library fuses, the compiler would not."""
    if x_QI.is_cuda:  # GELU by tanh there, by erf on a CPU
        return torch._addmm_activation(bias_O, x_QI, weight_OI.t(), use_gelu=True)
    return F.gelu(F.linear(x_QI, weight_OI, bias_O), approximate="tanh")


@linear_gelu.register_fake
def _(x_QI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    return x_QI.new_empty(x_QI.shape[0], weight_OI.shape[0])


def _read_layer(layer: Layer, fp8: Fp8Linears) -> LayerWeights:
    attention, cross = layer.self_attn, layer.cross_attn
    return LayerWeights(
        modulation_6E=layer.modulation.detach()[0],
        qkv=_quantise_if(fp8 == "large", LinearWeights(*attention.fused)),
        norm_q_E=attention.norm_q.weight.detach(),
        norm_k_E=attention.norm_k.weight.detach(),
        out=_read(attention.o),
        norm3_E=layer.norm3.weight.detach(),
        norm3_bias_E=layer.norm3.bias.detach(),
        cross_q=_read(cross.q),
        norm_cross_q_E=cross.norm_q.weight.detach(),
        cross_out=_read(cross.o),
        up=_quantise_if(fp8 != "none", _read(cast(nn.Linear, layer.ffn[0]))),
        down=_quantise_if(fp8 != "none", _read(cast(nn.Linear, layer.ffn[2]))),
    )


def _read(linear: nn.Linear) -> LinearWeights:
    return LinearWeights(linear.weight.detach(), linear.bias.detach())


def _quantise_if(wanted: bool, linear: LinearWeights) -> LinearWeights:
    return quantise(linear) if wanted else linear


def quantise(linear: LinearWeights) -> LinearWeights:
    """The same in 8-bit floats, each output with a scale of its own."""
    scale_O1 = linear.weight_OI.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / _FP8_MAX
    code = (linear.weight_OI.float() / scale_O1).to(torch.float8_e4m3fn)
    return LinearWeights(code, linear.bias_O, scale_O1.t().contiguous())

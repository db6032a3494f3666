"""One transformer layer in two pieces around self-attention, for calls whose buffers never move: one video, one chunk.

The pieces are functions of tensors alone, so each is compiled once for all layers, and a call can be captured in a CUDA
graph. The first writes queries and keys (after RoPE) and values where attention reads them; the second goes from the
result of attention to the last product of the layer, which the next one adds to the stream as it reads it. Products may
run in 8-bit floats (`fp8_linears.py`), which rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.coded_tiles import code_queries_plain
from workers.model.add_norm import Norm, add_product, norm_codes, norm_rows
from workers.model.dit import CausalDiT, Layer
from workers.model.fp8_linears import Codes, Fp8Linears, Fp8Way, LinearWeights, Product, multiply, quantise
from workers.model.prompt_attention import PromptAttention, PromptTable, attend_prompt
from workers.model.rope import Rotation, rotate_in_parts


class LayerWeights(NamedTuple):
    """One layer; views of the model's parameters."""

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


class Targets(NamedTuple):
    """Where the first piece writes."""

    q_QND: Tensor
    k_NQD: Tensor
    v_NQD: Tensor


class CodedTargets(NamedTuple):
    """Where it writes queries and keys as tiles of `coded_tiles.py`, too; rows behind the last are zero already."""

    to: Targets
    q_NIB: Tensor
    k_NTB: Tensor
    rows: bool
    """Whether they are written to `to` as well; values always are."""


class Stream(NamedTuple):
    """The residual stream between two layers, and what is still to be added to it."""

    x_QE: Tensor
    product: Product | None = None
    gate_6E: Tensor | None = None
    """The modulation whose last place is the product's gate."""


Enter = Callable[[LayerWeights, Stream, Tensor, Rotation, Targets | CodedTargets], Tensor]
Leave = Callable[[LayerWeights, PromptTable, Tensor, Tensor, Tensor], Stream]
Settle = Callable[[Stream, Tensor], Tensor]
_LAST_GATE = 5


class _Ways(NamedTuple):
    """How a layer computes, the same for all layers of a model."""

    eps: float
    linear: Fp8Way
    attend_prompt: PromptAttention


class StaticLayers:
    """The layers of one model.

    Args:
        model: In evaluation mode, its weights where they stay; without image tokens.
        fp8: Products in 8-bit floats, in denoising steps alone: keys of a clean pass are what is remembered, and
            rounded there 8 bits lose twice as much of what is seen again.
        way: How those are computed.
        attend: Cross-attention to the prompt; another for a bench that compares.
    """

    def __init__(
        self,
        model: CausalDiT,
        fp8: Fp8Linears = "none",
        way: Fp8Way | None = None,
        attend: PromptAttention = attend_prompt,
    ) -> None:
        assert not model.backbone.image_dim
        how = _Ways(model.backbone.eps, way or Fp8Way(), attend)
        self.weights = [_read_layer(layer, fp8, how.linear.vectors) for layer in model.layers]
        self.clean_weights = (
            self.weights if fp8 == "none" else [_read_layer(layer, "none", ()) for layer in model.layers]
        )
        """Of a clean pass."""
        self.eps = how.eps

        def enter(
            w: LayerWeights, stream: Stream, time_T6E: Tensor, rotation: Rotation, to: Targets | CodedTargets
        ) -> Tensor:
            return _enter(w, stream, time_T6E, rotation, to, how)

        def leave(w: LayerWeights, prompt: PromptTable, x_QE: Tensor, out_QND: Tensor, time_T6E: Tensor) -> Stream:
            return _leave(w, prompt, x_QE, out_QND, time_T6E, how)

        def settle(stream: Stream, time_T6E: Tensor) -> Tensor:
            return _settle(stream, time_T6E, how)

        self.enter: Enter = enter
        """What a layer's second piece takes: the stream, all added."""
        self.leave: Leave = leave
        self.settle: Settle = settle
        """The stream behind the last layer, all added."""

    @property
    def has_clean_weights(self) -> bool:
        """Whether a clean pass computes otherwise than a step."""
        return self.clean_weights is not self.weights

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Fuse each piece."""
        self.enter = cast(Enter, torch.compile(self.enter, dynamic=False, fullgraph=True, backend=backend))
        self.leave = cast(Leave, torch.compile(self.leave, dynamic=False, fullgraph=True, backend=backend))
        self.settle = cast(Settle, torch.compile(self.settle, dynamic=False, fullgraph=True, backend=backend))


def _enter(
    w: LayerWeights, stream: Stream, time_T6E: Tensor, rotation: Rotation, to: Targets | CodedTargets, how: _Ways
) -> Tensor:
    if not (how.linear.kernels and stream.x_QE.is_cuda):  # nothing is gained by one pass
        stream = Stream(_settle(stream, time_T6E, how))
    x_QE, product, gate_6E = stream
    norm = Norm(w.modulation_6E, time_T6E, gate=-1 if product is None else _LAST_GATE, shift=0, gate_6E=gate_6E)
    x_QE, h = _add_norm(w.qkv, x_QE, product, norm, how)
    targets, *codes = to if isinstance(to, CodedTargets) else (to, None, None, True)
    norm_rotate_into(*multiply(w.qkv, h), w.norm_q_E, w.norm_k_E, rotation.cos, rotation.sin, how.eps, *targets, *codes)
    return x_QE


def _settle(stream: Stream, time_T6E: Tensor, how: _Ways) -> Tensor:
    x_QE, product, gate_6E = stream
    if product is None or gate_6E is None:
        return x_QE
    return add_product(x_QE, product, gate_6E, time_T6E, _LAST_GATE, kernels=how.linear.kernels)


def _add_norm(
    linear: LinearWeights, x_QE: Tensor, product: Product | None, norm: Norm, how: _Ways
) -> tuple[Tensor, Tensor | Codes]:
    """The stream with the product added, and what the linear layer takes of it."""
    make = norm_rows if linear.scale_1O is None else norm_codes
    return make(x_QE, product, norm, how.eps, kernels=how.linear.kernels)


@torch.library.custom_op("longtake::norm_rotate_into", mutates_args=("q_QND", "k_NQD", "v_NQD", "q_NIB", "k_NTB"))
def norm_rotate_into(
    qkv_QF: Tensor, scale_Q1: Tensor | None, scale_1F: Tensor | None, bias_F: Tensor | None,
    norm_q_E: Tensor, norm_k_E: Tensor, cos: Tensor, sin: Tensor, eps: float,
    q_QND: Tensor, k_NQD: Tensor, v_NQD: Tensor, q_NIB: Tensor | None, k_NTB: Tensor | None, rows: bool,
) -> None:  # fmt: skip
    """RMSNorm over all heads and RoPE of queries and keys, and values, to where attention reads them.

    The first four are a `Product`, the last six what `CodedTargets` has. On a GPU by a kernel of our own, whose
    arguments are these; see `fused_rotate`.
    """
    if qkv_QF.is_cuda:
        from workers.model.fused_rotate import norm_rotate

        scales = None if scale_Q1 is None or scale_1F is None or bias_F is None else (scale_Q1, scale_1F, bias_F)
        norms, to = (norm_q_E, norm_k_E), (q_QND, k_NQD, v_NQD)
        codes = None if q_NIB is None or k_NTB is None else (q_NIB, k_NTB)
        norm_rotate(qkv_QF, norms, (cos, sin), eps, to, scales, codes=codes, rows=rows)
        return
    targets: Targets | CodedTargets = Targets(q_QND, k_NQD, v_NQD)
    if q_NIB is not None and k_NTB is not None:
        targets = CodedTargets(Targets(q_QND, k_NQD, v_NQD), q_NIB, k_NTB, rows)
    value = Product(qkv_QF, scale_Q1, scale_1F, bias_F).value
    norm_rotate_plain(value, norm_q_E, norm_k_E, Rotation(cos, sin), eps, targets)


def norm_rotate_plain(
    qkv_QF: Tensor,
    norm_q_E: Tensor,
    norm_k_E: Tensor,
    rotation: Rotation,
    eps: float,
    to: Targets | CodedTargets,
) -> None:
    """The reference."""
    targets = to.to if isinstance(to, CodedTargets) else to
    q, k, v = qkv_QF.chunk(3, dim=-1)
    q = F.rms_norm(q, (q.shape[-1],), None, eps) * norm_q_E
    k = F.rms_norm(k, (k.shape[-1],), None, eps) * norm_k_E
    heads = targets.q_QND.shape[1:]
    q_QND, k_QND = (rotate_in_parts(x.unflatten(-1, heads)[None], rotation)[0] for x in (q, k))
    if isinstance(to, CodedTargets):  # of what is rounded
        to.q_NIB.copy_(code_queries_plain(q_QND.to(targets.q_QND.dtype)))
        to.k_NTB.copy_(code_queries_plain(k_QND.to(targets.k_NQD.dtype)))
    if not isinstance(to, CodedTargets) or to.rows:
        targets.q_QND.copy_(q_QND)
        targets.k_NQD.copy_(k_QND.transpose(0, 1))
    targets.v_NQD.copy_(v.unflatten(-1, heads).transpose(0, 1))


def _leave(w: LayerWeights, prompt: PromptTable, x_QE: Tensor, out_QND: Tensor, time_T6E: Tensor, how: _Ways) -> Stream:
    eps, way, attend = how
    product = multiply(w.out, _as_inputs(w.out, out_QND, way))
    norm = Norm(w.modulation_6E, time_T6E, gate=2, weight_E=w.norm3_E, bias_E=w.norm3_bias_E)
    x_QE, h = _add_norm(w.cross_q, x_QE, product, norm, how)
    found_QND = attend(multiply(w.cross_q, h), w.norm_cross_q_E, prompt, eps)
    product = multiply(w.cross_out, _as_inputs(w.cross_out, found_QND, way))
    x_QE, h = _add_norm(w.up, x_QE, product, Norm(w.modulation_6E, time_T6E, shift=3), how)
    if isinstance(h, Tensor):
        h = cast(Tensor, linear_gelu(h, w.up.weight_OI, w.up.bias_O))
    else:
        h = way.gelu_codes(multiply(w.up, h))
    return Stream(x_QE, multiply(w.down, h), w.modulation_6E)


def _as_inputs(linear: LinearWeights, h_QND: Tensor, way: Fp8Way) -> Tensor | Codes:
    """What attention gives, as a linear layer takes it."""
    return h_QND.flatten(1) if linear.scale_1O is None else way.row_codes(h_QND)


@torch.library.custom_op("longtake::linear_gelu", mutates_args=())
def linear_gelu(x_QI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """A product and GELU by tanh, on a GPU at its end.

    An operation of its own, so that compiling does not take it apart: the library fuses, the compiler would not.
    """
    if x_QI.is_cuda:  # GELU by tanh there, by erf on a CPU
        return torch._addmm_activation(bias_O, x_QI, weight_OI.t(), use_gelu=True)
    return F.gelu(F.linear(x_QI, weight_OI, bias_O), approximate="tanh")


@linear_gelu.register_fake
def _(x_QI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    return x_QI.new_empty(x_QI.shape[0], weight_OI.shape[0])


def _coded(layer: Layer, fp8: Fp8Linears) -> list[nn.Linear]:
    """Linear layers whose products are of 8-bit floats."""
    attention, cross = layer.self_attn, layer.cross_attn
    coded = [] if fp8 == "none" else [cast(nn.Linear, layer.ffn[0]), cast(nn.Linear, layer.ffn[2])]
    coded += [attention.q, attention.k, attention.v] if fp8 in ("large", "all") else []
    return coded + ([attention.o, cross.q, cross.o] if fp8 == "all" else [])


def _read_layer(layer: Layer, fp8: Fp8Linears, vectors: Collection[str]) -> LayerWeights:
    attention, cross = layer.self_attn, layer.cross_attn
    coded = _coded(layer, fp8)

    def read(name: str, module: nn.Linear, fused: tuple[Tensor, Tensor] | None = None) -> LinearWeights:
        linear = LinearWeights(*(fused or (module.weight.detach(), module.bias.detach())))
        return quantise(linear, vectors=name in vectors) if module in coded else linear

    return LayerWeights(
        modulation_6E=layer.modulation.detach()[0],
        qkv=read("qkv", attention.q, attention.fused),
        norm_q_E=attention.norm_q.weight.detach(),
        norm_k_E=attention.norm_k.weight.detach(),
        out=read("out", attention.o),
        norm3_E=layer.norm3.weight.detach(),
        norm3_bias_E=layer.norm3.bias.detach(),
        cross_q=read("cross_q", cross.q),
        norm_cross_q_E=cross.norm_q.weight.detach(),
        cross_out=read("cross_out", cross.o),
        up=read("up", cast(nn.Linear, layer.ffn[0])),
        down=read("down", cast(nn.Linear, layer.ffn[2])),
    )

"""What stands between two products of a layer: the one before is added to the residual stream, gated; then a norm.

What comes of the norm is modulated or weighted, and is what the next product takes, in the model's dtype or as codes of
8 bits. On a GPU one kernel of our own does all of it in one pass (`fused_norms.py`), elsewhere the plain forms.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.dit import add_gated, modulate
from workers.model.fp8_linears import Codes, Product, encode_rows, has_products, room_for_codes


class Norm(NamedTuple):
    """What a product is added to the residual stream by, and what comes of the norm after it.

    Modulation is [6, E] of a layer and [T, 6, E] of its latent frames' timesteps, to be added up.
    """

    modulation_6E: Tensor
    time_T6E: Tensor
    gate: int = -1
    """Place of the factor on the product among the six; -1: none."""
    shift: int = -1
    """Place of what is added after the norm, the factor (less one) right behind it; -1: weights instead."""
    weight_E: Tensor | None = None
    bias_E: Tensor | None = None
    gate_6E: Tensor | None = None
    """Modulation that the gate is of, where that is another layer's."""

    @property
    def gate_source(self) -> Tensor:
        """Where the gate stands."""
        return self.modulation_6E if self.gate_6E is None else self.gate_6E


def norm_rows(
    x_QE: Tensor, product: Product | None, norm: Norm, eps: float, *, kernels: bool = True
) -> tuple[Tensor, Tensor]:
    """See `norm_rows_plain`; kernels: by our own on a GPU, else by what the compiler makes of the plain form."""
    if not (kernels and x_QE.is_cuda):
        return norm_rows_plain(x_QE, product, norm, eps)
    if product is None:
        return x_QE, cast(Tensor, _norm_rows(x_QE, *norm, eps))
    return cast(tuple[Tensor, Tensor], _add_norm_rows(x_QE, *product, *norm, eps))


def norm_codes(
    x_QE: Tensor, product: Product | None, norm: Norm, eps: float, *, kernels: bool = True
) -> tuple[Tensor, Codes]:
    """See `norm_codes_plain`."""
    if not kernels:
        return norm_codes_plain(x_QE, product, norm, eps)
    if product is None:
        return x_QE, Codes(*_norm_codes(x_QE, *norm, eps))
    x_QE, code, scale = _add_norm_codes(x_QE, *product, *norm, eps)
    return x_QE, Codes(code, scale)


def add_product(
    x_QE: Tensor, product: Product, gate_6E: Tensor, time_T6E: Tensor, gate: int, *, kernels: bool = True
) -> Tensor:
    """The residual stream, a product added; there is always a gate."""
    if not (kernels and x_QE.is_cuda):
        return _add_plain(x_QE, product, Norm(gate_6E, time_T6E, gate))
    return cast(Tensor, _add_product(x_QE, *product, gate_6E, time_T6E, gate))


def norm_rows_plain(x_QE: Tensor, product: Product | None, norm: Norm, eps: float) -> tuple[Tensor, Tensor]:
    """Add the product to the residual stream, gated; then LayerNorm, modulate or weight: the stream, and the rows."""
    if product is not None:
        x_QE = _add_plain(x_QE, product, norm)
    if norm.weight_E is not None:
        return x_QE, F.layer_norm(x_QE, (x_QE.shape[-1],), norm.weight_E, norm.bias_E, eps)
    m = (norm.modulation_6E + norm.time_T6E)[None, :, :, None]
    return x_QE, modulate(x_QE[None], m[:, :, norm.shift], m[:, :, norm.shift + 1], eps)[0]


def _add_plain(x_QE: Tensor, product: Product, norm: Norm) -> Tensor:
    if norm.gate < 0:
        return x_QE + product.value
    gate = (norm.gate_source[norm.gate] + norm.time_T6E[:, norm.gate])[None, :, None]
    return add_gated(x_QE[None], product.value[None], gate)[0]


def norm_codes_plain(x_QE: Tensor, product: Product | None, norm: Norm, eps: float) -> tuple[Tensor, Codes]:
    """The same with codes of the rows; rounded where the kernel rounds."""
    frames = norm.time_T6E.shape[0]

    def modulation(of_6E: Tensor, place: int) -> Tensor:
        one_T1E = (of_6E[place].float() + norm.time_T6E[:, place].float())[:, None]
        return one_T1E.expand(-1, len(x_QE) // frames, -1).flatten(0, 1)

    if product is not None:
        more = product.in_float32()
        more = more if norm.gate < 0 else more * modulation(norm.gate_source, norm.gate)
        x_QE = (x_QE.float() + more).to(x_QE.dtype)
    h = F.layer_norm(x_QE.float(), (x_QE.shape[-1],), None, None, eps)
    if norm.weight_E is not None and norm.bias_E is not None:
        return x_QE, encode_rows(h * norm.weight_E.float() + norm.bias_E.float())
    factor, shift = (modulation(norm.modulation_6E, norm.shift + more) for more in (1, 0))
    return x_QE, encode_rows(h * (1 + factor) + shift)


# Operations of their own, so that compiling leaves them whole: on a GPU each is one kernel, whose arguments are these.


@torch.library.custom_op("longtake::norm_rows", mutates_args=())
def _norm_rows(
    x_QE: Tensor, modulation_6E: Tensor, time_T6E: Tensor, gate: int, shift: int,
    weight_E: Tensor | None, bias_E: Tensor | None, gate_6E: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    from workers.model import fused_norms

    norm = Norm(modulation_6E, time_T6E, gate, shift, weight_E, bias_E, gate_6E)
    return fused_norms.norm_rows(x_QE, None, norm, eps)[1]


@torch.library.custom_op("longtake::add_norm_rows", mutates_args=())
def _add_norm_rows(
    x_QE: Tensor, sum_QE: Tensor, scale_Q1: Tensor | None, scale_1E: Tensor | None, sum_bias_E: Tensor | None,
    modulation_6E: Tensor, time_T6E: Tensor, gate: int, shift: int, weight_E: Tensor | None, bias_E: Tensor | None,
    gate_6E: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from workers.model import fused_norms

    norm = Norm(modulation_6E, time_T6E, gate, shift, weight_E, bias_E, gate_6E)
    return fused_norms.norm_rows(x_QE, Product(sum_QE, scale_Q1, scale_1E, sum_bias_E), norm, eps)


@torch.library.custom_op("longtake::add_product", mutates_args=())
def _add_product(
    x_QE: Tensor, sum_QE: Tensor, scale_Q1: Tensor | None, scale_1E: Tensor | None, sum_bias_E: Tensor | None,
    gate_6E: Tensor, time_T6E: Tensor, gate: int,
) -> Tensor:  # fmt: skip
    from workers.model import fused_norms

    product = Product(sum_QE, scale_Q1, scale_1E, sum_bias_E)
    return fused_norms.add_product(x_QE, product, Norm(gate_6E, time_T6E, gate))


@torch.library.custom_op("longtake::norm_codes", mutates_args=())
def _norm_codes(
    x_QE: Tensor, modulation_6E: Tensor, time_T6E: Tensor, gate: int, shift: int,
    weight_E: Tensor | None, bias_E: Tensor | None, gate_6E: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    norm = Norm(modulation_6E, time_T6E, gate, shift, weight_E, bias_E, gate_6E)
    return _codes_by_norm(x_QE, None, norm, eps)[1:]


@torch.library.custom_op("longtake::add_norm_codes", mutates_args=())
def _add_norm_codes(
    x_QE: Tensor, sum_QE: Tensor, scale_Q1: Tensor | None, scale_1E: Tensor | None, sum_bias_E: Tensor | None,
    modulation_6E: Tensor, time_T6E: Tensor, gate: int, shift: int, weight_E: Tensor | None, bias_E: Tensor | None,
    gate_6E: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    norm = Norm(modulation_6E, time_T6E, gate, shift, weight_E, bias_E, gate_6E)
    return _codes_by_norm(x_QE, Product(sum_QE, scale_Q1, scale_1E, sum_bias_E), norm, eps)


def _codes_by_norm(x_QE: Tensor, product: Product | None, norm: Norm, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if not has_products(x_QE.device):
        x_QE, codes = norm_codes_plain(x_QE, product, norm, eps)
        return x_QE, *codes
    from workers.model import fused_norms

    return fused_norms.norm_codes(x_QE, product, norm, eps)


@_norm_rows.register_fake
def _(x_QE: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_QE)


@_add_norm_rows.register_fake
def _(x_QE: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_QE), torch.empty_like(x_QE)


@_add_product.register_fake
def _(x_QE: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_QE)


@_norm_codes.register_fake
def _(x_QE: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return room_for_codes(x_QE, x_QE.shape[1])


@_add_norm_codes.register_fake
def _(x_QE: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_QE), *room_for_codes(x_QE, x_QE.shape[1])

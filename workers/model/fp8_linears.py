"""Linear layers in 8-bit floats (e4m3): a scale for each row of the inputs and for each output of the weights.

The product is one of codes alone, by the library's kernel that knows no vectors of scales, which is its fastest; scales
and bias are applied by what reads the result anyway. Codes of inputs are written by what makes the inputs, codes of a
weight before each product: the weight itself stays, for calls that do not round, and codes of all layers beside them
would take half as much again. Where a device has no such products, codes are multiplied in the model's own dtype: the
same rounding of inputs and weights.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Fp8Linears = Literal["none", "ffn", "large", "all"]
"""Which products run in 8-bit floats: those of the feed-forward; also of queries, keys and values; or every one."""
PRODUCTS_FROM = (8, 9)
"""Compute capability that has products of 8-bit floats."""
_MAX = 448.0
"""Largest number of torch.float8_e4m3fn."""
_MULTIPLE = 16
"""What inputs and outputs of such a product are multiples of; so are the sizes of every backbone."""


class LinearWeights(NamedTuple):
    """One linear layer."""

    weight_OI: Tensor
    bias_O: Tensor
    scale_1O: Tensor | None = None
    """Where the product is one of codes: what the weight's are times, for each output, float32."""
    one: Tensor | None = None
    """Where that is one of 8-bit floats: the one scale of a product that knows no others, float32; None: it applies
    all."""


class Codes(NamedTuple):
    """Inputs of a product: float8_e4m3fn, and what the codes of a row are times (float32)."""

    code_QI: Tensor
    scale_Q1: Tensor


class Product(NamedTuple):
    """A linear layer's result, or, with scales, what becomes it by `value`."""

    sum_QO: Tensor
    scale_Q1: Tensor | None = None
    scale_1O: Tensor | None = None
    bias_O: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The result [Q, O], scales and bias applied; dtype of the sum."""
        return self.sum_QO if self.scale_Q1 is None else self.in_float32().to(self.sum_QO.dtype)

    def in_float32(self) -> Tensor:
        """The same, not rounded."""
        value = self.sum_QO.float()
        if self.scale_Q1 is None or self.scale_1O is None or self.bias_O is None:
            return value
        return value * (self.scale_Q1 * self.scale_1O) + self.bias_O.float()


class Fp8Way(NamedTuple):
    """How products and codes are computed: by the best that was measured, unless a bench asks for other."""

    vectors: tuple[str, ...] = ()
    """Products (fields of `LayerWeights`) that apply scales and bias themselves; for the others what follows does."""
    kernels: bool = True
    """Codes are written by kernels of our own on a GPU, and so are norms (`add_norm.py`); else by what the compiler
    makes of the plain forms."""

    def gelu_codes(self, product: Product) -> Codes:
        """See `gelu_codes_plain`."""
        return Codes(*_gelu_codes(*product)) if self.kernels else gelu_codes_plain(product)

    def row_codes(self, h_QND: Tensor) -> Codes:
        """See `row_codes_plain`."""
        return Codes(*_row_codes(h_QND)) if self.kernels else row_codes_plain(h_QND)


def has_products(device: torch.device) -> bool:
    """Whether the device multiplies 8-bit floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= PRODUCTS_FROM


def quantise(linear: LinearWeights, *, vectors: bool = False) -> LinearWeights:
    """The same layer, its product one of codes, each output with a scale of its own.

    Args:
        linear: One layer.
        vectors: Its product applies scales and bias, where that writes bfloat16, the one dtype that it can.
    """
    weight = linear.weight_OI
    assert all(size % _MULTIPLE == 0 for size in weight.shape), weight.shape
    scale_1O = _row_scale(weight).t().contiguous()
    applies = vectors and weight.dtype == torch.bfloat16
    return LinearWeights(weight, linear.bias_O, scale_1O, None if applies else torch.ones((), device=weight.device))


def multiply(linear: LinearWeights, x_QI: Tensor | Codes) -> Product:
    """The product, of codes where the inputs are codes."""
    weight, bias, scale_1O, one = linear
    if isinstance(x_QI, Tensor):
        assert scale_1O is None
        return Product(F.linear(x_QI, weight, bias))
    assert scale_1O is not None
    code, scale_Q1 = x_QI
    kind, weight = bias.dtype, _weight_codes(weight, scale_1O)
    if not has_products(code.device):
        return Product(F.linear(code.to(kind), weight.to(kind)), scale_Q1, scale_1O, bias)
    if one is None:
        return Product(
            torch._scaled_mm(code, weight.t(), scale_Q1, scale_1O, bias, out_dtype=kind, use_fast_accum=True)
        )
    # A sum of 8960 squares of 448 is below 2^31: bfloat16 has float32's exponents, so nothing overflows.
    sums = torch._scaled_mm(code, weight.t(), one, one, out_dtype=kind, use_fast_accum=True)
    return Product(sums, scale_Q1, scale_1O, bias)


def encode_rows(x_QI: Tensor) -> Codes:
    """Codes of rows, of any dtype."""
    scale_Q1 = _row_scale(x_QI)
    return Codes((x_QI.float() / scale_Q1).to(torch.float8_e4m3fn), scale_Q1)


def _row_scale(x_QI: Tensor) -> Tensor:
    """[Q, 1], float32: the largest magnitude of a row gets the largest code."""
    return x_QI.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / _MAX


def weight_codes_plain(weight_OI: Tensor, scale_1O: Tensor) -> Tensor:
    """Codes of a weight, float8_e4m3fn [O, I], by scales that are known."""
    return (weight_OI.float() / scale_1O.t()).to(torch.float8_e4m3fn)


def gelu_codes_plain(product: Product) -> Codes:
    """GELU by tanh of a product's value, encoded."""
    return encode_rows(F.gelu(product.in_float32(), approximate="tanh"))


def row_codes_plain(h_QND: Tensor) -> Codes:
    """All heads of a token side by side, encoded."""
    return encode_rows(h_QND.flatten(1))


# Operations of their own, so that compiling leaves them whole: on a GPU each is one kernel, whose arguments are these.


@torch.library.custom_op("longtake::gelu_codes", mutates_args=())
def _gelu_codes(
    sum_QO: Tensor, scale_Q1: Tensor | None, scale_1O: Tensor | None, bias_O: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not has_products(sum_QO.device):
        return gelu_codes_plain(Product(sum_QO, scale_Q1, scale_1O, bias_O))
    from workers.model import fused_codes

    return fused_codes.gelu_codes(Product(sum_QO, scale_Q1, scale_1O, bias_O))


@torch.library.custom_op("longtake::row_codes", mutates_args=())
def _row_codes(h_QND: Tensor) -> tuple[Tensor, Tensor]:
    if not has_products(h_QND.device):
        return row_codes_plain(h_QND)
    from workers.model import fused_codes

    return fused_codes.row_codes(h_QND)


@torch.library.custom_op("longtake::weight_codes", mutates_args=())
def _weight_codes(weight_OI: Tensor, scale_1O: Tensor) -> Tensor:
    if not has_products(weight_OI.device):
        return weight_codes_plain(weight_OI, scale_1O)
    from workers.model import fused_codes

    return fused_codes.weight_codes(weight_OI, scale_1O)


def room_for_codes(like: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Of as many rows: codes and scales, to be filled."""
    code = like.new_empty(like.shape[0], width, dtype=torch.float8_e4m3fn)
    return code, like.new_empty(like.shape[0], 1, dtype=torch.float32)


@_gelu_codes.register_fake
def _(sum_QO: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return room_for_codes(sum_QO, sum_QO.shape[1])


@_weight_codes.register_fake
def _(weight_OI: Tensor, scale_1O: Tensor) -> Tensor:
    return torch.empty_like(weight_OI, dtype=torch.float8_e4m3fn)


@_row_codes.register_fake
def _(h_QND: Tensor) -> tuple[Tensor, Tensor]:
    return room_for_codes(h_QND, h_QND.shape[1] * h_QND.shape[2])

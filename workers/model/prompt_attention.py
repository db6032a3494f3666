"""Cross-attention to the prompt in static layers: its keys as they read them, and the attention itself.

Everything from the product that makes queries to what the next linear layer takes is one operation: the norm over all
heads, logits, softmax, sum. On a GPU kernels of our own do it (`fused_prompt.py`), elsewhere the plain form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import PromptKeys
from workers.model.fp8_linears import Product


class PromptTable(NamedTuple):
    """Cross-attention keys of one layer, heads outside, filled up to a round number of rows with ones of no weight."""

    k_NPD: Tensor
    v_NPD: Tensor
    log_mass_P: Tensor
    """float32."""


PromptAttention = Callable[[Product, Tensor, PromptTable, float], Tensor]
"""(product of the queries, norm_E, prompt, eps) -> out_QND."""


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


def attend_prompt(product: Product, norm_E: Tensor, prompt: PromptTable, eps: float) -> Tensor:
    """What the prompt gives each token.

    Args:
        product: Of queries before their norm, [Q, E].
        norm_E: Weight of their RMSNorm, which is over all heads.
        prompt: Keys and values; at least one row has a weight.
        eps: Of the norm.
    Returns:
        [Q, N, D], contiguous; dtype of the product.
    """
    return cast(Tensor, _attend_prompt(*product, norm_E, *prompt, eps))


def attend_prompt_plain(product: Product, norm_E: Tensor, prompt: PromptTable, eps: float) -> Tensor:
    """The reference; heads outside in memory. Plain products: a prompt is one or two tiles long, its padding folded."""
    heads, _, dim = prompt.k_NPD.shape
    q_QE = product.value
    q_QE = F.rms_norm(q_QE, (q_QE.shape[-1],), None, eps) * norm_E
    q_NQD = q_QE.unflatten(-1, (heads, dim)).transpose(0, 1)
    logit = torch.bmm(q_NQD, prompt.k_NPD.mT).float() / math.sqrt(dim) + prompt.log_mass_P
    out_NQD = torch.bmm(logit.softmax(-1).to(q_QE.dtype), prompt.v_NPD)
    return out_NQD.transpose(0, 1)


def has_kernel(x_QE: Tensor, head_dim: int) -> bool:
    """Whether kernels of our own attend: they take heads of 16 to 128 channels, a power of two."""
    return x_QE.is_cuda and x_QE.dtype in (torch.bfloat16, torch.float32) and head_dim in (16, 32, 64, 128)


@torch.library.custom_op("longtake::attend_prompt", mutates_args=())
def _attend_prompt(
    sum_QE: Tensor, scale_Q1: Tensor | None, scale_1E: Tensor | None, bias_E: Tensor | None, norm_E: Tensor,
    k_NPD: Tensor, v_NPD: Tensor, log_mass_P: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """An operation of its own, so that compiling leaves it whole."""
    product, prompt = Product(sum_QE, scale_Q1, scale_1E, bias_E), PromptTable(k_NPD, v_NPD, log_mass_P)
    if not has_kernel(sum_QE, k_NPD.shape[2]):
        return attend_prompt_plain(product, norm_E, prompt, eps).contiguous()
    from workers.model import fused_prompt

    return fused_prompt.attend_prompt(product, norm_E, prompt, eps)


@_attend_prompt.register_fake
def _(
    sum_QE: Tensor, scale_Q1: Tensor | None, scale_1E: Tensor | None, bias_E: Tensor | None, norm_E: Tensor,
    k_NPD: Tensor, v_NPD: Tensor, log_mass_P: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    return sum_QE.new_empty(sum_QE.shape[0], k_NPD.shape[0], k_NPD.shape[2])

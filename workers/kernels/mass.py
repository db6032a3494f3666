"""log m, the logit that a key gets for standing for m equal ones, through a dense kernel: four ways, all exact.

- `through_bias`: the kernel adds log m to the logits itself.
- `through_channels`: two more channels of query and key carry log m; for kernels that know no bias.
- `through_column`: one more channel of the values carries m; the softmax knows nothing of it.
- `through_classes`: keys of one m are a set of their own; the sets are merged by their log-sum-exp.

A key with log m = -inf does not exist. Measured with `python -m tests.bench.kernels`: on a CPU the bias costs least.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import KeyValues
from workers.kernels.lse import merge

_NO_KEY = -(2.0**17)
"""In place of -inf in a channel: a kernel multiplies it, and 0 times -inf would spoil the row. Far below any logit, and
not farther: kernels subtract the highest logit of a tile in fused steps, and where a tile holds no key what they round
off must still be small (with -1e30 FlashAttention-4 gives NaN)."""


class AttendScaled(Protocol):
    """A dense kernel with its scale open."""

    def __call__(self, q_BQND: Tensor, keys: KeyValues, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """out_BQND and lse_BQN; the scale is one over the root of the head dimension unless given."""
        ...


class Route(Protocol):
    """A way for log m through a kernel."""

    def __call__(self, attend: AttendScaled, q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
        """Attention with log m; keys without any are attended as they are."""
        ...


class WidenedKeys(NamedTuple):
    """Queries and keys whose last channels carry log m; values as they were."""

    q_BQND: Tensor
    k_BKND: Tensor
    scale: float


def through_bias(attend: AttendScaled, q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
    """For kernels that take log m."""
    return attend(q_BQND, keys)


def through_channels(attend: AttendScaled, q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
    """For kernels without a bias; values are widened by zeros, since many kernels want one head dimension."""
    if keys.log_mass_BNK is None:
        return attend(q_BQND, keys)
    head_dim = q_BQND.shape[-1]
    wide = widen(q_BQND, keys.k_BKND, keys.log_mass_BNK)
    v_BKND = F.pad(keys.v_BKND, (0, wide.k_BKND.shape[-1] - head_dim))
    out, lse_BQN = attend(wide.q_BQND, KeyValues(wide.k_BKND, v_BKND, keys.position_K3), wide.scale)
    return clear_rows_without_keys(out[..., :head_dim], lse_BQN, wide.scale)


def widen(q_BQND: Tensor, k_BKND: Tensor, log_mass_BNK: Tensor, channels: int = 16) -> WidenedKeys:
    """q' = [q, 1, 1, 0...], k' = [k, hi, lo, 0...] with (hi + lo) scale = log m.

    Args:
        q_BQND, k_BKND: Of one dtype.
        log_mass_BNK: Split in two numbers of that dtype: what bfloat16 rounds off the first stands in the second.
        channels: Added in all. FlashAttention-4 on an H100 is faster with 128 + 16 channels than with 128 + 8.
    """
    head_dim, dtype = q_BQND.shape[-1], q_BQND.dtype
    scale = 1.0 / math.sqrt(head_dim)
    wanted_BKN = (log_mass_BNK.transpose(1, 2) / scale).clamp(min=_no_key(dtype))
    high = wanted_BKN.to(dtype)
    low = (wanted_BKN - high.to(wanted_BKN.dtype)).masked_fill(log_mass_BNK.transpose(1, 2).isneginf(), 0.0).to(dtype)
    k_wide = F.pad(k_BKND.to(dtype), (0, channels))
    k_wide[..., head_dim], k_wide[..., head_dim + 1] = high, low
    q_wide = F.pad(q_BQND, (0, channels))
    q_wide[..., head_dim : head_dim + 2] = 1.0
    return WidenedKeys(q_wide, k_wide, scale)


def _no_key(dtype: torch.dtype) -> float:
    """float16 reaches only to -65504; a quarter of that, scaled, is still below any logit that a model has."""
    return max(_NO_KEY, torch.finfo(dtype).min / 4)


def clear_rows_without_keys(out_BQND: Tensor, lse_BQN: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """0 and -inf for queries that saw only keys which do not exist; the channels hold a finite number for those."""
    empty_BQN = lse_BQN < _no_key(out_BQND.dtype) * scale / 2
    return out_BQND.masked_fill(empty_BQN[..., None], 0.0), lse_BQN.masked_fill(empty_BQN, -torch.inf)


def through_column(attend: AttendScaled, q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
    """V' = [m v, m]: plain attention over it, divided by its last column.

    In bfloat16 m v is rounded once more, and a query whose plain softmax lies on keys that do not exist loses digits.
    """
    if keys.log_mass_BNK is None:
        return attend(q_BQND, keys)
    head_dim = q_BQND.shape[-1]
    mass_BKN1 = keys.log_mass_BNK.exp().transpose(1, 2)[..., None].to(q_BQND.dtype)
    v_wide = F.pad(torch.cat([keys.v_BKND.to(q_BQND.dtype) * mass_BKN1, mass_BKN1], -1), (0, 7))
    q_wide, k_wide = (F.pad(x, (0, 8)) for x in (q_BQND, keys.k_BKND))
    out, lse_BQN = attend(q_wide, KeyValues(k_wide, v_wide, keys.position_K3), 1.0 / math.sqrt(head_dim))
    share_BQN1 = out[..., head_dim : head_dim + 1]
    out_BQND = (out[..., :head_dim] / share_BQN1).masked_fill(share_BQN1 == 0, 0.0)
    return out_BQND, lse_BQN + share_BQN1[..., 0].to(lse_BQN.dtype).log()


def through_classes(attend: AttendScaled, q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
    """Keys of one m in one head attended by themselves, log m added to the log-sum-exp, and all merged.

    Heads with equally many keys of a class share a call. Waits for the device; worth it where m takes few values.
    """
    if keys.log_mass_BNK is None:
        return attend(q_BQND, keys)
    batch, num_queries, heads, head_dim = q_BQND.shape
    q_RQ1D = q_BQND.transpose(1, 2).reshape(batch * heads, num_queries, 1, head_dim)
    k_RKD, v_RKD = (x.transpose(1, 2).reshape(batch * heads, -1, head_dim) for x in (keys.k_BKND, keys.v_BKND))
    mass_RK = keys.log_mass_BNK.flatten(0, 1)
    lse_type = torch.float64 if q_BQND.dtype == torch.float64 else torch.float32
    out_RQ1D = torch.zeros_like(q_RQ1D, dtype=lse_type)  # not rounded again with each class
    lse_RQ1 = torch.full(q_RQ1D.shape[:-1], -torch.inf, dtype=lse_type, device=q_BQND.device)
    for log_mass in mass_RK[~mass_RK.isneginf()].unique():
        of_class_RK = mass_RK == log_mass
        counts_R = of_class_RK.sum(-1)
        for count in counts_R[counts_R > 0].unique().tolist():
            row_S = (counts_R == count).nonzero()[:, 0]
            index_SL1 = of_class_RK[row_S].nonzero()[:, 1].view(len(row_S), count, 1).expand(-1, -1, head_dim)
            k, v = (x[row_S].gather(1, index_SL1)[:, :, None] for x in (k_RKD, v_RKD))
            out, lse = attend(q_RQ1D[row_S], KeyValues(k, v, keys.position_K3.new_zeros(count, 3)))
            merged = merge(out_RQ1D[row_S], lse_RQ1[row_S], out.to(lse_type), lse + log_mass.to(lse_type))
            out_RQ1D[row_S], lse_RQ1[row_S] = merged
    back = (batch, heads, num_queries)
    out_BNQD = out_RQ1D.to(q_BQND.dtype).view(*back, head_dim)
    return out_BNQD.transpose(1, 2), lse_RQ1.view(back).transpose(1, 2)


ROUTES: dict[str, Route] = {
    "bias": through_bias,
    "channels": through_channels,
    "column": through_column,
    "classes": through_classes,
}

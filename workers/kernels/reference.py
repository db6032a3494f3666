"""Attention as its definition reads, in float32 (float64 for float64 inputs): slow, and what all others must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.contracts import Attended, KernelPart, KeyValues, TiledKeys


class ReferenceKernel:
    """One softmax over the keys of all parts."""

    @property
    def version(self) -> str:
        return f"reference (torch {torch.__version__})"

    def attend(
        self, q_BQND: Tensor, parts: tuple[KernelPart, ...], scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if q_BQND.dtype == torch.float64 else torch.float32
        q = q_BQND.to(dtype) * (scale or 1.0 / math.sqrt(q_BQND.shape[-1]))
        logits, values = [], []
        done = [part for part in parts if isinstance(part, Attended)]
        for whole in (part for part in parts if not isinstance(part, Attended)):
            part, tiles = whole if isinstance(whole, TiledKeys) else (whole, None)
            logit_BNQK = torch.einsum("bqnd,bknd->bnqk", q, part.k_BKND.to(dtype))
            if part.log_mass_BNK is not None:
                logit_BNQK = logit_BNQK + part.log_mass_BNK.to(dtype)[:, :, None, :]
            if tiles is not None:
                hidden = ~tiles.mask(q.shape[1], part.num_tokens)
                logit_BNQK = logit_BNQK.masked_fill(hidden, -math.inf)
            logits.append(logit_BNQK)
            values.append(part.v_BKND.to(dtype))
        logits += [part.lse_BQN.to(dtype).transpose(1, 2)[..., None] for part in done]
        logit_BNQK = torch.cat(logits, dim=-1)
        lse_BNQ = logit_BNQK.logsumexp(-1)
        # A query that sees nothing has lse -inf and the result 0.
        weight_BNQK = torch.exp(logit_BNQK - lse_BNQ.masked_fill(lse_BNQ.isneginf(), 0.0)[..., None])
        num_keys = sum(value.shape[1] for value in values)
        value_BKND = torch.cat(values, dim=1) if values else q.new_zeros(q.shape[0], 0, *q.shape[2:])
        out_BQND = torch.einsum("bnqk,bknd->bqnd", weight_BNQK[..., :num_keys], value_BKND)
        for known, weight_BNQ in zip(done, weight_BNQK[..., num_keys:].unbind(-1), strict=True):
            out_BQND = out_BQND + weight_BNQ.transpose(1, 2)[..., None] * known.out_BQND.to(dtype)
        return out_BQND.to(q_BQND.dtype), lse_BNQ.transpose(1, 2)


def attend_reference(q_BQND: Tensor, keys: KeyValues, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """The reference over one set of keys."""
    return ReferenceKernel().attend(q_BQND, (keys,), scale)

"""Attention as its definition reads, in float32 (float64 for float64 inputs): slow, and what all others must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.contracts import KeyValues


class ReferenceKernel:
    """One softmax over the keys of all parts."""

    @property
    def version(self) -> str:
        return f"reference (torch {torch.__version__})"

    def attend(self, q_BQND: Tensor, parts: tuple[KeyValues, ...]) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if q_BQND.dtype == torch.float64 else torch.float32
        q = q_BQND.to(dtype) / math.sqrt(q_BQND.shape[-1])
        logits = []
        for part in parts:
            logit_BNQK = torch.einsum("bqnd,bknd->bnqk", q, part.k_BKND.to(dtype))
            if part.log_mass_BNK is not None:
                logit_BNQK = logit_BNQK + part.log_mass_BNK.to(dtype)[:, :, None, :]
            logits.append(logit_BNQK)
        logit_BNQK = torch.cat(logits, dim=-1)
        v_BKND = torch.cat([part.v_BKND.to(dtype) for part in parts], dim=1)
        out_BQND = torch.einsum("bnqk,bknd->bqnd", logit_BNQK.softmax(-1), v_BKND)
        return out_BQND.to(q_BQND.dtype), logit_BNQK.logsumexp(-1).transpose(1, 2)

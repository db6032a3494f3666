"""Attention over 8-bit codes: the reference is that over the keys they stand for, whichever way these are written."""

import math

import torch

from tests.tables import code_table, draw_listed
from workers.kernels.listed_codes import attend_codes_plain
from workers.kernels.listed_tiles import attend_listed_plain

DIM, TILE = 24, 16


def test_codes_give_what_the_keys_they_stand_for_give() -> None:
    q, k, v, index = draw_listed((37, 2, DIM), TILE, 7, 3, most_mass=4 * math.sqrt(DIM), empty=slice(TILE, TILE + 9))
    keys = code_table(k, v)
    k[..., :DIM] = keys.k_NLD * keys.k_scale_NL[..., None].float()
    v = keys.v_NLD * keys.v_scale_NL[..., None].float()
    found, lse = attend_codes_plain(q[..., :DIM], keys, index, TILE)
    torch.testing.assert_close(found, attend_listed_plain(q, k, v, index, TILE), rtol=1e-4, atol=1e-5)
    # Of a tile that is seen alone the log-sum-exp is that of its logits.
    first = torch.zeros_like(index[..., :1])
    _, one = attend_codes_plain(q[..., :DIM], keys, first, TILE)
    logit = torch.einsum("qnd,nkd->nqk", q, k[:, :TILE]) / math.sqrt(DIM)
    torch.testing.assert_close(one, logit.logsumexp(-1).T, rtol=1e-4, atol=1e-4)
    assert lse.shape == (37, 2)

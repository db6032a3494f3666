"""torch's fused kernels on CUDA against softmax in float64: every path that `sdpa.py` may take there."""

import math

import pytest
import torch

from workers.contracts import KeyValues
from workers.kernels.sdpa import SdpaKernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# One rounding of the weights and one of the result: 2^-8 in bfloat16, 2^-11 in float16; float32 is summed as it is.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_keys(num_keys: int, head_dim: int, dtype: torch.dtype, *, with_mass: bool) -> KeyValues:
    k, v = torch.randn(2, 2, num_keys, 3, head_dim, device="cuda").to(dtype).unbind(0)
    mass = torch.rand(2, 3, num_keys, device="cuda") * 4 if with_mass else None
    return KeyValues(k, v, torch.zeros(num_keys, 3, device="cuda"), mass)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 128])
@pytest.mark.parametrize("with_mass", [False, True])
@pytest.mark.parametrize("num_keys", [(1,), (257,), (128, 64, 33)])
def test_equals_softmax_over_the_union(
    dtype: torch.dtype, head_dim: int, with_mass: bool, num_keys: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 190, 3, head_dim, device="cuda").to(dtype)
    parts = tuple(make_keys(n, head_dim, dtype, with_mass=with_mass) for n in num_keys)
    out, lse = SdpaKernel().attend(q, parts)
    k = torch.cat([p.k_BKND.double() for p in parts], 1)
    v = torch.cat([p.v_BKND.double() for p in parts], 1)
    logits = (q.double().transpose(1, 2) @ k.permute(0, 2, 3, 1)) / math.sqrt(head_dim)
    if with_mass:
        logits = logits + torch.cat([p.log_mass_BNK for p in parts if p.log_mass_BNK is not None], -1)[:, :, None]
    expected = (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)
    lse_tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1).transpose(1, 2), atol=lse_tolerance, rtol=0)

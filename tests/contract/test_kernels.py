"""One class of tests for every Kernel, against softmax written out in float64."""

import math
from collections.abc import Callable

import pytest
import torch

from workers.contracts import Kernel, KeyValues
from workers.kernels.flex import FlexKernel
from workers.kernels.lse import merge
from workers.kernels.reference import ReferenceKernel
from workers.kernels.sdpa import SdpaKernel

KERNELS: dict[str, Callable[[], Kernel]] = {
    "reference": ReferenceKernel,
    "sdpa": SdpaKernel,
    "flex": lambda: FlexKernel(compiled=False),
}
HEADS, HEAD_DIM = 3, 40


def make_keys(num_keys: int, *, with_mass: bool = False, dtype: torch.dtype = torch.float32) -> KeyValues:
    k, v = torch.randn(2, 2, num_keys, HEADS, HEAD_DIM).to(dtype).unbind(0)
    mass = torch.rand(2, HEADS, num_keys) * 4 if with_mass else None
    return KeyValues(k, v, torch.zeros(num_keys, 3), mass)


def attend_by_hand(q: torch.Tensor, parts: tuple[KeyValues, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    k = torch.cat([p.k_BKND.double() for p in parts], 1)
    v = torch.cat([p.v_BKND.double() for p in parts], 1)
    none = [torch.zeros(2, HEADS, p.num_tokens) if p.log_mass_BNK is None else p.log_mass_BNK for p in parts]
    logits = (q.double().transpose(1, 2) @ k.permute(0, 2, 3, 1)) / math.sqrt(HEAD_DIM)
    logits = logits + torch.cat(none, -1).double()[:, :, None]
    out = logits.softmax(-1) @ v.transpose(1, 2)
    return out.transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)


@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS.keys())
class TestEveryKernel:
    @pytest.mark.parametrize("num_keys", [(1,), (17,), (64,), (130, 12), (5, 1, 33)])
    @pytest.mark.parametrize("with_mass", [False, True])
    def test_equals_softmax_over_the_union(
        self, make: Callable[[], Kernel], num_keys: tuple[int, ...], with_mass: bool
    ) -> None:
        torch.manual_seed(0)
        q = torch.randn(2, 19, HEADS, HEAD_DIM)
        parts = tuple(make_keys(n, with_mass=with_mass and i != 1) for i, n in enumerate(num_keys))
        out, lse = make().attend(q, parts)
        expected_out, expected_lse = attend_by_hand(q, parts)
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert lse.dtype == torch.float32
        torch.testing.assert_close(out.double(), expected_out, atol=2e-6, rtol=0)
        torch.testing.assert_close(lse.double(), expected_lse, atol=5e-6, rtol=0)

    def test_bfloat16_is_accumulated_in_float32(self, make: Callable[[], Kernel]) -> None:
        torch.manual_seed(1)
        q, parts = torch.randn(2, 19, HEADS, HEAD_DIM).bfloat16(), (make_keys(700, dtype=torch.bfloat16),)
        out, _ = make().attend(q, parts)
        expected, _ = attend_by_hand(q, parts)
        # One rounding of the result (2^-9) and one of the weights: more would be accumulation in bfloat16.
        torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=0)

    def test_keys_of_a_narrower_store_are_taken(self, make: Callable[[], Kernel]) -> None:
        torch.manual_seed(2)
        q, parts = torch.randn(2, 19, HEADS, HEAD_DIM), (make_keys(40, dtype=torch.bfloat16), make_keys(7))
        out, _ = make().attend(q, parts)
        torch.testing.assert_close(out.double(), attend_by_hand(q, parts)[0], atol=2e-6, rtol=0)

    def test_says_its_name_and_version(self, make: Callable[[], Kernel]) -> None:
        assert torch.__version__ in make().version


def test_merging_is_associative_and_an_empty_side_counts_for_nothing() -> None:
    torch.manual_seed(3)
    q = torch.randn(2, 5, HEADS, HEAD_DIM, dtype=torch.float64)
    a, b, c = (attend_by_hand(q, (make_keys(n),)) for n in (3, 20, 8))
    left, right = merge(*merge(*a, *b), *c), merge(*a, *merge(*b, *c))
    torch.testing.assert_close(left, right, atol=1e-12, rtol=0)
    nothing = torch.zeros_like(a[0]), torch.full_like(a[1], -torch.inf)
    torch.testing.assert_close(merge(*a, *nothing), a)
    torch.testing.assert_close(merge(*nothing, *a), a)

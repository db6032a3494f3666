"""Keys that stand for m equal ones equal the keys written out, through every way that log m may take."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.contracts import KeyValues
from workers.kernels.mass import ROUTES, AttendScaled, widen
from workers.kernels.reference import attend_reference
from workers.kernels.sdpa import attend_sdpa

BATCH, HEADS, HEAD_DIM = 2, 3, 24
ATTEND: dict[str, AttendScaled] = {"reference": attend_reference, "sdpa": attend_sdpa}


def merged_and_expanded(
    num_keys: int, most: int, dtype: torch.dtype, *, empty: bool
) -> tuple[KeyValues, list[list[tuple[Tensor, Tensor]]]]:
    """Random keys with m from 1 to `most` (0: no key), and for each batch entry and head the keys written out."""
    k, v = torch.randn(2, BATCH, num_keys, HEADS, HEAD_DIM, dtype=torch.float64).to(dtype).unbind(0)
    mass = torch.randint(0 if empty else 1, most + 1, (BATCH, HEADS, num_keys))
    expanded = [
        [tuple(x[b, :, n].double().repeat_interleave(mass[b, n], 0) for x in (k, v)) for n in range(HEADS)]
        for b in range(BATCH)
    ]
    log_mass = mass.to(torch.float64 if dtype == torch.float64 else torch.float32).log()
    return KeyValues(k, v, torch.zeros(num_keys, 3), log_mass), expanded  # type: ignore[return-value]


def attend_expanded(q: Tensor, expanded: list[list[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.zeros(q.shape[:-1], dtype=torch.float64)
    for b, heads in enumerate(expanded):
        for n, (k, v) in enumerate(heads):
            logits = q[b, :, n].double() @ k.T / math.sqrt(HEAD_DIM)
            out[b, :, n], lse[b, :, n] = logits.softmax(-1) @ v, logits.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("attend", ATTEND.values(), ids=ATTEND.keys())
@pytest.mark.parametrize("route", ROUTES)
class TestEveryRoute:
    @settings(max_examples=25, deadline=None)
    @given(num_keys=st.integers(1, 70), most=st.sampled_from([1, 3, 500]), empty=st.booleans(), seed=st.integers(0, 99))
    def test_equals_the_expanded_cache_in_float64(
        self, attend: AttendScaled, route: str, num_keys: int, most: int, empty: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        q = torch.randn(BATCH, 5, HEADS, HEAD_DIM, dtype=torch.float64)
        keys, expanded = merged_and_expanded(num_keys, most, torch.float64, empty=empty)
        out, lse = ROUTES[route](attend, q, keys)
        expected_out, expected_lse = attend_expanded(q, expanded)
        torch.testing.assert_close(out, expected_out, atol=1e-10, rtol=0)
        torch.testing.assert_close(lse, expected_lse, atol=1e-10, rtol=0)

    def test_equals_the_expanded_cache_in_bfloat16(self, attend: AttendScaled, route: str) -> None:
        torch.manual_seed(1)
        q = torch.randn(BATCH, 33, HEADS, HEAD_DIM).bfloat16()
        keys, expanded = merged_and_expanded(300, 200, torch.bfloat16, empty=True)
        out, lse = ROUTES[route](attend, q, keys)
        expected_out, expected_lse = attend_expanded(q, expanded)
        assert out.dtype == torch.bfloat16
        assert lse.dtype == torch.float32
        assert (out.double() - expected_out).norm() < 1e-2 * expected_out.norm()
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-2, rtol=0)

    def test_keys_without_mass_are_attended_as_they_are(self, attend: AttendScaled, route: str) -> None:
        torch.manual_seed(2)
        q = torch.randn(BATCH, 5, HEADS, HEAD_DIM)
        merged, _ = merged_and_expanded(40, 3, torch.float32, empty=False)
        keys = KeyValues(merged.k_BKND, merged.v_BKND, merged.position_K3)
        torch.testing.assert_close(ROUTES[route](attend, q, keys), attend(q, keys), atol=0, rtol=0)

    def test_queries_that_see_no_key_at_all_get_nothing(self, attend: AttendScaled, route: str) -> None:
        torch.manual_seed(3)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q = torch.randn(BATCH, 5, HEADS, HEAD_DIM).to(dtype)
            merged, _ = merged_and_expanded(40, 3, dtype, empty=False)
            nothing = torch.full((BATCH, HEADS, 40), -math.inf)
            keys = KeyValues(merged.k_BKND, merged.v_BKND, merged.position_K3, nothing)
            out, lse = ROUTES[route](attend, q, keys)
            assert out.eq(0).all()
            assert lse.isneginf().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [40, 64, 128])
def test_a_tile_without_keys_rounds_off_next_to_nothing(dtype: torch.dtype, head_dim: int) -> None:
    """A kernel subtracts the highest logit as one fused step of float32, whose two products round apart."""
    zero = torch.zeros(1, 1, 1, head_dim, dtype=dtype)
    wide = widen(zero, zero, torch.full((1, 1, 1), -torch.inf))
    logit = float((wide.q_BQND.double() * wide.k_BKND.double()).sum())
    assert logit * wide.scale < -1000, "below any logit"
    scaled = torch.tensor(logit * wide.scale / math.log(2), dtype=torch.float64)
    assert abs(float(scaled - scaled.float().double())) < 0.01

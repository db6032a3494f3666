"""Every kernel on keys of which a query sees some tiles, against softmax under the mask of `Tiles` in float64."""

import gc
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.contracts import Kernel, KeyValues, TiledKeys, Tiles
from workers.kernels.flex import FlexKernel
from workers.kernels.reference import ReferenceKernel
from workers.kernels.sdpa import SdpaKernel
from workers.kernels.tiled import GroupMemory, attend_tiled

KERNELS: dict[str, Callable[[], Kernel]] = {
    "reference": ReferenceKernel,
    "sdpa": SdpaKernel,
    "flex": lambda: FlexKernel(compiled=False),
}
BATCH, HEADS, HEAD_DIM = 2, 3, 8


def make_part(
    num_queries: int, num_keys: int, tiles: tuple[int, int], *, share: float, mass: bool = False, orders: bool = False
) -> TiledKeys:
    """Random keys in float64 under random tiles; some queries see none."""
    k, v = torch.randn(2, BATCH, num_keys, HEADS, HEAD_DIM, dtype=torch.float64).unbind(0)
    log_mass = None
    if mass:
        log_mass = torch.rand(BATCH, HEADS, num_keys, dtype=torch.float64) * 4
        log_mass = log_mass.masked_fill(torch.rand(BATCH, HEADS, num_keys) < 0.2, -math.inf)
    shape = (BATCH, HEADS, -(-num_queries // tiles[0]), -(-num_keys // tiles[1]))
    q_order = torch.rand(BATCH, HEADS, num_queries).argsort(-1) if orders else None
    k_order = torch.rand(BATCH, HEADS, num_keys).argsort(-1) if orders else None
    keys = KeyValues(k, v, torch.zeros(num_keys, 3), log_mass)
    return TiledKeys(keys, Tiles(torch.rand(shape) < share, *tiles, q_order, k_order))


def attend_by_hand(q_BQND: Tensor, part: TiledKeys) -> tuple[Tensor, Tensor]:
    keys, tiles = part
    logits = torch.einsum("bqnd,bknd->bnqk", q_BQND.double(), keys.k_BKND.double()) / math.sqrt(q_BQND.shape[-1])
    if keys.log_mass_BNK is not None:
        logits = logits + keys.log_mass_BNK[:, :, None]
    logits = logits.masked_fill(~tiles.mask(q_BQND.shape[1], keys.num_tokens), -math.inf)
    out = torch.einsum("bnqk,bknd->bqnd", logits.softmax(-1).nan_to_num(), keys.v_BKND.double())
    return out, logits.logsumexp(-1).transpose(1, 2)


# FlexAttention without a compiler takes seconds for what the others do in milliseconds.
SLOW = {"flex": pytest.mark.slow}


@pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=SLOW.get(name, ())) for name, make in KERNELS.items()]
)
class TestEveryKernel:
    @settings(max_examples=40, deadline=None)
    @given(
        num_queries=st.integers(1, 40),
        num_keys=st.integers(1, 90),
        tiles=st.tuples(st.integers(1, 17), st.integers(1, 20)),
        share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
        mass=st.booleans(),
        orders=st.booleans(),
        seed=st.integers(0, 99),
    )
    def test_equals_softmax_under_the_mask(
        self,
        make: Callable[[], Kernel],
        num_queries: int,
        num_keys: int,
        tiles: tuple[int, int],
        share: float,
        mass: bool,
        orders: bool,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        q = torch.randn(BATCH, num_queries, HEADS, HEAD_DIM, dtype=torch.float64)
        part = make_part(num_queries, num_keys, tiles, share=share, mass=mass, orders=orders)
        out, lse = make().attend(q, (part,))
        expected_out, expected_lse = attend_by_hand(q, part)
        torch.testing.assert_close(out, expected_out, atol=1e-12, rtol=0)
        torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("share", [0.3, 1.0])
    def test_dense_and_tiled_parts_make_one_softmax(self, make: Callable[[], Kernel], share: float) -> None:
        torch.manual_seed(4)
        q = torch.randn(BATCH, 21, HEADS, HEAD_DIM, dtype=torch.float64)
        tiled, other = (make_part(21, n, (8, 16), share=share, mass=True) for n in (100, 64))
        dense = make_part(21, 30, (8, 16), share=1).keys
        out, lse = make().attend(q, (dense, tiled, other))
        expected_out, expected_lse = ReferenceKernel().attend(q, (dense, tiled, other))
        torch.testing.assert_close(out, expected_out, atol=1e-12, rtol=0)
        torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("num_keys", [3, 40])
    def test_a_query_that_is_nan_stays_nan_and_spoils_no_other(self, make: Callable[[], Kernel], num_keys: int) -> None:
        torch.manual_seed(5)
        q = torch.randn(BATCH, 9, HEADS, HEAD_DIM)
        q[0, 4, 1, 2] = math.nan
        part = make_part(9, num_keys, (4, 4), share=1.0)
        for parts in ((part,), (part.keys,), (part, part.keys)):
            out, lse = make().attend(q, parts)
            assert out[0, 4, 1].isnan().all()
            assert lse[0, 4, 1].isnan()
            assert int(lse.isnan().sum()) == 1

    def test_keys_that_are_all_empty_slots_count_for_nothing(self, make: Callable[[], Kernel]) -> None:
        q = torch.randn(BATCH, 9, HEADS, HEAD_DIM)
        part = make_part(9, 40, (4, 4), share=1.0)
        nothing = torch.full((BATCH, HEADS, 40), -math.inf)
        empty = KeyValues(part.keys.k_BKND, part.keys.v_BKND, part.keys.position_K3, nothing)
        for parts in ((empty,), (TiledKeys(empty, part.tiles),), (empty, TiledKeys(empty, part.tiles))):
            out, lse = make().attend(q, parts)
            assert out.eq(0).all()
            assert lse.isneginf().all()
        torch.testing.assert_close(make().attend(q, (empty, part)), make().attend(q, (part,)))


def dense_reference(q_BQND: Tensor, keys: KeyValues) -> tuple[Tensor, Tensor]:
    return ReferenceKernel().attend(q_BQND, (keys,))


def test_gathered_keys_serve_later_steps_and_go_with_their_source() -> None:
    torch.manual_seed(6)
    memory = GroupMemory()
    part = make_part(20, 64, (4, 8), share=0.4)
    q, later = torch.randn(2, BATCH, 20, HEADS, HEAD_DIM, dtype=torch.float64).unbind(0)
    attend_tiled(q, part, dense_reference, memory)
    kept = memory.find(*part, torch.float64)
    again = TiledKeys(part.keys.narrow(0, 64), part.tiles)  # as each step makes its views anew
    assert kept is not None
    assert memory.find(*again, torch.float64) is kept
    assert memory.find(*again, torch.float32) is None
    assert memory.find(*TiledKeys(part.keys.narrow(0, 56), part.tiles), torch.float64) is None
    assert memory.num_bytes > 0
    out, _ = attend_tiled(later, again, dense_reference, memory)
    torch.testing.assert_close(out, attend_by_hand(later, part)[0], atol=1e-12, rtol=0)
    tiles = part.tiles
    del part, again, kept
    gc.collect()
    assert memory.num_bytes == 0, "the keys are gone"
    assert tiles is not None


def test_the_first_tiles_of_what_was_gathered_are_not_gathered_again() -> None:
    torch.manual_seed(8)
    keys, tiles = make_part(20, 61, (4, 8), share=0.5)
    mass = torch.rand(tiles.visible_BNIJ.shape).masked_fill(~tiles.visible_BNIJ, -1.0)
    order = mass.argsort(dim=-1, descending=True)
    part = TiledKeys(keys, replace(tiles, tile_order_BNIJ=order))
    count = (tiles.visible_BNIJ.sum(-1, keepdim=True) * torch.rand(*tiles.visible_BNIJ.shape[:3], 1)).long()
    fewer = torch.zeros_like(tiles.visible_BNIJ).scatter_(-1, order, torch.arange(order.shape[-1]) < count)
    assert 0 < int(fewer.sum()) < int(tiles.visible_BNIJ.sum())
    first = TiledKeys(keys, replace(part.tiles, visible_BNIJ=fewer, tile_order_BNIJ=None, first_of=part.tiles))
    q = torch.randn(BATCH, 20, HEADS, HEAD_DIM, dtype=torch.float64)
    for memory in (GroupMemory(), GroupMemory(0)):  # the second keeps nothing
        for seen in (part, first):
            found = attend_tiled(q, seen, dense_reference, memory)
            for got, want in zip(found, attend_by_hand(q, seen), strict=True):
                torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
        assert memory.find(*first, torch.float64) is None


def test_gathered_keys_go_with_their_tiles() -> None:
    memory = GroupMemory()
    keys, tiles = make_part(20, 64, (4, 8), share=0.4)
    q = torch.randn(BATCH, 20, HEADS, HEAD_DIM, dtype=torch.float64)
    attend_tiled(q, TiledKeys(keys, tiles), dense_reference, memory)
    assert memory.num_bytes > 0
    del tiles
    gc.collect()
    assert memory.num_bytes == 0


def test_no_more_is_kept_than_was_allowed() -> None:
    q = torch.randn(BATCH, 20, HEADS, HEAD_DIM, dtype=torch.float64)
    parts = [make_part(20, 64, (4, 8), share=0.4) for _ in range(4)]
    memory = GroupMemory()
    attend_tiled(q, parts[0], dense_reference, memory)
    room = memory.num_bytes * 5 // 2
    memory = GroupMemory(room)
    for part in parts:
        out, _ = attend_tiled(q, part, dense_reference, memory)
        torch.testing.assert_close(out, attend_by_hand(q, part)[0], atol=1e-12, rtol=0)
    assert 0 < memory.num_bytes <= room
    assert memory.find(*parts[-1], torch.float64) is None


def test_keys_changed_in_place_are_gathered_anew() -> None:
    memory = GroupMemory()
    part = make_part(20, 64, (4, 8), share=0.4)
    q = torch.randn(BATCH, 20, HEADS, HEAD_DIM, dtype=torch.float64)
    attend_tiled(q, part, dense_reference, memory)
    part.keys.v_BKND.mul_(2)
    out, _ = attend_tiled(q, part, dense_reference, memory)
    torch.testing.assert_close(out, attend_by_hand(q, part)[0], atol=1e-12, rtol=0)


def test_buffers_of_one_chunk_serve_the_next_and_never_two_at_once() -> None:
    memory = GroupMemory()
    q = torch.randn(BATCH, 20, HEADS, HEAD_DIM, dtype=torch.float64)
    addresses = []
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        torch.manual_seed(7)  # tiles as before, so that the sizes are
        with mode():
            parts = [make_part(20, 64, (4, 8), share=0.4) for _ in range(3)]
            for _ in range(2):
                for part in parts:
                    out, _ = attend_tiled(q, part, dense_reference, memory)
                    torch.testing.assert_close(out, attend_by_hand(q, part)[0], atol=1e-12, rtol=0)
            kept = [memory.find(*part, torch.float64) for part in parts]
            taken = [x for groups in kept for g in groups or () for x in (g.keys.k_BKND, g.keys.v_BKND)]
            addresses.append({x.untyped_storage().data_ptr() for x in taken})
            assert len(addresses[-1]) == len(taken)
        del parts, part, kept, taken
        gc.collect()
        assert memory.num_bytes == 0
    assert addresses[0] == addresses[1] == addresses[2]

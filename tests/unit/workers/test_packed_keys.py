"""A compressed history that is unpacked as far as it is looked at, against the same history unpacked as a whole."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from workers.attention.ann_self import AnnSelfAttention, AnnSettings
from workers.attention.tile_mass import take_keys
from workers.cache.low_bit import Storage
from workers.cache.temporal_merge import MergeSettings, TemporalCache
from workers.contracts import AttentionPlan, KeyValues, Moment, TiledKeys, Tiles
from workers.kernels.sdpa import SdpaKernel
from workers.model.rope import grid_positions, make_rotation, rotate, rotate_in_place
from workers.packed_keys import PackedKeys
from workers.search.exact import ExactSearch
from workers.search.quant import QuantSearch

HEADS, DIM, FRAME, THETA = 2, 16, 16, 10000.0
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""Of one complex product: its loop over many numbers and that over the last few round differently."""


def fill(storage: Storage, chunks: int = 9) -> TemporalCache:
    """A cache whose groups have merged: a sink of one latent frame, the two newest as they are."""
    cache = TemporalCache(1, MergeSettings(FRAME, 2 * FRAME, 5 * FRAME, 0.9, storage), ExactSearch().top1)
    g = torch.Generator().manual_seed(3)
    k = torch.randn(1, FRAME, HEADS, DIM, generator=g)
    for chunk in range(chunks):
        k = k + 0.4 * torch.randn(k.shape, generator=g)
        cache.append(0, KeyValues(k, torch.randn(k.shape, generator=g), grid_positions(torch.tensor([chunk]), 4, 4)))
    return cache


def plain(keys: KeyValues) -> KeyValues:
    return KeyValues(keys.k_BKND, keys.v_BKND, keys.position_K3, keys.log_mass_BNK)


def turn(keys: KeyValues, in_place: bool) -> KeyValues:
    if in_place:
        rotate_in_place(keys.k_BKND, keys.position_K3, THETA)
        return keys
    k = rotate(keys.k_BKND, make_rotation(keys.position_K3, DIM, THETA))
    return KeyValues(k, keys.v_BKND, keys.position_K3, keys.log_mass_BNK)


def read(storage: Storage) -> PackedKeys:
    keys = fill(storage).read(0)
    assert isinstance(keys, PackedKeys)
    return keys.turned(turn)


def assert_same(found: KeyValues, want: KeyValues) -> None:
    torch.testing.assert_close(found.k_BKND, want.k_BKND, **ROUNDING)
    assert torch.equal(found.v_BKND, want.v_BKND)
    assert torch.equal(found.position_K3, want.position_K3)
    mass = cast(Tensor, want.log_mass_BNK)
    assert torch.equal(torch.zeros_like(mass) if found.log_mass_BNK is None else found.log_mass_BNK, mass)


@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
def test_what_is_taken_equals_what_is_read(storage: Storage) -> None:
    keys = read(storage)
    whole = plain(keys)
    history, groups = keys.narrow(FRAME, keys.num_tokens - 2 * FRAME), keys.pack.packed
    assert isinstance(history, PackedKeys)
    assert history.are_all_packed
    assert history.num_tokens == len(groups)
    row = torch.tensor([1, 0, 1])
    index = torch.randint(len(groups), (3, 11), generator=torch.Generator().manual_seed(1))
    want_k, want_v = (x[0].transpose(0, 1)[row[:, None], index + FRAME] for x in (whole.k_BKND, whole.v_BKND))
    room = torch.empty(3, 11, DIM), torch.empty(3, 11, DIM)
    for taken in (history.take(index, row), history.take(index, row, room)):
        torch.testing.assert_close(taken.k_BKND[:, :, 0], want_k, **ROUNDING)
        assert torch.equal(taken.v_BKND[:, :, 0], want_v)
    assert room[0].data_ptr() == taken.k_BKND.data_ptr()


@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
def test_a_sample_of_packed_keys_equals_that_of_plain_ones(storage: Storage) -> None:
    history = read(storage).narrow(FRAME, 4 * FRAME)
    index = torch.arange(0, 3 * FRAME, 5)
    for of_all in (index, index.expand(1, HEADS, -1)):
        found, want = take_keys(history, of_all), take_keys(plain(history), of_all)
        torch.testing.assert_close(found.k_BKND, want.k_BKND, **ROUNDING)
        assert torch.equal(found.position_K3, want.position_K3)
        assert torch.equal(cast(Tensor, found.log_mass_BNK), cast(Tensor, want.log_mass_BNK))


def test_runs_are_those_of_the_whole() -> None:
    keys = read("int8")
    whole, num = plain(keys), keys.num_tokens
    for start, stop in ((0, num), (0, FRAME), (3, FRAME - 1), (num - FRAME, num), (FRAME - 2, num - 5), (FRAME, num)):
        assert_same(keys.narrow(start, stop), whole.narrow(start, stop))
    across = keys.narrow(FRAME - 2, num)
    assert not cast(PackedKeys, across).are_all_packed
    assert_same(across.narrow(1, 9), whole.narrow(FRAME - 1, FRAME + 7))


def test_what_nobody_compressed_is_not_copied_and_made_once() -> None:
    cache = fill("int8")
    keys = cache.read(0)
    assert keys is not None
    recent = keys.narrow(keys.num_tokens - FRAME, keys.num_tokens)
    assert recent.k_BKND.data_ptr() == keys.narrow(keys.num_tokens - FRAME, keys.num_tokens).k_BKND.data_ptr()
    assert recent is keys.narrow(keys.num_tokens - FRAME, keys.num_tokens)
    history = keys.narrow(FRAME, 4 * FRAME)
    assert history.k_BKND is keys.narrow(FRAME, 4 * FRAME).k_BKND


@pytest.mark.parametrize("start", [FRAME, FRAME - 4])
def test_attention_over_packed_keys_equals_that_over_plain_ones(start: int) -> None:
    keys = read("int8")
    history = keys.narrow(start, keys.num_tokens - 2 * FRAME)
    g = torch.Generator().manual_seed(2)
    q = torch.randn(1, 20, HEADS, DIM, generator=g)
    tiles = Tiles(torch.rand(1, HEADS, 2, -(-history.num_tokens // 8), generator=g) < 0.6, 10, 8)
    with torch.inference_mode():
        kernel = SdpaKernel()
        want = SdpaKernel().attend(q, (TiledKeys(plain(history), tiles),))
        for _ in range(2):  # gathered, and from memory
            for found, expected in zip(kernel.attend(q, (TiledKeys(history, tiles),)), want, strict=True):
                torch.testing.assert_close(found, expected, **ROUNDING)


def assert_same_plan(found: AttentionPlan, want: AttentionPlan) -> None:
    for a, b in zip(found.parts, want.parts, strict=True):
        assert (a.source, a.start, a.stop) == (b.source, b.start, b.stop)
        if a.tiles is not None and b.tiles is not None:
            assert torch.equal(a.tiles.visible_BNIJ, b.tiles.visible_BNIJ)
            assert torch.equal(cast(Tensor, a.tiles.key_order_BNK), cast(Tensor, b.tiles.key_order_BNK))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("every", [0, 5])
def test_what_is_known_of_a_history_still_holds_when_it_grows(every: int, alike: bool) -> None:
    """A policy that goes on chooses as one that sees the history for the first time; keys join now and then or never,
    so that heads hold equally many groups or not."""
    cache = TemporalCache(1, MergeSettings(FRAME, 2 * FRAME, 24 * FRAME, 0.97, "int8"), ExactSearch().top1)
    settings = AnnSettings(FRAME, 2 * FRAME, 0.3, query_tile=FRAME, key_tile=8, sample_share=1 / 4)
    goes_on, g = AnnSelfAttention(settings, QuantSearch(), None), torch.Generator().manual_seed(5)
    k, before, num_alike, num_uneven = torch.randn(1, FRAME, HEADS, DIM, generator=g), None, 0, 0
    for chunk in range(60):
        is_near = every > 0 and chunk % every == 0
        k = k + 0.2 * torch.randn(k.shape, generator=g) if is_near else torch.randn(k.shape, generator=g)
        at = grid_positions(torch.tensor([chunk]), 4, 4)
        own, q = KeyValues(k, k, at), torch.randn(k.shape, generator=g)
        cached = cache.read(0)
        if isinstance(cached, PackedKeys):
            seen = cached.turned(turn, alike)
            want = AnnSelfAttention(settings, QuantSearch(), None).plan(0, Moment(chunk), q, seen, own)
            for _ in range(2):  # the second time nothing has come since
                goes_on.begin_chunk(at)
                assert_same_plan(goes_on.plan(0, Moment(chunk), q, seen, own), want)
            history = cast(PackedKeys, seen.narrow(FRAME, seen.num_tokens - 2 * FRAME))
            if history.lineage is not None and history.lineage == before:
                num_alike += 1
                num_uneven += bool(cast(Tensor, history.log_mass_BNK).isneginf().any())
            before = history.lineage
        cache.append(0, own)
    assert (num_alike > 10) == alike
    assert (num_uneven > 5) == (alike and every > 0)

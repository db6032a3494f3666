"""The algebra of key groups: what is merged, what is counted, what is exact: against softmax over all keys."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.cache.low_bit import Storage, VectorStore
from workers.cache.temporal_merge import MergeSettings, TemporalCache
from workers.contracts import KeyValues
from workers.kernels.reference import ReferenceKernel
from workers.search.exact import ExactSearch

HEADS, DIM, TOKENS = 3, 8, 5  # tokens per latent frame
DENSE = ReferenceKernel()


def make_chunk(generator: torch.Generator, start: int, frames: int = 3, things: int | None = None) -> KeyValues:
    """A chunk of random keys; with `things`, keys are drawn from so many distinct ones (values never are)."""
    num = frames * TOKENS
    k = torch.randn(1, num, HEADS, DIM, generator=generator, dtype=torch.float64)
    if things is not None:
        source = torch.Generator().manual_seed(things)
        table = torch.randn(things, HEADS, DIM, generator=source, dtype=torch.float64)
        k = table[torch.randint(things, (num,), generator=generator)][None]
    v = torch.randn(1, num, HEADS, DIM, generator=generator, dtype=torch.float64)
    time = torch.arange(num) // TOKENS + start
    return KeyValues(k, v, torch.stack((time, torch.arange(num) % TOKENS, 0 * time), 1).float())


def make_cache(**over: Any) -> TemporalCache:
    values: dict[str, Any] = {"sink_tokens": TOKENS, "recent_tokens": 2 * TOKENS, "num_groups": 60, "min_cosine": 0.9}
    return TemporalCache(1, MergeSettings(**(values | {"storage": "model"} | over)), ExactSearch().top1)


def attend(q: torch.Tensor, keys: KeyValues) -> torch.Tensor:
    return DENSE.attend(q, (keys,))[0]


def join(chunks: list[KeyValues]) -> KeyValues:
    k, v = torch.cat([c.k_BKND for c in chunks], 1), torch.cat([c.v_BKND for c in chunks], 1)
    return KeyValues(k, v, torch.cat([c.position_K3 for c in chunks]))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    chunks=st.integers(1, 9),
    things=st.integers(1, 9),
    min_cosine=st.sampled_from([1.1, 1 - 1e-9]),
)
def test_equal_keys_merge_exactly(seed: int, chunks: int, things: int, min_cosine: float) -> None:
    """Lemma 5.1: with equal keys the compressed cache gives what dense attention over all of them gives, whether they
    join a group by themselves or a full table makes them.
    """
    generator = torch.Generator().manual_seed(seed)
    cache, given_chunks = make_cache(min_cosine=min_cosine, num_groups=45), []
    for index in range(chunks):
        given_chunks.append(make_chunk(generator, 3 * index, things=things))
        cache.append(0, given_chunks[-1])
    kept = cache.read(0)
    assert kept is not None
    q = torch.randn(1, 7, HEADS, DIM, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(attend(q, kept), attend(q, join(given_chunks)), atol=1e-10, rtol=0)
    assert kept.num_tokens <= TOKENS + 2 * TOKENS + 45


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), chunks=st.integers(1, 14), slots=st.integers(20, 60), cosine=st.floats(-1, 1.1))
def test_no_key_is_lost_and_the_limit_holds(seed: int, chunks: int, slots: int, cosine: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache = make_cache(num_groups=slots, min_cosine=cosine, track_owners=True)
    for index in range(chunks):
        cache.append(0, make_chunk(generator, 3 * index))
        kept, groups = cache.read(0), cache._layers[0].groups
        owner = cache.owners(0)
        assert kept is not None
        assert owner is not None
        assert owner.shape[-1] == 15 * (index + 1)
        assert int(owner.min()) >= 0
        assert int(owner.max()) < kept.num_tokens
        if groups is not None:
            assert groups.num_used <= slots
            absorbed = 15 * (index + 1) - TOKENS - 2 * TOKENS
            assert groups.m_BNC.sum(-1).unique().tolist() == [absorbed]
            for head in range(HEADS):
                count = torch.bincount(owner[0, head, TOKENS : TOKENS + absorbed] - TOKENS, minlength=groups.num_used)
                assert torch.equal(count.int(), groups.m_BNC[0, head, : groups.num_used])


def check_members(
    cache: TemporalCache, chunks: list[KeyValues], is_key_of: Callable[[torch.Tensor, torch.Tensor], bool]
) -> None:
    """Each entry has key and place of a member, of which `is_key_of` says if it may be that, and the mean value."""
    kept, owner, every = cache.read(0), cache.owners(0), join(chunks)
    assert kept is not None
    assert owner is not None
    assert kept.log_mass_BNK is not None
    for head in range(HEADS):
        for entry in owner[0, head].unique().tolist():
            members = (owner[0, head] == entry).nonzero().flatten()
            same_key = (every.k_BKND[0, members, head] == kept.k_BKND[0, entry, head]).all(-1)
            assert int(same_key.sum()) == 1
            assert is_key_of(every.position_K3[members, 0], same_key)
            assert torch.equal(kept.position_K3[0, entry, head].float(), every.position_K3[members[same_key]][0])
            mean = every.v_BKND[0, members, head].mean(0)
            torch.testing.assert_close(kept.v_BKND[0, entry, head], mean, atol=1e-12, rtol=0)
            assert float(kept.log_mass_BNK[0, head, entry].exp()) == pytest.approx(len(members), rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_key_that_joins_a_group_stands_for_it(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache, chunks = make_cache(num_groups=200, track_owners=True, min_cosine=0.7), []
    for index in range(8):
        chunks.append(make_chunk(generator, 3 * index))
        cache.append(0, chunks[-1])
    check_members(cache, chunks, lambda time, same_key: bool(time[same_key] == time.max()))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(20, 40))
def test_a_full_table_keeps_some_members_key_and_the_mean_value(seed: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache, chunks = make_cache(num_groups=slots, track_owners=True, min_cosine=1.1), []
    for index in range(8):
        chunks.append(make_chunk(generator, 3 * index))
        cache.append(0, chunks[-1])
    check_members(cache, chunks, lambda time, same_key: True)


def totals(cache: TemporalCache, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of these keys and head: how many stand under it, and their mean value."""
    kept = cache.read(0)
    assert kept is not None
    mass = (
        torch.zeros(1, HEADS, kept.num_tokens, dtype=torch.float64) if kept.log_mass_BNK is None else kept.log_mass_BNK
    )
    same = (kept.k_BKND[0, :, None] == keys).all(-1)  # [K, thing, N]
    m = same * mass[0].exp().T[:, None]
    count = m.sum(0)
    return count, torch.einsum("kin,knd->ind", m, kept.v_BKND[0]) / count.clamp(min=1)[..., None]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    things=st.integers(1, 9),
    min_cosine=st.sampled_from([1.1, 1 - 1e-9]),
)
def test_it_does_not_matter_in_which_order_keys_come_together(
    seed: int, cuts: list[int], things: int, min_cosine: float
) -> None:
    """Merging is associative in (m, mean value): however the history is cut, what stands under a key is the same."""
    generator = torch.Generator().manual_seed(seed)
    frames = [make_chunk(generator, index, frames=1, things=things) for index in range(sum(cuts))]
    one_by_one, in_pieces = (make_cache(min_cosine=min_cosine, num_groups=45) for _ in range(2))
    for frame in frames:
        one_by_one.append(0, frame)
    for size in cuts:
        piece, frames = frames[:size], frames[size:]
        in_pieces.append(0, join(piece))
    table = torch.randn(things, HEADS, DIM, generator=torch.Generator().manual_seed(things), dtype=torch.float64)
    (count, mean), (other_count, other_mean) = totals(one_by_one, table), totals(in_pieces, table)
    assert count.sum(0).round().tolist() == [sum(cuts) * TOKENS] * HEADS
    torch.testing.assert_close(other_count, count, atol=1e-9, rtol=0)
    torch.testing.assert_close(other_mean, mean, atol=1e-12, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), num_chunks=st.integers(1, 9), above=st.floats(1e-6, 1.0))
def test_threshold_above_one_with_room_is_dense(seed: int, num_chunks: int, above: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache, chunks = make_cache(num_groups=200, min_cosine=1 + above), []
    for index in range(num_chunks):
        chunks.append(make_chunk(generator, 3 * index))
        cache.append(0, chunks[-1])
    kept = cache.read(0)
    assert kept is not None
    q = torch.randn(1, 9, HEADS, DIM, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(attend(q, kept), attend(q, join(chunks)), atol=1e-10, rtol=0)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    storage=st.sampled_from(["model", "int8", "int4"]),
)
def test_the_order_of_heads_does_not_matter(seed: int, storage: Storage) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(HEADS, generator=generator)
    one, other = (make_cache(num_groups=20, storage=storage) for _ in range(2))
    for index in range(7):
        chunk = make_chunk(generator, 3 * index)
        one.append(0, chunk)
        other.append(0, KeyValues(chunk.k_BKND[:, :, order], chunk.v_BKND[:, :, order], chunk.position_K3))
    a, b = one.read(0), other.read(0)
    assert a is not None
    assert b is not None
    assert a.log_mass_BNK is not None
    assert b.log_mass_BNK is not None
    assert torch.equal(a.k_BKND[:, :, order], b.k_BKND)
    assert torch.equal(a.v_BKND[:, :, order], b.v_BKND)
    assert torch.equal(a.log_mass_BNK[:, order], b.log_mass_BNK)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), storage=st.sampled_from(["model", "int8"]))
def test_takes_side_by_side_remember_what_each_would_alone(seed: int, storage: Storage) -> None:
    generator = torch.Generator().manual_seed(seed)
    both, first, second = (make_cache(num_groups=20, storage=storage) for _ in range(3))
    for index in range(7):
        a, b = make_chunk(generator, 3 * index, things=9), make_chunk(generator, 3 * index)
        k, v = (torch.cat(pair) for pair in ((a.k_BKND, b.k_BKND), (a.v_BKND, b.v_BKND)))
        both.append(0, KeyValues(k, v, a.position_K3))
        first.append(0, a)
        second.append(0, b)
    q = torch.randn(2, 4, HEADS, DIM, dtype=torch.float64, generator=generator)
    together = both.read(0)
    assert together is not None
    for index, alone in enumerate((first.read(0), second.read(0))):
        assert alone is not None
        want = attend(q[index : index + 1], alone)
        error = 1e-5 if storage == "model" else 5e-3  # making room for one rounds the values of the other once more
        torch.testing.assert_close(attend(q, together)[index : index + 1], want, atol=error, rtol=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), pause=st.integers(0, 9), storage=st.sampled_from(["model", "int8", "int4"]))
def test_a_resumed_cache_goes_on_bit_for_bit(seed: int, pause: int, storage: Storage) -> None:
    generator = torch.Generator().manual_seed(seed)
    chunks = [make_chunk(generator, 3 * index) for index in range(10)]
    unbroken, resumed = (make_cache(num_groups=22, storage=storage, audit_tokens=11) for _ in range(2))
    for chunk in chunks[:pause]:
        unbroken.append(0, chunk)
    resumed.append(0, chunks[5])  # what was there before does not matter
    resumed.restore({name: tensor.clone() for name, tensor in unbroken.state().items()})
    for chunk in chunks[pause:]:
        unbroken.append(0, chunk)
        unbroken.read(0)  # whether somebody looks makes no difference
        resumed.append(0, chunk)
    for name, tensor in unbroken.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    a, b = unbroken.audit(0), resumed.audit(0)
    assert a is not None
    assert b is not None
    assert torch.equal(a.members_BNA, b.members_BNA)
    assert a.num_original_tokens == 150 - 3 * TOKENS


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.sampled_from([8, 40, 64]), storage=st.sampled_from(["int8", "int4"]))
def test_low_bit_storage_is_near_and_does_not_drift(seed: int, dim: int, storage: Storage) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 9, dim, generator=generator) * torch.logspace(-3, 3, 9)[:, None]
    store = VectorStore((1, 2, 9, dim), storage, torch.float32, torch.device("cpu"))
    slot = torch.arange(9).expand(1, 2, 9)
    store.write(slot, x)
    first = store.read(9)
    step = x.abs().amax(-1, keepdim=True) / (127 if storage == "int8" else 7)
    assert bool(((first - x).abs() <= 0.51 * step).all())
    store.write(slot, first)
    assert torch.equal(store.read(9), first)
    assert torch.equal(store.gather(slot.flip(-1)), first.flip(2))

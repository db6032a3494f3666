"""A temporal cache takes its memory once: what its tensors hold, what it reports and what the budget says agree."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.bench.quality_lab import held_bytes
from workers.cache.budget import Geometry, count_groups
from workers.cache.entry_records import EntryRecords
from workers.cache.low_bit import Storage
from workers.cache.temporal_merge import MergeSettings, TemporalCache
from workers.cache.uncompressed import Uncompressed
from workers.contracts import KeyValues
from workers.search.exact import ExactSearch

LAYERS, HEADS, DIM, TOKENS = 2, 3, 32, 16  # tokens per latent frame
SINK, RECENT, CHUNK = 3 * TOKENS, 6 * TOKENS, 3 * TOKENS
GEOMETRY = Geometry(LAYERS, HEADS, DIM, TOKENS, CHUNK)


def make_chunk(generator: torch.Generator, start: int, num: int = CHUNK) -> KeyValues:
    k, v = torch.randn(2, 1, num, HEADS, DIM, generator=generator).unbind(0)
    time = start + torch.arange(num) // TOKENS
    return KeyValues(k, v, torch.stack((time, torch.arange(num) % TOKENS, 0 * time), 1).float())


def make_cache(num_groups: int, storage: Storage = "int8", audit_tokens: int = 0) -> TemporalCache:
    kept = MergeSettings(SINK, RECENT, num_groups, 0.9999, storage, audit_tokens)
    return TemporalCache(LAYERS, kept, ExactSearch().top1)


@settings(max_examples=12, deadline=None)
@given(budget=st.integers(360_000, 900_000), storage=st.sampled_from(["int8", "int4", "model"]), audit=st.booleans())
def test_what_is_held_is_what_is_reported_from_the_first_absorbed_chunk_on_and_within_the_budget(
    budget: int, storage: Storage, audit: bool
) -> None:
    num_groups = count_groups(budget, SINK + RECENT, GEOMETRY, storage, torch.float32)
    cache, generator = make_cache(num_groups, storage, CHUNK if audit else 0), torch.Generator().manual_seed(budget)
    held, num_chunks = [], num_groups // CHUNK + 9
    for chunk in range(num_chunks):
        for layer in range(LAYERS):
            cache.append(layer, make_chunk(generator, 3 * chunk))
            cache.read(layer)
        held.append(held_bytes(cache))
        assert held[-1] == cache.num_bytes, "views share the memory of the table"
    assert cache.num_tokens < num_chunks * CHUNK, "the table has been full"
    assert len(set(held[3:])) == 1
    sample = 0 if not audit else LAYERS * CHUNK * (HEADS * DIM * 4 + 20 + 8 * HEADS)
    assert held[-1] - sample == GEOMETRY.reserved_bytes(num_groups, SINK + RECENT, storage, torch.float32) <= budget


@settings(max_examples=30, deadline=None)
@given(budget=st.integers(360_000, 2_000_000), storage=st.sampled_from(["int8", "int4", "model"]))
def test_as_many_groups_as_the_budget_holds_and_not_one_more(budget: int, storage: Storage) -> None:
    num = count_groups(budget, SINK + RECENT, GEOMETRY, storage, torch.float32)
    taken = [GEOMETRY.reserved_bytes(num + more, SINK + RECENT, storage, torch.float32) for more in (0, 1)]
    assert taken[0] <= budget < taken[1]


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    least = GEOMETRY.reserved_bytes(TOKENS + CHUNK, SINK + RECENT, "int8", torch.float32)
    assert count_groups(least, SINK + RECENT, GEOMETRY, "int8", torch.float32) == TOKENS + CHUNK
    with pytest.raises(ValueError, match=f"{least - 1:,} bytes is too small.*take {least:,}"):
        count_groups(least - 1, SINK + RECENT, GEOMETRY, "int8", torch.float32)


def test_a_restored_cache_takes_the_same_memory() -> None:
    unbroken, resumed = make_cache(100), make_cache(100)
    generator = torch.Generator().manual_seed(0)
    for chunk in range(8):
        for layer in range(LAYERS):
            unbroken.append(layer, make_chunk(generator, 3 * chunk))
    resumed.restore({name: tensor.clone() for name, tensor in unbroken.state().items()})
    assert held_bytes(resumed) == held_bytes(unbroken) == resumed.num_bytes
    a, b = unbroken.read(1), resumed.read(1)
    assert a is not None
    assert b is not None
    for x, y in ((a.k_BKND, b.k_BKND), (a.position_K3, b.position_K3), (a.log_mass_BNK, b.log_mass_BNK)):
        assert isinstance(x, Tensor)
        assert isinstance(y, Tensor)
        assert torch.equal(x, y)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sink=st.integers(0, 40),
    recent=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=9),
)
def test_what_is_not_compressed_is_sink_and_newest_and_what_leaves_comes_in_order(
    seed: int, sink: int, recent: int, sizes: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chunks = [make_chunk(generator, 9 * index, num) for index, num in enumerate(sizes)]
    ends, left = Uncompressed(chunks[0], sink, recent, torch.float32), list[KeyValues]()
    for chunk in chunks:
        old = ends.append(chunk)
        left += [] if old is None else [old]
        assert old is None or old.k_BKND.data_ptr() != chunk.k_BKND.data_ptr()
    every_k, every_at = torch.cat([c.k_BKND for c in chunks], 1), torch.cat([c.position_K3 for c in chunks])
    gone = sum(part.num_tokens for part in left)
    kept = ends.view()
    assert (ends.num_sink, ends.num_recent) == (min(sink, sum(sizes)), min(recent, max(0, sum(sizes) - sink)))
    for part, first in ((kept.narrow(0, ends.num_sink), 0), *zip(left, _starts(left, ends.num_sink), strict=True)):
        assert torch.equal(part.k_BKND, every_k[:, first : first + part.num_tokens])
        assert torch.equal(part.position_K3, every_at[first : first + part.num_tokens])
    newest = kept.narrow(ends.num_sink, kept.num_tokens)
    assert torch.equal(newest.k_BKND, every_k[:, ends.num_sink + gone :])
    assert torch.equal(newest.position_K3, every_at[ends.num_sink + gone :])


def _starts(parts: list[KeyValues], first: int) -> list[int]:
    ends = [first]
    for part in parts:
        ends.append(ends[-1] + part.num_tokens)
    return [start for start, _ in pairwise(ends)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), used=st.integers(0, 12), more=st.integers(0, 6))
def test_records_are_those_of_the_entries_in_the_order_of_a_reader(seed: int, used: int, more: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    records = EntryRecords((1, HEADS, 18), 4, 5, torch.float32, torch.device("cpu"))
    first, last = torch.full((4, 3), 1.0), torch.full((5, 3), 2.0)
    position = torch.rand(1, HEADS, 18, 3, generator=generator) * 50
    m = torch.randint(1, 99, (1, HEADS, 18), generator=generator, dtype=torch.int32)
    total = 0
    for num in (used, more):
        records.begin_change(total)
        slot = torch.arange(total, total + num).expand(1, HEADS, -1).clone()
        slot[0, 0] = 18  # the first head opens none
        records.write(slot, position[:, :, total : total + num], m[:, :, total : total + num])
        total += num
        records.show(total, first, last)
    at, mass = (x[0] for x in records.read(4 + total + 5))
    assert bool((at[:4] == 1).all() & (at[4 + total :] == 2).all())
    assert bool((mass[:, :4] == 0).all() & (mass[:, 4 + total :] == 0).all())
    assert bool(mass[0, 4 : 4 + total].isneginf().all() & (at[4 : 4 + total, 0] == 0).all())
    want = torch.cat((position[0, 1, :total, :1].trunc(), (position[0, 1, :total, 1:] * 8).round() / 8), -1)
    assert torch.equal(at[4 : 4 + total, 1], want)
    torch.testing.assert_close(mass[1, 4 : 4 + total].exp(), m[0, 1, :total].float())

"""Which groups a full table merges: against the definition, written out slot by slot."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.cache.low_bit import Storage, VectorStore
from workers.cache.pairs import choose_merges, every_other, loss_in_stores, merge_loss, toward_partners

HEADS, SLOTS, DIM = 3, 30, 4


def make_forest(seed: int, roots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, members and older partners; the last slots of the second head are empty."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(1, HEADS, SLOTS, DIM, generator=generator)
    m = torch.randint(1, 5, (1, HEADS, SLOTS), generator=generator, dtype=torch.int32)
    partner = (torch.rand(1, HEADS, SLOTS, generator=generator) * torch.arange(SLOTS)).int()
    partner[..., :roots] = -1
    m[:, 1, -3:] = 0
    partner[:, 1, -3:] = -1
    return k, m, partner


def depth_of(slot: int, partner: list[int]) -> int:
    return 0 if partner[slot] < 0 else 1 + depth_of(partner[slot], partner)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), roots=st.integers(1, 9), num=st.integers(0, 9))
def test_the_links_with_the_least_loss_merge(seed: int, roots: int, num: int) -> None:
    k, m, partner = make_forest(seed, roots)
    v = torch.zeros_like(k)
    toward = toward_partners(m, partner)
    root, keeper = choose_merges(merge_loss(k, v, m, toward), toward, m, torch.full((1, HEADS), num))
    for head in range(HEADS):
        own_partner, members = partner[0, head].tolist(), m[0, head].tolist()
        linked = [slot for slot in range(SLOTS) if own_partner[slot] >= 0]
        odd = [slot for slot in linked if depth_of(slot, own_partner) % 2]
        first = odd if 2 * len(odd) >= len(linked) else [slot for slot in linked if slot not in odd]
        loss = {
            slot: members[slot]
            * members[p]
            / (members[slot] + members[p])
            * float((k[0, head, slot] - k[0, head, p]).square().sum())
            for slot in linked
            for p in (own_partner[slot],)
        }
        merged = sorted(linked, key=lambda slot: (slot not in first, loss[slot]))[:num]
        groups: dict[int, list[int]] = {}
        for slot in range(SLOTS):
            end = slot
            while end in merged:
                end = own_partner[end]
            groups.setdefault(end, []).append(slot)
            assert int(root[0, head, slot]) == end
        for slots in groups.values():
            heaviest = max(slots, key=lambda slot: (members[slot], slot))
            assert all(int(keeper[0, head, slot]) == heaviest for slot in slots)


@pytest.mark.parametrize("length", [2, 3, 8, 17])
def test_no_two_links_of_a_chain_follow_one_another(length: int) -> None:
    toward = (torch.arange(length) - 1).clamp(min=0)[None, None]
    merging = every_other(toward)[0, 0]
    assert int(merging.sum()) == length // 2
    assert not bool((merging[1:] & merging[:-1]).any())


def test_equal_keys_merge_first_all_of_a_chain() -> None:
    k = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.1])[None, None, :, None]
    partner = torch.tensor([-1, 0, 1, 2, 3])[None, None]
    m = torch.ones(1, 1, 5, dtype=torch.int32)
    toward = toward_partners(m, partner)
    root, _ = choose_merges(merge_loss(k, torch.zeros_like(k), m, toward), toward, m, torch.tensor([[2]]))
    assert root.flatten().tolist() == [0, 0, 0, 3, 4]


def test_the_loss_is_what_a_merge_adds_to_the_squared_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 1, 2, DIM, generator=generator, dtype=torch.float64)
    m = torch.tensor([[[2, 5]]])
    both = torch.cat((k / math.sqrt(2 * math.sqrt(DIM)), v / v.square().sum(-1).mean().sqrt()), -1)[0, 0]
    every = torch.cat((both[:1].expand(2, -1), both[1:].expand(5, -1)))
    spread = (every - every.mean(0)).square().sum()
    found = merge_loss(k, v, m, torch.tensor([[[1, 0]]]))
    torch.testing.assert_close(found[0, 0, 0], spread, atol=1e-12, rtol=0)


@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
@pytest.mark.parametrize("num", [3, 512, 1200])
def test_what_is_unpacked_run_by_run_loses_what_the_whole_would(storage: Storage, num: int) -> None:
    generator = torch.Generator().manual_seed(num)
    keys, values = (VectorStore((2, HEADS, num + 1, 32), storage, torch.float32, torch.device("cpu")) for _ in range(2))
    slot = torch.arange(num).expand(2, HEADS, num)
    for store in (keys, values):
        store.write(slot, torch.randn(2, HEADS, num, 32, generator=generator))
    keys.write(slot[..., 1:2], keys.gather(slot[..., :1]))  # equal keys lose nothing
    m = torch.randint(0, 5, (2, HEADS, num), generator=generator, dtype=torch.int32)
    other = torch.randint(0, num, (2, HEADS, num), generator=generator)
    other[..., 1] = 0
    found = loss_in_stores(keys, values, m, other)
    want = merge_loss(*(store.read(num).contiguous() for store in (keys, values)), m, other)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
    assert bool((found[..., 1] == 0).all())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), storage=st.sampled_from(["model", "int8", "int4"]))
def test_rearranged_slots_hold_what_lay_in_their_sources_bit_for_bit(seed: int, storage: Storage) -> None:
    generator = torch.Generator().manual_seed(seed)
    store = VectorStore((2, HEADS, 9, 8), storage, torch.float32, torch.device("cpu"))
    store.write(torch.arange(9).expand(2, HEADS, 9), torch.randn(2, HEADS, 9, 8, generator=generator))
    before, source = store.read(9).clone(), torch.randint(-1, 9, (2, HEADS, 6), generator=generator)
    store.rearrange(source)
    want = before.gather(2, source.clamp(min=0)[..., None].expand(-1, -1, -1, 8)) * (source >= 0)[..., None]
    assert torch.equal(store.read(9)[:, :, :6], want)
    assert not bool(store.read(9)[:, :, 6:].any())

"""Which pairs of a full table merge: against the definition, written out link by link."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.cache.table_pairs import choose_links, heaviest

HEADS, SLOTS = 2, 24


def draw_forest(seed: int, kinds: int) -> tuple[Tensor, Tensor]:
    """Losses, of so many kinds, and partners that are older or not: each new link joins two trees."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.randint(kinds, (HEADS, SLOTS), generator=generator).float()
    partner = torch.full((HEADS, SLOTS), -1, dtype=torch.int32)
    for head in range(HEADS):
        order = torch.randperm(SLOTS, generator=generator).tolist()
        for place in range(1, SLOTS):
            if torch.rand((), generator=generator) < 0.8:
                partner[head, order[place]] = order[int(torch.randint(place, (), generator=generator))]
    return loss.masked_fill(partner < 0, torch.inf), partner


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), kinds=st.sampled_from([2, 5, 10**6]), num=st.integers(0, SLOTS))
def test_every_other_link_of_a_chain_comes_first_then_the_rest(seed: int, kinds: int, num: int) -> None:
    loss, partner = draw_forest(seed, kinds)
    found = choose_links(loss, partner, num)
    for head in range(HEADS):
        to, order = partner[head].tolist(), [(value, slot) for slot, value in enumerate(loss[head].tolist())]
        links = [slot for slot in range(SLOTS) if to[slot] >= 0]

        def depth(slot: int, to: list[int] = to) -> int:
            return 0 if to[slot] < 0 else 1 + depth(to[slot])

        odd = [slot for slot in links if depth(slot) % 2 == 1]
        early = odd if 2 * len(odd) >= len(links) else [slot for slot in links if slot not in odd]
        expected = sorted(links, key=lambda slot: (slot not in early and order[slot][0] > 0, order[slot]))[:num]
        merged = [slot for slot in range(SLOTS) if found[head, slot] != slot]
        assert merged == sorted(expected)
        assert all(found[head, slot] == to[slot] for slot in merged)
        if num <= len(early) and all(order[slot][0] > 0 for slot in links):
            assert not any(to[slot] in merged for slot in merged)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_heaviest_stands_for_its_group(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randint(5, (HEADS, SLOTS), generator=generator)
    m = torch.randint(1, 4, (HEADS, SLOTS), generator=generator, dtype=torch.int32)
    found = heaviest(root, m)
    for head in range(HEADS):
        for slot in range(SLOTS):
            members = [other for other in range(SLOTS) if root[head, other] == root[head, slot]]
            assert found[head, slot] == max(members, key=lambda other: (int(m[head, other]), other))


def test_no_link_is_no_merge_and_mass_may_be_large() -> None:
    loss, partner = torch.full((1, 4), math.inf), torch.full((1, 4), -1, dtype=torch.int32)
    assert choose_links(loss, partner, 3).tolist() == [[0, 1, 2, 3]]
    m = torch.tensor([[2**30, 1, 5, 2**30 - 1]], dtype=torch.int32)
    assert heaviest(torch.zeros(1, 4, dtype=torch.int64), m).tolist() == [[0, 0, 0, 0]]

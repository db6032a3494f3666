"""Memory that is used again: against a list that is looked through from its oldest buffer on."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.kernels.buffers import Buffers

LIKE = torch.empty(0)
calls = st.lists(st.tuples(st.sampled_from(["take", "give"]), st.integers(1, 60)), max_size=60)


@given(calls)
def test_the_shortest_buffer_that_fits_is_taken_and_the_longest_unused_go_first(calls: list[tuple[str, int]]) -> None:
    buffers, free, taken = Buffers(max_bytes=4 * 150), list[torch.Tensor](), list[torch.Tensor]()
    for what, number in calls:
        if what == "give" and taken:
            buffers.give(taken[number % len(taken)])
            free.append(taken.pop(number % len(taken)))
            while sum(x.untyped_storage().nbytes() for x in free) > 4 * 150:
                free.pop(0)
            continue
        found = buffers.take((number,), LIKE)
        lengths = [x.untyped_storage().nbytes() // 4 for x in free]
        fitting = [(length, place) for place, length in enumerate(lengths) if number <= length <= 1.5 * number]
        if fitting:
            assert found.data_ptr() == free.pop(min(fitting)[1]).data_ptr()
        assert found.shape == (number,)
        taken.append(found)
        addresses = {x.data_ptr() for x in (*free, *taken)}
        assert len(addresses) == len(free) + len(taken)

"""Means of values in codes of 4 bits by CUDA against those by Triton: few keys in many groups, and many in one."""

import pytest
import torch

from workers.cache.shrink import Room
from workers.cache.table_layout import TableSettings
from workers.cache.unrotated import TurnBack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]
_SIZES = TableSettings(
    num_layers=1, num_heads=3, head_dim=128, chunk_tokens=600, frame_tokens=200, kept_chunks=3, spare_chunks=2,
    rule="pairs", storage="int4",
)  # fmt: skip


@pytest.mark.parametrize("listed", [0, 4])
@pytest.mark.parametrize("num_groups", [1, 40, 300])
@pytest.mark.parametrize("at_once", [2, 3])
def test_sums_and_means_have_the_bits_of_those_by_triton(listed: int, num_groups: int, at_once: int) -> None:
    pytest.importorskip("triton")
    from workers.cache import triton_collect
    from workers.cache.average_rows import average_rows
    from workers.cache.row_distances import fits
    from workers.cache.triton_families import Families
    from workers.cache.triton_merge import add_rest, clear_sums, most_groups
    from workers.cache.triton_rows import StoredHistory, coded_rows
    from workers.cache.triton_sums import Found, join_groups

    s, device, generator = _SIZES, torch.device("cuda"), torch.Generator(device="cuda").manual_seed(num_groups)
    turn_back = TurnBack(s.head_dim, s.theta, device)
    room = Room(s.kept_tokens, s.spare_tokens, s.rule, rate=0.0, num_listed=listed)
    slots, rows = (s.num_heads, s.history_tokens), (s.num_heads, s.history_slots)

    low, high = (
        torch.randint(1, 16, (*rows, 64), generator=generator, device=device, dtype=torch.uint8) for _ in range(2)
    )
    largest = torch.rand((*rows, 4), generator=generator, device=device) * 3 + 0.5
    for nothing in (0.0, 1e-20):
        largest[torch.rand(largest.shape, generator=generator, device=device) < 0.02] = nothing
    v = coded_rows(low | high << 4, largest.bfloat16(), s.head_dim, "int4", torch.bfloat16)
    again = v._replace(x=v.x.clone(), largest=v.largest.clone())
    before = v.x.clone()
    assert fits(v, turn_back)

    # The first slots stand for groups; others join them, of heads not equally many.
    head_of = torch.randint(num_groups, slots, generator=generator, device=device, dtype=torch.int32)
    others = torch.rand(s.num_heads, s.history_tokens - num_groups, generator=generator, device=device)
    given_up = (others.argsort(-1)[:, : s.spare_tokens] + num_groups).int()
    num_given_up = torch.tensor([s.spare_tokens, 0, 777], dtype=torch.int32, device=device)
    m, counts = torch.ones(slots, dtype=torch.int32, device=device), num_given_up.new_zeros(3, s.num_heads)
    nothing_yet = torch.zeros_like(m), torch.zeros(slots, dtype=torch.int64, device=device), torch.zeros_like(m)
    families = Families(head_of, head_of, m, given_up, num_given_up, counts, *nothing_yet)
    weight = torch.rand(rows, generator=generator, device=device) * 3 + 0.2
    position = torch.zeros(*rows, 3, device=device)
    of = StoredHistory(v, v, position, m, weight[:, : s.history_tokens], head_of)
    found = Found(m, m, join_groups(of, turn_back, room, families), families)

    assert int(found.sums.members.num_rest.sum()) > 0
    shape = at_once, most_groups(room), s.head_dim
    sums, expected = (torch.full(shape, 7, dtype=torch.int32, device=device) for _ in range(2))
    for first in range(0, s.num_heads, at_once):
        some, expected_some = sums[: s.num_heads - first], expected[: s.num_heads - first]
        clear_sums(found, some, first)
        average_rows(of, found, some, first)
        clear_sums(found, expected_some, first)
        by_triton = of._replace(v=again)
        add_rest(by_triton, found, expected_some, first)
        triton_collect._average_groups(by_triton, found, expected_some, first, room, s)
        assert torch.equal(some, expected_some)
    assert torch.equal(v.x, again.x)
    assert torch.equal(v.largest, again.largest)
    assert not torch.equal(v.x, before)

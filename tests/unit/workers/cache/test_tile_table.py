"""A tile table against a slow twin that keeps lists of groups, and its promises: no key is dropped, order is time."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.cache.table_layout import MergeRule, TableSettings, read_log_mass, write_log_mass
from workers.cache.tile_table import TileTable
from workers.contracts import KeyValues
from workers.kernels.reference import attend_reference
from workers.model.rope import grid_positions, make_rotation, rotate

HEADS, DIM, ROWS, COLUMNS = 2, 12, 2, 3
FRAME, CHUNK = ROWS * COLUMNS, 3 * ROWS * COLUMNS
SIZES = TableSettings(
    num_layers=2,
    num_heads=HEADS,
    head_dim=DIM,
    chunk_tokens=CHUNK,
    frame_tokens=FRAME,
    kept_chunks=2,
    spare_chunks=2,
    candidate_tiles=None,
    tile=8,
)
CPU = torch.device("cpu")


def make_chunk(index: int, layer: int = 0, num_kinds: int | None = None) -> KeyValues:
    """Random keys, or copies of a few."""
    generator = torch.Generator().manual_seed(1000 * index + layer)
    k, v = torch.randn(2, 1, CHUNK, HEADS, DIM, generator=generator).unbind(0)
    if num_kinds is not None:
        kinds = torch.randn(1, num_kinds, HEADS, DIM, generator=torch.Generator().manual_seed(5))
        k = kinds[:, torch.randint(num_kinds, (CHUNK,), generator=generator)]
    return KeyValues(k, v, grid_positions(torch.arange(3) + 3 * index, ROWS, COLUMNS))


def fill(sizes: TableSettings, num_chunks: int, **chunk: Any) -> TileTable:
    table = TileTable(sizes, torch.float32, CPU)
    for index in range(num_chunks):
        for layer in range(sizes.num_layers):
            table.append(layer, make_chunk(index, layer, **chunk))
    return table


@dataclass(eq=False)
class Group:
    """Of the twin; `partner` is a key that came earlier, whichever group holds it now."""

    k: Tensor
    v: Tensor
    position: Tensor
    age: int
    m: int = 1
    weight: float = 1.0
    partner: "Group | None" = None
    joined: "Group | None" = None

    def now(self) -> "Group":
        return self if self.joined is None else self.joined.now()


@dataclass
class Twin:
    """The history of one head in float64."""

    sizes: TableSettings
    pointer: int
    groups: list[Group] = field(default_factory=list)

    def absorb(self, chunk: KeyValues, head: int) -> None:
        s = self.sizes
        if self.pointer == s.history_tokens:
            self.merge(min(s.spare_tokens, len(self.groups) - s.kept_tokens))
            self.pointer = s.kept_tokens
        old, fresh = list(self.groups), list[Group]()
        for t in range(CHUNK):
            k, v = chunk.k_BKND[0, t, head].double(), chunk.v_BKND[0, t, head].double()
            group = Group(k, v, chunk.position_K3[t], age=int(chunk.position_K3[t, 0]) * FRAME + t % FRAME)
            among = old + fresh[: t // FRAME * FRAME]
            group.partner = max(among, key=lambda other: cosine(k, other.k), default=None)
            fresh.append(group)
        self.groups += fresh
        self.pointer += CHUNK

    def merge(self, num: int) -> None:
        pairs = [group for group in self.groups if group.partner is not None]
        by_pairs = self.sizes.rule == "pairs"
        pairs.sort(key=self.turns() if by_pairs else lambda group: -cosine(group.k, partner(group).now().k))
        family = {group: {group} for group in self.groups}
        root = {group: group for group in self.groups}
        for group in pairs[:num]:
            a, b = root[group], root[partner(group).now()]
            family[b] |= family.pop(a)
            for member in family[b]:
                root[member] = b
        for end, members in family.items():
            keeper = max(members, key=lambda member: (member.m if by_pairs else 0, member.age))
            weights = [member.weight * likeness(member.k - keeper.k, self.sizes.decay) for member in members]
            value = sum((w * member.v for w, member in zip(weights, members, strict=True)), torch.zeros(DIM))
            keeper.partner = end.partner
            keeper.m, keeper.weight = sum(member.m for member in members), sum(weights)
            keeper.v = value / keeper.weight
            for member in members - {keeper}:
                member.joined = keeper
        self.groups = [group for group in self.groups if group.joined is None]

    def turns(self) -> Callable[[Group], tuple[bool, float, int]]:
        """When the link of a group comes: every other link of a chain, then the rest, by loss."""
        length = sum(float(group.v @ group.v) for group in self.groups) / len(self.groups)
        order: dict[Group, tuple[float, int]] = {}
        for index, group in enumerate(self.groups):
            if group.partner is not None:
                other = group.partner.now()
                k, v = group.k - other.k, group.v - other.v
                squared = float(k @ k) / (2 * math.sqrt(DIM)) + float(v @ v) / length
                order[group] = squared * group.m * other.m / (group.m + other.m), index
        depth = {group: chain_length(group) for group in order}
        odd = {group for group in order if depth[group] % 2}
        early = odd if 2 * len(odd) >= len(order) else order.keys() - odd
        return lambda group: (group not in early and order[group][0] > 0, *order[group])


def chain_length(group: Group) -> int:
    """Links from a group to the end of its chain."""
    return 0 if group.partner is None else 1 + chain_length(group.partner.now())


def partner(group: Group) -> Group:
    assert group.partner is not None
    return group.partner


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def likeness(difference: Tensor, decay: float) -> float:
    return math.exp(-decay * float(difference @ difference) / (2 * math.sqrt(DIM)))


@pytest.mark.parametrize(("rule", "decay"), [("chains", 0.0), ("chains", 0.3), ("pairs", 0.0), ("pairs", 0.3)])
@pytest.mark.parametrize("num_chunks", [5, 8, 13])
def test_merges_what_the_slow_twin_merges(num_chunks: int, rule: MergeRule, decay: float) -> None:
    sizes = replace(SIZES, rule=rule, decay=decay)
    table = fill(sizes, num_chunks)
    for layer in range(sizes.num_layers):
        read = table.layers[layer]
        for head in range(HEADS):
            twin = Twin(sizes, pointer=layer % sizes.spare_chunks * CHUNK)
            for index in range(sizes.sink_chunks, num_chunks - sizes.recent_chunks):
                twin.absorb(make_chunk(index, layer), head)
            live = read.m_NC[head] > 0
            assert read.pointer == twin.pointer
            assert read.m_NC[head, live].tolist() == [group.m for group in twin.groups]
            position = torch.stack([group.position for group in twin.groups])
            assert torch.equal(read.position_NC3[head, live], position)
            weight = torch.tensor([group.weight for group in twin.groups])
            torch.testing.assert_close(read.weight_NC[head, live], weight, rtol=1e-4, atol=1e-5)
            run = slice(sizes.history_start, sizes.history_start + read.m_NC.shape[1])
            v = torch.stack([group.v for group in twin.groups]).float()
            torch.testing.assert_close(read.v_NLD[head, run][live], v, rtol=1e-4, atol=1e-5)


@given(
    num_chunks=st.integers(3, 14),
    near=st.booleans(),
    kinds=st.sampled_from([None, 3]),
    rule=st.sampled_from(["chains", "pairs"]),
)
@settings(max_examples=25, deadline=None)
def test_every_key_that_came_counts_once(num_chunks: int, near: bool, kinds: int | None, rule: MergeRule) -> None:
    sizes = replace(SIZES, candidate_tiles=2 if near else None, rule=rule)
    table = fill(sizes, num_chunks, num_kinds=kinds)
    for layer in table.layers:
        absorbed = max(0, num_chunks - sizes.sink_chunks - sizes.recent_chunks) * CHUNK
        assert layer.m_NC.sum(1).tolist() == [absorbed] * HEADS
        for head in range(HEADS):
            time = layer.position_NC3[head, layer.m_NC[head] > 0] @ torch.tensor([100.0, 10.0, 1.0])
            assert bool((time.diff() > 0).all())
        partner = layer.partner_NC.long()
        holds = layer.m_NC.gather(1, partner.clamp(min=0)) > 0
        assert bool((holds | (partner < 0)).all())


@pytest.mark.parametrize("rule", ["chains", "pairs"])
@pytest.mark.parametrize("near", [False, True])
def test_equal_keys_give_dense_attention_over_all_that_came(near: bool, rule: MergeRule) -> None:
    sizes = replace(SIZES, candidate_tiles=3 if near else None, num_layers=1, sink_chunks=0, rule=rule)
    num_chunks = 11
    table = TileTable(sizes, torch.float32, CPU)
    chunks = [make_chunk(index, num_kinds=2) for index in range(num_chunks)]
    at = torch.zeros(CHUNK, 3)  # one place and time for all: what RoPE tells apart is not equal
    for chunk in chunks:
        table.append(0, replace(chunk, position_K3=at))
    read = table.read(0)
    assert read is not None
    assert read.log_mass_BNK is not None
    assert bool((read.log_mass_BNK > 1).any())
    q = torch.randn(1, 7, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    every = KeyValues(
        torch.cat([c.k_BKND for c in chunks], 1), torch.cat([c.v_BKND for c in chunks], 1), at.repeat(num_chunks, 1)
    )
    expected, expected_lse = attend_reference(q, every)
    found, lse = attend_reference(q, read)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_a_table_with_room_keeps_all_as_it_came() -> None:
    sizes = replace(SIZES, kept_chunks=9)
    table = fill(sizes, 7)
    read = table.read(1)
    assert read is not None
    assert read.log_mass_BNK is not None
    kept = ~read.log_mass_BNK[0, 0].isneginf()
    chunks = [make_chunk(index, 1) for index in range(7)]
    torch.testing.assert_close(read.k_BKND[:, kept], torch.cat([c.k_BKND for c in chunks], 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(read.v_BKND[:, kept], torch.cat([c.v_BKND for c in chunks], 1))
    assert torch.equal(read.position_K3[0, kept, 0], torch.cat([c.position_K3 for c in chunks]))
    assert torch.equal(read.log_mass_BNK[..., kept], torch.zeros(1, HEADS, 7 * CHUNK))


def test_sizes_that_kernels_cannot_do_are_said_and_done_by_plain_torch(caplog: pytest.LogCaptureFixture) -> None:
    table = TileTable(SIZES, torch.float32, CPU, work="kernels")
    assert "plain torch: kernels of the table take powers of two from 16 on, not head_dim 12" in caplog.text
    for index in range(3):
        for layer in range(SIZES.num_layers):
            k_NTD, v_NTD = table.own(layer)
            k_NTD.fill_(1.0)
            v_NTD.fill_(1.0)
        table.remember_chunk(make_chunk(index).position_K3)
    assert table.num_tokens == 3 * CHUNK


def test_what_comes_back_is_found_in_the_near_tiles() -> None:
    sizes = replace(SIZES, candidate_tiles=2, num_layers=1, kept_chunks=9, sink_chunks=0)
    table = TileTable(sizes, torch.float32, CPU)
    order = [0, 1, 2, 3, 0, 4]  # the first place again, after three others
    for time, place in enumerate(order):
        table.append(0, replace(make_chunk(place), position_K3=make_chunk(time).position_K3))
    layer = table.layers[0]
    again = slice(4 * CHUNK, 5 * CHUNK)
    same = torch.arange(CHUNK, dtype=torch.int32).expand(HEADS, -1)
    assert float((layer.partner_NC[:, again] == same).float().mean()) > 0.5


def test_a_restored_table_goes_on_as_the_unbroken_one() -> None:
    unbroken, broken = fill(SIZES, 6), TileTable(SIZES, torch.float32, CPU)
    broken.restore({name: tensor.clone() for name, tensor in unbroken.state().items()})
    for index in range(6, 10):
        for layer in range(SIZES.num_layers):
            for table in (unbroken, broken):
                table.append(layer, make_chunk(index, layer))
    for layer in range(SIZES.num_layers):
        a, b = unbroken.read(layer), broken.read(layer)
        assert a is not None
        assert b is not None
        assert torch.equal(a.k_BKND, b.k_BKND)
        assert torch.equal(a.v_BKND, b.v_BKND)


def test_a_cleared_table_is_a_new_one() -> None:
    table = fill(SIZES, 9)
    table.clear()
    assert table.read(0) is None
    assert table.num_bytes == table.num_tokens == 0
    for name, tensor in TileTable(SIZES, torch.float32, CPU).state().items():
        assert torch.equal(table.state()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_mass_in_two_channels_is_exact_enough(dtype: torch.dtype) -> None:
    m = torch.tensor([1.0, 2.0, 3.0, 117.0, 5000.0, 0.0])
    k = torch.zeros(6, 128 + 16, dtype=dtype)
    write_log_mass(k, 128, m.log())
    torch.testing.assert_close(read_log_mass(k, 128), m.log(), rtol=0, atol=2e-4)
    write_log_mass(k, 128, -torch.inf)
    assert bool(read_log_mass(k, 128).isneginf().all())


def test_stored_keys_are_those_after_rope() -> None:
    table, chunk = fill(SIZES, 1), make_chunk(0)
    rotated = rotate(chunk.k_BKND, make_rotation(chunk.position_K3, DIM, 10000.0))[0].transpose(0, 1)
    torch.testing.assert_close(table.layers[0].k_NLW[:, :CHUNK, :DIM], rotated)

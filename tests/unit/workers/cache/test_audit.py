"""Followed keys are found where they went, and a sample is fair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.cache.audit import AuditSample, OwnerRecord
from workers.contracts import KeyValues

HEADS, DIM, CHUNK = 2, 4, 10


def make_chunk(index: int) -> KeyValues:
    """Each key's channels and position are its number in the order of coming."""
    number = torch.arange(index * CHUNK, (index + 1) * CHUNK).float()
    k = number[None, :, None, None].expand(1, CHUNK, HEADS, DIM).clone()
    return KeyValues(k, k, number[:, None].expand(CHUNK, 3).clone())


class PlainTable:
    """Groups as lists of key numbers; every third chunk, groups meet."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.groups: list[list[list[int]]] = [[] for _ in range(HEADS)]

    def absorb(self, numbers: list[int], compact: bool) -> tuple[Tensor, Tensor | None]:
        moved = None
        if compact:
            size = max(len(groups) for groups in self.groups)
            moved = torch.zeros(1, HEADS, size, dtype=torch.long)
            for head, groups in enumerate(self.groups):
                half: list[list[int]] = [[] for _ in range((len(groups) + 1) // 2)]
                for old, members in enumerate(groups):
                    moved[0, head, old] = old // 2
                    half[old // 2] += members
                self.groups[head] = half
        slots = torch.zeros(1, HEADS, len(numbers), dtype=torch.long)
        for head, groups in enumerate(self.groups):
            for i, number in enumerate(numbers):
                slot = int(torch.randint(0, len(groups) + 1, (1,), generator=self.generator))
                if slot == len(groups):
                    groups.append([])
                groups[slot].append(number)
                slots[0, head, i] = slot
        return slots, moved

    @property
    def num_used(self) -> int:
        return max(len(groups) for groups in self.groups)

    def m(self) -> Tensor:
        m = torch.zeros(1, HEADS, self.num_used + 1, dtype=torch.int32)
        for head, groups in enumerate(self.groups):
            m[0, head, : len(groups)] = torch.tensor([len(members) for members in groups])
        return m


def follow(num_chunks: int, num_keys: int, layer: int = 0) -> tuple[PlainTable, OwnerRecord, AuditSample]:
    table, record, sample = PlainTable(), OwnerRecord(), AuditSample(num_keys, layer)
    for index in range(num_chunks):
        chunk = make_chunk(index)
        slot, moved = table.absorb(list(range(index * CHUNK, (index + 1) * CHUNK)), index % 3 == 2)
        record.follow(slot, moved)
        sample.follow(chunk, slot, moved)
    return table, record, sample


def test_every_key_is_found_in_the_group_that_holds_it() -> None:
    table, record, _ = follow(8, 1)
    num_sink, num_recent = 3, 5
    owners = record.owners(num_sink, table.num_used, num_recent, make_chunk(0))
    assert owners.shape == (1, HEADS, num_sink + 8 * CHUNK + num_recent)
    for head in range(HEADS):
        assert owners[0, head, :num_sink].tolist() == [0, 1, 2]
        stop = num_sink + table.num_used
        assert owners[0, head, -num_recent:].tolist() == list(range(stop, stop + num_recent))
        for number in range(8 * CHUNK):
            assert number in table.groups[head][int(owners[0, head, num_sink + number]) - num_sink]


def test_before_anything_was_absorbed_only_sink_and_recent_keys_have_owners() -> None:
    assert OwnerRecord().owners(2, 0, 3, make_chunk(0)).tolist() == [[[0, 1, 2, 3, 4]] * HEADS]
    assert AuditSample(4, 0).read(lambda slot: slot, 2, 0) is None


def test_sampled_keys_come_with_their_group_its_size_and_where_they_were() -> None:
    table, _, sample = follow(8, 12)
    audit = sample.read(lambda slot: table.m().gather(-1, slot), 3, table.num_used)
    assert audit is not None
    assert (audit.num_original_tokens, audit.start, audit.stop) == (80, 3, 3 + table.num_used)
    numbers = audit.position_A3[:, 0].int().tolist()
    assert len(set(numbers)) == len(numbers) == 12
    for head in range(HEADS):
        assert audit.k_BAND[0, :, head, 0].tolist() == numbers
        for i, number in enumerate(numbers):
            members = table.groups[head][int(audit.owner_BNA[0, head, i]) - 3]
            assert number in members
            assert int(audit.members_BNA[0, head, i]) == len(members)


def test_each_key_has_the_same_chance() -> None:
    counts, num_layers = torch.zeros(60), 600
    for layer in range(num_layers):
        sample = follow_plain(6, 12, layer)
        counts[sample.state()["position"][:, 0].long()] += 1
    share = counts / num_layers
    assert share.mean() == pytest.approx(12 / 60)
    assert (share - 0.2).abs().max() < 5 * (0.2 * 0.8 / num_layers) ** 0.5


def follow_plain(num_chunks: int, num_keys: int, layer: int) -> AuditSample:
    """One slot for all: the sample alone."""
    sample = AuditSample(num_keys, layer)
    for index in range(num_chunks):
        sample.follow(make_chunk(index), torch.zeros(1, HEADS, CHUNK, dtype=torch.long), None)
    return sample


def test_a_restored_sample_goes_on_like_the_unbroken_one() -> None:
    unbroken = follow_plain(4, 12, 5)
    resumed = AuditSample(12, 5)
    resumed.restore({name: tensor.clone() for name, tensor in unbroken.state().items()})
    for sample in (unbroken, resumed):
        for index in range(4, 7):
            sample.follow(make_chunk(index), torch.zeros(1, HEADS, CHUNK, dtype=torch.long), None)
    assert all(torch.equal(tensor, resumed.state()[name]) for name, tensor in unbroken.state().items())
    assert resumed.num_bytes == unbroken.num_bytes > 12 * HEADS * DIM * 4
    resumed.restore({})
    assert (resumed.num_bytes, resumed.state()) == (0, {})

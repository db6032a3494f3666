"""Make room in a full history: pairs merge, as many as room is needed for, and the rest moves together.

Each key has at most one partner, an older key when it came, so pairs form trees, and what the pairs that merge connect
becomes one key group. Which pairs merge is one of two rules. `chains`: the nearest by cosine before RoPE as it is now,
each under its newest key. `pairs`: those that lose least, each under its heavier key (`table_pairs.py`). The key that
stands for a group stays in its place and position; m is the sum; mass and value are sum and mean by weights
exp(-decay |k - k_j|^2 / (2 sqrt D)). Survivors keep their order and stand at the end of the room that is kept.

Sums over members are made in whole numbers, so their order does not matter: the same on every run and device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from workers.cache.partners import History
from workers.cache.table_layout import MergeRule
from workers.cache.table_pairs import choose_links, find_distances, heaviest, pair_loss
from workers.cache.unrotated import TurnBack

_WEIGHT_UNITS = float(2**24)
_VALUE_UNITS = float(2**20)
"""Of a share of a value: int32 holds values up to 2048 to a millionth."""


class Survivors(NamedTuple):
    """What a history becomes: the slots that are kept, at their new places, [N, kept]."""

    source: Tensor
    """Old slot, int64; any where none is."""
    is_key: Tensor
    m: Tensor
    weight: Tensor
    partner: Tensor
    v_NCD: Tensor


@dataclass(frozen=True)
class Room:
    """How room is made."""

    num_keep: int
    """Slots that are kept."""
    num_merges: int
    """How many pairs merge; at most the slots that are given up."""
    rule: MergeRule
    rate: float
    """Of the falling weight, per squared distance."""
    num_listed: int = 0
    """Of the kernels: so many members of a group are summed from a list, the others by atomic sums."""


class Families(NamedTuple):
    """Who belongs to whom, [N, C] of int64 but for the flags."""

    root: Tensor
    """Where the chain of merged pairs ends; the same for all of a group."""
    head: Tensor
    """Stands for the group: it survives."""
    survives: Tensor
    target: Tensor
    """New slot of the group."""


def shrink(
    history: History, v_NLD: Tensor, weight_NC: Tensor, partner_NC: Tensor, turn_back: TurnBack, room: Room, fuse: Fuse
) -> Survivors:
    """Choose and sum; nothing is written.

    Args:
        history: As it stands, full.
        v_NLD: Values, in the slots of the keys.
        weight_NC, partner_NC: Of each slot; partner -1 for none.
        turn_back: RoPE of the model.
        room: How it is made.
        fuse: Pieces that are compiled on a GPU.
    """
    live, num_keep = history.m_NC > 0, room.num_keep
    families = find_families(history, v_NLD, partner_NC, turn_back, room)
    capacity = history.m_NC.shape[1] - num_keep
    victim, is_victim = _list_victims(live & ~families.survives, capacity)
    head = families.head.gather(1, victim)
    inner, squared_victim, squared_head = turn_back.products(history.keys, history.position_NC3, victim, head)
    distance = (squared_victim + squared_head - 2 * inner).clamp(min=0)
    likeness = torch.exp(-room.rate * distance) * is_victim
    w_victim = weight_NC.gather(1, victim) * likeness
    source, is_key = _sources(families, live, num_keep)
    target = families.target.gather(1, victim).clamp(min=0)
    m = torch.where(is_key, history.m_NC.gather(1, source), 0)
    m = m.scatter_add(1, target, torch.where(is_victim, history.m_NC.gather(1, victim), 0))
    w_own = torch.where(is_key, weight_NC.gather(1, source), 0.0)
    added = torch.zeros_like(w_own, dtype=torch.int64)
    added.scatter_add_(1, target, (w_victim.double() * _WEIGHT_UNITS).round().long())
    weight = w_own + (added.double() / _WEIGHT_UNITS).float()
    v = _mean_values(v_NLD, history.start, (source, w_own), (victim, w_victim, target), weight, fuse)
    partner = _new_partners(families, partner_NC, source, is_key)
    return Survivors(source, is_key, m, weight, partner, v)


def find_families(history: History, v_NLD: Tensor, partner_NC: Tensor, turn_back: TurnBack, room: Room) -> Families:
    """Who merges, and where all go. Arguments as of `shrink`."""
    num = history.m_NC.shape[1]
    own = torch.arange(num, device=partner_NC.device).expand_as(partner_NC)
    if room.rule == "pairs":
        v_NCD = v_NLD[:, history.start : history.start + num]
        found = find_distances(history, v_NCD, partner_NC, turn_back)
        loss = pair_loss(found, history.m_NC, partner_NC, turn_back.head_dim)
        root = choose_links(loss, partner_NC, room.num_merges).long()
    else:
        cosine = _pair_cosine(history, partner_NC, turn_back)
        root = torch.where(_highest(cosine, room.num_merges), partner_NC.long(), own)
    for _ in range(num.bit_length()):  # a chain halves with each look
        root = root.gather(1, root)
    if room.rule == "pairs":
        head = heaviest(root, history.m_NC)
    else:
        head = torch.zeros_like(root).scatter_reduce_(1, root, own, "amax").gather(1, root)
    survives = (history.m_NC > 0) & (head == own)
    rank = survives.cumsum(-1)
    target = (rank - 1 + room.num_keep - rank[:, -1:]).gather(1, head)
    return Families(root, head, survives, target)


def _pair_cosine(history: History, partner_NC: Tensor, turn_back: TurnBack) -> Tensor:
    """Cosine of each key with its partner, float32; -inf without one."""
    partner = partner_NC.long().clamp(min=0)
    inner, own, other = turn_back.products(history.keys, history.position_NC3, None, partner)
    cosine = inner / (own * other).clamp(min=1e-30).sqrt()
    return cosine.masked_fill((partner_NC < 0) | (history.m_NC == 0), -torch.inf)


def _highest(x_NC: Tensor, num: int) -> Tensor:
    """The `num` highest of each row, of equal ones the first; never -inf."""
    if num == 0:
        return torch.zeros_like(x_NC, dtype=torch.bool)
    least = x_NC.topk(num, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = x_NC > least, x_NC == least
    room = num - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))) & ~x_NC.isneginf()


def _list_victims(is_victim_NC: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Slots that are given up, in order, [N, capacity]; and which entries of the list are in use."""
    heads, num = is_victim_NC.shape
    place = torch.where(is_victim_NC, is_victim_NC.cumsum(-1) - 1, capacity).clamp(max=capacity)
    own = torch.arange(num, device=place.device).expand(heads, num)
    listed = own.new_zeros(heads, capacity + 1).scatter_(1, place, own)[:, :capacity]
    used = torch.arange(capacity, device=place.device) < is_victim_NC.sum(-1, keepdim=True)
    return listed, used


def _sources(families: Families, live_NC: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    heads, num = live_NC.shape
    own = torch.arange(num, device=live_NC.device).expand(heads, num)
    place = torch.where(families.survives, families.target, num_keep).clamp(min=0)
    source = own.new_zeros(heads, num_keep + 1).scatter_(1, place, own)[:, :num_keep]
    is_key = torch.arange(num_keep, device=own.device) >= num_keep - families.survives.sum(-1, keepdim=True)
    return source, is_key


def _mean_values(
    v_NLD: Tensor, start: int, kept: tuple[Tensor, Tensor], given_up: tuple[Tensor, Tensor, Tensor], weight: Tensor,
    fuse: Fuse,
) -> Tensor:  # fmt: skip
    """Mean value of each group by the weights of its members, [N, kept, D]."""
    (source, w_own), (victim, w_victim, target) = kept, given_up
    heads, num_keep = source.shape
    total = weight.clamp(min=1e-30)
    share_NR = w_victim / total.gather(1, target)
    part = fuse.scaled(v_NLD, victim + start, share_NR)
    base = torch.arange(heads, device=source.device)[:, None] * num_keep
    summed = torch.zeros(heads * num_keep, part.shape[-1], dtype=torch.int32, device=part.device)
    summed.index_add_(0, (target + base).flatten(), part.flatten(0, 1))
    return fuse.mean(v_NLD, source + start, w_own / total, summed.view(heads, num_keep, -1))


def scale_values(v_NLD: Tensor, slot_NR: Tensor, share_NR: Tensor) -> Tensor:
    """Shares of these values in whole numbers."""
    head_N1 = torch.arange(v_NLD.shape[0], device=v_NLD.device)[:, None]
    return (v_NLD[head_N1, slot_NR].float() * (share_NR * _VALUE_UNITS)[..., None]).round().to(torch.int32)


def add_shares(v_NLD: Tensor, slot_NR: Tensor, share_NR: Tensor, summed_NRD: Tensor) -> Tensor:
    """A share of these values, and the sum of others in whole numbers."""
    head_N1 = torch.arange(v_NLD.shape[0], device=v_NLD.device)[:, None]
    mean = v_NLD[head_N1, slot_NR].float() * share_NR[..., None] + summed_NRD.float() / _VALUE_UNITS
    return mean.to(v_NLD.dtype)


class Fuse:
    """The two pieces above, compiled or not."""

    def __init__(self) -> None:
        self.scaled: Callable[[Tensor, Tensor, Tensor], Tensor] = scale_values
        self.mean: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = add_shares

    def compile(self, backend: str | Callable[..., object]) -> None:
        self.scaled = torch.compile(scale_values, dynamic=False, backend=backend)
        self.mean = torch.compile(add_shares, dynamic=False, backend=backend)


def _new_partners(families: Families, partner_NC: Tensor, source: Tensor, is_key: Tensor) -> Tensor:
    """A group keeps the partner of its root, which is outside of it; -1 for none."""
    old = partner_NC.gather(1, families.root.gather(1, source)).long()
    new = families.target.gather(1, old.clamp(min=0))
    return torch.where((old >= 0) & is_key, new, -1).to(torch.int32)

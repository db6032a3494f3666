"""Key groups of one layer: keys of one thing over time under one key, in a table of fixed size.

A group is (newest key, mean value, m) and its logit gets log m, which is exact when its keys are equal (FAST-AR, arXiv
2602.01801, section 5.2 and lemma 5.1). Where they are not, log m gives a key the mass of others that a query would have
passed over. So each member counts by what a query equal to the group's key would give it: exp(-decay |k - k_j|^2 /
(2 sqrt(D))), which is 1 for equal keys; the value is the mean by these weights. decay 0 is the paper's rule.

When the table is full, the groups that are nearest to the one they nearly joined when they were opened join it now: the
threshold gives way just as far as the budget asks, and no group is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.cache.low_bit import Storage, VectorStore
from workers.cache.slot_sums import sum_by_slot

Nearest = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(queries_BNQD, keys_BNCD) -> index and cosine of each query's nearest key, [B, N, Q]; empty slots are zero keys."""

CELL_UNITS = 8
"""Rows and columns are stored in eighths of a token."""
SLOT_BYTES = 4 + 4 + 4 + 4 + 4
"""Of a slot besides key and value: time, cell, m, weight, partner."""


@dataclass(frozen=True)
class Rule:
    """Which pairs a full table merges."""

    score: str = "cosine"
    matching: bool = False
    free_share: int = 5
    value_scale: float = 0.0
    keeps_heaviest: bool = False


@dataclass
class Tokens:
    """Keys to be absorbed, per head: newer ones have higher indices."""

    k_BNQD: Tensor
    v_BNQD: Tensor
    position_BNQ3: Tensor


class KeyGroups:
    """The table of one layer.

    Args:
        shape_BNCD: Batch, heads, slots, channels.
        storage, dtype: Of keys and values.
        device: Where the table lies.
        nearest: Who is near whom.
        decay: How fast unlike members lose their mass; 0 gives a group the full mass of all its members.
    """

    def __init__(
        self,
        shape_BNCD: tuple[int, int, int, int],
        storage: Storage | tuple[Storage, Storage],
        dtype: torch.dtype,
        device: torch.device,
        nearest: Nearest,
        decay: float,
        rule: Rule | None = None,
    ) -> None:
        self._rule = rule or Rule()
        batch, heads, self.num_slots, dim = shape_BNCD
        # The last slot takes writes that are meant for nobody.
        slots = (batch, heads, self.num_slots + 1)
        keys, values = storage if isinstance(storage, tuple) else (storage, storage)
        self._k = VectorStore((*slots, dim), keys, dtype, device, centred=True)
        self._v = VectorStore((*slots, dim), values, dtype, device)
        self.time_BNC = torch.zeros(slots, dtype=torch.int32, device=device)
        self.cell_BNC2 = torch.zeros((*slots, 2), dtype=torch.int16, device=device)
        self.m_BNC = torch.zeros(slots, dtype=torch.int32, device=device)
        self.weight_BNC = torch.zeros(slots, device=device)
        """Mass of the group: the sum of its members' weights."""
        self.partner_BNC = torch.full(slots, -1, dtype=torch.int32, device=device)
        """The group that this one nearly joined, always an older slot; -1 for none."""
        self.count_BN = torch.zeros(slots[:2], dtype=torch.int64, device=device)
        self.num_used = 0
        """Slots up to the fullest head's last one."""
        self._nearest = nearest
        self._rate = decay / (2 * math.sqrt(dim))

    def absorb(self, new: Tokens, min_cosine_BN1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Let each key join its nearest group, or open one of its own.

        Args:
            new: Keys newer than all absorbed before.
            min_cosine_BN1: A key joins from this cosine on; above 1 none does.
        Returns:
            The slot of each key [B, N, Q], and, when the table was compacted, where
            each old slot has gone [B, N, C].
        """
        index, cosine = self._match(new)
        joins = cosine >= min_cosine_BN1
        moved = self._make_room((~joins).sum(-1))
        if moved is not None:
            index = torch.where(index >= 0, moved.gather(2, index.clamp(min=0)), index)
        if bool(joins.any()):
            self._join(new, index, joins)
        slot = torch.where(joins, index, self._open(new, ~joins))
        self._remember_partners(new, torch.where(joins, -1, cosine), index, slot)
        return slot, moved

    def read_into(self, k_BNCD: Tensor, v_BNCD: Tensor) -> None:
        """Write keys and values of the slots in use."""
        self._k.read(self.num_used, k_BNCD)
        self._v.read(self.num_used, v_BNCD)

    def read_records(self) -> tuple[Tensor, Tensor]:
        """position_BNC3 (float32) and log_mass_BNC of the slots in use; -inf where a head has none."""
        stop = self.num_used
        cell = self.cell_BNC2[:, :, :stop].float() / CELL_UNITS
        position = torch.cat((self.time_BNC[:, :, :stop, None].float(), cell), dim=-1)
        return position, self.weight_BNC[:, :, :stop].log()

    def count_members(self, slot_BNA: Tensor) -> Tensor:
        """How many keys the groups in these slots hold, whatever they count for."""
        return self.m_BNC.gather(2, slot_BNA)

    @property
    def num_bytes(self) -> int:
        """Of the slots in use, up to the fullest head's last one."""
        slots = self.m_BNC[:, :, : self.num_used].numel()
        return slots * (self._k.vector_bytes + self._v.vector_bytes + SLOT_BYTES)

    def state(self) -> Mapping[str, Tensor]:
        """Every tensor that decides what comes."""
        own = {name: getattr(self, name) for name in _STATE}
        return own | {f"{n}.{k}": t for n, s in (("k", self._k), ("v", self._v)) for k, t in s.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become the table that `state` came from."""
        for name in _STATE:
            setattr(self, name, state[name].clone())
        for name, store in (("k", self._k), ("v", self._v)):
            prefix = f"{name}."
            store.restore({key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)})
        self.num_used = int(self.count_BN.max())

    def _match(self, new: Tokens) -> tuple[Tensor, Tensor]:
        if self.num_used == 0:
            none = self.partner_BNC.new_full(new.k_BNQD.shape[:3], -1, dtype=torch.int64)
            return none, torch.full(none.shape, -math.inf, device=none.device)
        # Vacant slots are zero, so none of them is near anything; where all is far, one may still be found.
        keys = self._k.read(self.num_used)
        own = torch.arange(self.num_used, device=keys.device)
        keys = keys.masked_fill((own >= self.count_BN[..., None])[..., None], 0)
        index, cosine = self._nearest(new.k_BNQD, keys)
        exists = index < self.count_BN[..., None]
        return torch.where(exists, index, -1), cosine.float().masked_fill(~exists, -math.inf)

    def _join(self, new: Tokens, index_BNQ: Tensor, joins_BNQ: Tensor) -> None:
        """Fold keys into their groups; the newest of those that join the same group stands for it."""
        same = (index_BNQ[..., None] == index_BNQ[..., None, :]) & joins_BNQ[..., None] & joins_BNQ[..., None, :]
        newer = torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).triu(1)
        is_newest = joins_BNQ & ~(same & newer).any(-1)
        slot = torch.where(is_newest, index_BNQ, self.num_slots)
        k, v = new.k_BNQD.float(), new.v_BNQD.float()
        share = same * self._likeness(torch.cdist(k, k).square())
        w_old = self.weight_BNC.gather(2, slot) * self._likeness((self._k.gather(slot).float() - k).square().sum(-1))
        weight = w_old + share.sum(-1)
        self._v.write(
            slot, (self._v.gather(slot).float() * w_old[..., None] + share @ v) / weight.clamp(min=1e-30)[..., None]
        )
        self._k.write(slot, new.k_BNQD)
        self._place(slot, new.position_BNQ3, self.m_BNC.gather(2, slot) + same.sum(-1, dtype=torch.int32), weight)

    def _open(self, new: Tokens, opens_BNQ: Tensor) -> Tensor:
        """New groups, in the order of their keys; their slots."""
        slot = self.count_BN[..., None] + opens_BNQ.cumsum(-1) - 1
        slot = torch.where(opens_BNQ, slot, self.num_slots)
        self._k.write(slot, new.k_BNQD)
        self._v.write(slot, new.v_BNQD)
        ones = torch.ones_like(slot)
        self._place(slot, new.position_BNQ3, ones.to(torch.int32), ones.float())
        self.count_BN = self.count_BN + opens_BNQ.sum(-1)
        self.num_used = int(self.count_BN.max())
        return slot

    def _remember_partners(self, new: Tokens, cosine_BNQ: Tensor, index_BNQ: Tensor, slot_BNQ: Tensor) -> None:
        """The nearest older group of each new one: in the table, or of an earlier latent frame among the new keys."""
        unit = torch.nn.functional.normalize(new.k_BNQD.float(), dim=-1)
        time = new.position_BNQ3[0, 0, :, 0]
        among = (unit @ unit.mT).masked_fill(time[None, :] >= time[:, None], -math.inf)
        best, neighbour = among.max(-1)
        partner = torch.where(best > cosine_BNQ, slot_BNQ.gather(2, neighbour), index_BNQ)
        # A key that joined a group has no slot of its own, and the group keeps its own partner.
        own = torch.where(cosine_BNQ == -1, self.num_slots, slot_BNQ)
        self.partner_BNC.scatter_(2, own, partner.to(torch.int32))

    def _likeness(self, squared_distance: Tensor) -> Tensor:
        """What a member so far from its group's key counts for, in (0, 1]."""
        return torch.exp(-self._rate * squared_distance)

    def _place(self, slot_BNR: Tensor, position_BNR3: Tensor, m_BNR: Tensor, weight_BNR: Tensor) -> None:
        time, cell = position_BNR3[..., 0].to(torch.int32), position_BNR3[..., 1:] * CELL_UNITS
        self.time_BNC.scatter_(2, slot_BNR, time)
        self.cell_BNC2.scatter_(2, slot_BNR[..., None].expand(*slot_BNR.shape, 2), cell.round().to(torch.int16))
        self.m_BNC.scatter_(2, slot_BNR, m_BNR)
        self.weight_BNC.scatter_(2, slot_BNR, weight_BNR)
        self.m_BNC[..., -1] = 0
        self.weight_BNC[..., -1] = 0

    def _make_room(self, needed_BN: Tensor) -> Tensor | None:
        """Where each slot has gone, if the table had to be compacted for so many new groups."""
        missing = self.count_BN + needed_BN - self.num_slots
        if int(missing.max()) <= 0:
            return None
        ample = torch.maximum(missing, torch.full_like(missing, self.num_slots // self._rule.free_share))
        return self._compact(torch.where(missing > 0, ample, 0).minimum((self.count_BN - 1).clamp(min=0)))

    def _compact(self, num_BN: Tensor) -> Tensor:
        """Let `num_BN` groups of each head join their partners, the nearest first; where each slot has gone."""
        stop = self.num_used
        k, v = self._k.read(stop), self._v.read(stop)
        root = self._choose_roots(k, v, num_BN)
        own = torch.arange(stop, device=root.device)
        in_use = own < self.count_BN[..., None]
        survives = (root == own) & in_use
        target = (survives.cumsum(-1) - 1).gather(2, root)
        target = torch.where(in_use, target, self.num_slots)
        # Time, then age in the table, decides which key is the newest of those that meet.
        age = self.time_BNC[:, :, :stop].long() * (stop + 1) + own
        if self._rule.keeps_heaviest:
            age = age + (self.m_BNC[:, :, :stop].long().clamp(max=2**20) << 40)
        newest = age.new_zeros((*age.shape[:2], self.num_slots + 1)).scatter_reduce(2, target, age, "amax")
        source = ((newest & (2**40 - 1)) % (stop + 1)).clamp(max=stop - 1)
        partner_root = root.gather(2, self.partner_BNC[:, :, :stop].long().clamp(min=0))
        partner = torch.where(self.partner_BNC[:, :, :stop] >= 0, target.gather(2, partner_root), -1)
        merged = self._sum_by_target(k, v, target, source)
        self.count_BN = survives.sum(-1)
        self.num_used = int(self.count_BN.max())
        self._rewrite(merged, source)
        self.partner_BNC.fill_(-1)
        self.partner_BNC.scatter_(2, torch.where(survives, target, self.num_slots), partner.to(torch.int32))
        return target

    def _choose_roots(self, k_BNCD: Tensor, v_BNCD: Tensor, num_BN: Tensor) -> Tensor:
        """For each slot the slot that it ends in, after the nearest groups have joined their partners."""
        partner = self.partner_BNC[:, :, : k_BNCD.shape[2]].long()
        own = torch.arange(k_BNCD.shape[2], device=partner.device)
        may = (partner >= 0) & (own < self.count_BN[..., None])
        score = self._score(k_BNCD, v_BNCD, partner.clamp(min=0)).masked_fill(~may, -math.inf)
        order = score.argsort(dim=-1, descending=True, stable=True)
        if self._rule.matching:
            first = may & self._is_apart(partner, may)
            order = order.gather(-1, (~first).gather(-1, order).long().argsort(dim=-1, stable=True))
        rank = order.argsort(dim=-1, stable=True)
        root = torch.where(may & (rank < num_BN[..., None]), partner, own)
        for _ in range(max(1, k_BNCD.shape[2].bit_length())):  # a chain halves with each look
            root = root.gather(2, root)
        return root

    def _is_apart(self, partner: Tensor, may: Tensor) -> Tensor:
        """Every other link of each chain of partners: pairs that merge without one another."""
        depth = (partner >= 0).long()
        own = torch.arange(partner.shape[-1], device=partner.device).expand_as(partner)
        jump = torch.where(partner >= 0, partner, own)
        for _ in range(int(partner.shape[-1]).bit_length()):
            depth = depth + depth.gather(2, jump)
            jump = jump.gather(2, jump)
        is_odd = may & (depth % 2 == 1)
        is_even = may & (depth % 2 == 0)
        return torch.where(is_odd.sum(-1, keepdim=True) >= is_even.sum(-1, keepdim=True), is_odd, is_even)

    def _score(self, k: Tensor, v: Tensor, partner: Tensor) -> Tensor:
        k = k.float()
        other = k.gather(2, partner[..., None].expand_as(k))
        if self._rule.score == "cosine":
            return torch.nn.functional.cosine_similarity(k, other, dim=-1)
        damage = (k - other).square().sum(-1) / (2 * math.sqrt(k.shape[-1]))
        if self._rule.value_scale:
            v = v.float()
            there = v.gather(2, partner[..., None].expand_as(v))
            part = (v - there).square().sum(-1) / v.square().sum(-1).mean(-1, keepdim=True)
            damage = damage + self._rule.value_scale * part
        if self._rule.score == "ward":
            m = self.m_BNC[:, :, : k.shape[2]].float()
            a, b = m, m.gather(2, partner)
            damage = (damage + 1e-3) * a * b / (a + b)
        elif self._rule.score == "mass":
            damage = (damage + 1e-3) * self.m_BNC[:, :, : k.shape[2]].float().gather(2, partner)
        return -damage

    def _sum_by_target(
        self, k_BNCD: Tensor, v_BNCD: Tensor, target_BNC: Tensor, source_BNC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """m, weight and mean value of each new slot, from all that went there."""
        stop = k_BNCD.shape[2]
        num_slots = self.num_slots + 1
        key_slot = source_BNC.gather(2, target_BNC)
        distance = (k_BNCD.float() - k_BNCD.gather(2, _widen(key_slot, k_BNCD)).float()).square().sum(-1)
        weight = self.weight_BNC[:, :, :stop] * self._likeness(distance)
        m_new = self.m_BNC.new_zeros((*target_BNC.shape[:2], num_slots))
        m_new.scatter_add_(2, target_BNC, self.m_BNC[:, :, :stop])
        w_new = sum_by_slot(weight, target_BNC, num_slots)
        v_sum = sum_by_slot(v_BNCD.float() * weight[..., None], target_BNC, num_slots)
        return m_new, w_new, v_sum / w_new.clamp(min=1e-30)[..., None]

    def _rewrite(self, merged: tuple[Tensor, Tensor, Tensor], source_BNC: Tensor) -> None:
        """Write the surviving groups to the front; each takes key and position of its newest member."""
        m, weight, v = (x[:, :, : self.num_used] for x in merged)
        slot = torch.arange(self.num_used, device=m.device).expand(*m.shape[:2], -1)
        slot = torch.where(slot < self.count_BN[..., None], slot, self.num_slots)
        source = source_BNC[:, :, : self.num_used]
        self._k.move(source, slot)
        self._v.clear()
        self._v.write(slot, v)
        time, cell = self.time_BNC.gather(2, source), self.cell_BNC2.gather(2, _widen(source, self.cell_BNC2))
        self.m_BNC.zero_()
        self.weight_BNC.zero_()
        position = torch.cat((time[..., None].double(), cell.double() / CELL_UNITS), -1)
        self._place(slot, position, m, weight)


def _widen(index_BNR: Tensor, like: Tensor) -> Tensor:
    return index_BNR[..., None].expand(*index_BNR.shape, like.shape[-1])


_STATE = ("time_BNC", "cell_BNC2", "m_BNC", "weight_BNC", "partner_BNC", "count_BN")

"""Key groups of one layer: keys of one thing over time under one key, in a table of fixed size.

A group is (key, mean value, m) and its logit gets log m, which is exact when its keys are equal (FAST-AR, arXiv
2602.01801, section 5.2 and lemma 5.1). A key that is near enough to a group joins it and stands for it from then on.

When the table is full, pairs of groups merge, as many as room is needed for and those with the least loss (`pairs.py`):
the threshold gives way just as far as the budget asks, and no key is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.cache.entry_records import EntryRecords
from workers.cache.low_bit import Storage, VectorStore
from workers.cache.near_tiles import Nearest, TileMeans, nearest_in_store
from workers.cache.pairs import choose_merges, loss_in_stores, toward_partners
from workers.cache.slot_sums import sum_by_slot
from workers.rows import take_slots

SLOT_BYTES = 4 + 4
"""Of a slot besides key, value and record: m and partner."""
_FREE_SHARE = 8
"""A full table gives back one slot in so many, so that it is not compacted for every chunk."""


@dataclass
class Tokens:
    """Keys to be absorbed, per head: newer ones have higher indices."""

    k_BNQD: Tensor
    v_BNQD: Tensor
    position_BNQ3: Tensor


@dataclass(frozen=True)
class TableForm:
    """What a table is made for; all of its memory is reserved at once."""

    shape_BNCD: tuple[int, int, int, int]
    """Batch, heads, slots, channels."""
    storage: Storage
    """Of keys and values."""
    num_before: int
    """Entries that a reader sees before the groups."""
    num_behind: int
    """And the most behind them, at least 1."""


class KeyGroups:
    """The table of one layer.

    Args:
        form: Sizes.
        dtype: Of keys and values.
        device: Where the table lies.
        nearest: Who is near whom.
    """

    def __init__(self, form: TableForm, dtype: torch.dtype, device: torch.device, nearest: Nearest) -> None:
        batch, heads, self.num_slots, dim = form.shape_BNCD
        # The last slot takes writes that are meant for nobody.
        slots = (batch, heads, self.num_slots + 1)
        self.keys, self.values = (VectorStore((*slots, dim), form.storage, dtype, device) for _ in range(2))
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.records = EntryRecords(form.shape_BNCD[:3], form.num_before, form.num_behind, self._wide, device)
        self.m_BNC = torch.zeros(slots, dtype=torch.int32, device=device)
        self.partner_BNC = torch.full(slots, -1, dtype=torch.int32, device=device)
        """The group that this one nearly joined, always an older slot; -1 for none."""
        self.count_BN = torch.zeros(slots[:2], dtype=torch.int64, device=device)
        self.num_used = 0
        """Slots up to the fullest head's last one."""
        self.num_changes = 0
        """How often slots that held a group have got another key, place or m."""
        self._nearest, self._means = nearest, TileMeans(form.shape_BNCD, device)

    def absorb(self, new: Tokens, min_cosine_BN1: Tensor) -> tuple[Tensor, Tensor | None]:
        """Let each key join its nearest group, or open one of its own.

        Args:
            new: Keys newer than all absorbed before.
            min_cosine_BN1: A key joins from this cosine on; above 1 none does.
        Returns:
            The slot of each key [B, N, Q], and, when the table was compacted, where
            each old slot has gone [B, N, C].
        """
        self.records.begin_change(self.num_used)
        index, cosine = self._match(new)
        joins = cosine >= min_cosine_BN1
        moved = self._make_room((~joins).sum(-1))
        if moved is not None:
            index = torch.where(index >= 0, moved.gather(2, index.clamp(min=0)), index)
        if bool(joins.any()):
            self.num_changes += 1
            self._join(new, index, joins)
        slot = torch.where(joins, index, self._open(new, ~joins))
        self._remember_partners(new, torch.where(joins, -1, cosine), index, slot)
        return slot, moved

    def read_into(self, k_BNCD: Tensor, v_BNCD: Tensor) -> None:
        """Write keys and values of the slots in use."""
        self.keys.read(self.num_used, k_BNCD)
        self.values.read(self.num_used, v_BNCD)

    def count_members(self, slot_BNA: Tensor) -> Tensor:
        """How many keys the groups in these slots hold."""
        return self.m_BNC.gather(2, slot_BNA)

    @property
    def num_bytes(self) -> int:
        """Reserved: what the table takes of memory, however many slots are in use."""
        own = self.m_BNC.nbytes + self.partner_BNC.nbytes + self.count_BN.nbytes
        return own + self.keys.num_bytes + self.values.num_bytes + self.records.num_bytes + self._means.num_bytes

    def state(self) -> Mapping[str, Tensor]:
        """Every tensor that decides what comes."""
        own = {name: getattr(self, name) for name in _STATE}
        own |= {"position_BNC3": self.records.position_BNC3, "log_mass_BNC": self.records.log_mass_BNC}
        return own | {f"{n}.{k}": t for n, s in (("k", self.keys), ("v", self.values)) for k, t in s.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Become the table that `state` came from (copied)."""
        for name in _STATE:
            getattr(self, name).copy_(state[name])
        self.records.position_BNC3.copy_(state["position_BNC3"])
        self.records.log_mass_BNC.copy_(state["log_mass_BNC"])
        for name, store in (("k", self.keys), ("v", self.values)):
            store.restore({part: state[f"{name}.{part}"] for part in ("code", "scale")})
        self._means.forget()
        self.num_changes += 1
        self.num_used = int(self.count_BN.max())

    def _match(self, new: Tokens) -> tuple[Tensor, Tensor]:
        if self.num_used == 0:
            none = self.partner_BNC.new_full(new.k_BNQD.shape[:3], -1, dtype=torch.int64)
            return none, torch.full(none.shape, -math.inf, device=none.device)
        # Vacant slots are zero, so none of them is near anything; where all is far, one may still be found.
        index, cosine = nearest_in_store(self._nearest, new.k_BNQD, self.keys, self.num_used, self._means)
        exists = index < self.count_BN[..., None]
        return torch.where(exists, index, -1), cosine.float().masked_fill(~exists, -math.inf)

    def _join(self, new: Tokens, index_BNQ: Tensor, joins_BNQ: Tensor) -> None:
        """Fold keys into their groups; the newest of those that join the same group stands for it."""
        same = (index_BNQ[..., None] == index_BNQ[..., None, :]) & joins_BNQ[..., None] & joins_BNQ[..., None, :]
        newer = torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).triu(1)
        is_newest = joins_BNQ & ~(same & newer).any(-1)
        slot = torch.where(is_newest, index_BNQ, self.num_slots)
        m_old = self.m_BNC.gather(2, slot)
        m = m_old + same.sum(-1, dtype=torch.int32)
        joined = same.to(self._wide) @ new.v_BNQD.to(self._wide)
        self.values.write(slot, _mean(self.values.gather(slot), m_old, joined, m))
        self.keys.write(slot, new.k_BNQD)
        self._means.forget(int(slot.min()))
        self._place(slot, new.position_BNQ3, m)

    def _open(self, new: Tokens, opens_BNQ: Tensor) -> Tensor:
        """New groups, in the order of their keys; their slots."""
        slot = self.count_BN[..., None] + opens_BNQ.cumsum(-1) - 1
        slot = torch.where(opens_BNQ, slot, self.num_slots)
        self.keys.write(slot, new.k_BNQD)
        self.values.write(slot, new.v_BNQD)
        self._means.forget(int(self.count_BN.min()))
        self._place(slot, new.position_BNQ3, torch.ones_like(slot, dtype=torch.int32))
        self.count_BN += opens_BNQ.sum(-1)
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

    def _place(self, slot_BNR: Tensor, position_BNR3: Tensor, m_BNR: Tensor) -> None:
        self.records.write(slot_BNR, position_BNR3, m_BNR)
        self.m_BNC.scatter_(2, slot_BNR, m_BNR)
        self.m_BNC[..., -1] = 0

    def _make_room(self, needed_BN: Tensor) -> Tensor | None:
        """Where each slot has gone, if the table had to be compacted for so many new groups."""
        missing = self.count_BN + needed_BN - self.num_slots
        if int(missing.max()) <= 0:
            return None
        ample = torch.maximum(missing, torch.full_like(missing, self.num_slots // _FREE_SHARE))
        num = torch.where(missing > 0, ample, 0).minimum((self.count_BN - 1).clamp(min=0))
        return self._compact(num)

    def _compact(self, num_BN: Tensor) -> Tensor:
        """Let `num_BN` groups of each head join their partners, those with the least loss; where each slot has gone."""
        stop = self.num_used
        m, own = self.m_BNC[:, :, :stop], torch.arange(stop, device=num_BN.device)
        toward = toward_partners(m, self.partner_BNC[:, :, :stop])
        root, keeper = choose_merges(loss_in_stores(self.keys, self.values, m, toward), toward, m, num_BN)
        survives = (root == own) & (m > 0)
        rank = survives.cumsum(-1) - 1
        target = torch.where(m > 0, rank.gather(2, root), self.num_slots)
        self._merge_values(root, int(num_BN.max()))
        # The slots that are left, side by side: each with its group's value and the key that stands for it.
        source = own.new_full((*m.shape[:2], stop + 1), -1)
        source = source.scatter_(2, torch.where(survives, rank, stop), own.expand_as(root))[..., :stop]
        is_any, held = source >= 0, source.clamp(min=0)
        stands = torch.where(is_any, keeper.gather(2, held), -1)
        partner = self.partner_BNC.gather(2, held).long()
        partner = torch.where(is_any & (partner >= 0), target.gather(2, root.gather(2, partner.clamp(min=0))), -1)
        self.partner_BNC.fill_(-1)[:, :, :stop] = partner.to(torch.int32)
        self.values.rearrange(source)
        self.keys.rearrange(stands)
        m_all = torch.zeros_like(self.m_BNC).scatter_add_(2, target, m)
        m_all[..., -1] = 0
        self.m_BNC.copy_(m_all)
        self.records.rearrange(stands, m_all)
        self.count_BN.copy_(survives.sum(-1))
        self.num_used = int(self.count_BN.max())
        self._means.forget()
        self.num_changes += 1
        return target

    def _merge_values(self, root_BNC: Tensor, most: int) -> None:
        """Groups that others join (at most so many) get the mean value of all, in the slot of the root."""
        own = torch.arange(root_BNC.shape[2], device=root_BNC.device)
        joining = _first_true(root_BNC != own, most)  # slot 0, the oldest, joins nobody
        target = root_BNC.gather(2, joining)
        m = self.m_BNC.gather(2, joining) * (target != joining)
        m_root = self.m_BNC.gather(2, target)
        part = self.values.gather(joining).to(self._wide) * m[..., None]
        # A root that several join stands here once for each of them, every time with the sum over all.
        place = _first_place(target, len(own))
        joined = take_slots(sum_by_slot(part, place, target.shape[2]), place)
        m_all = torch.zeros_like(m).scatter_add_(2, place, m).gather(2, place) + m_root
        mean = _mean(self.values.gather(target), m_root, joined, m_all)
        self.values.write(torch.where(target != joining, target, self.num_slots), mean)


def _first_true(is_it_BNC: Tensor, num: int) -> Tensor:
    """Where the first ones are, in order; too few are followed by slot 0."""
    place = torch.where(is_it_BNC, is_it_BNC.cumsum(-1) - 1, num).clamp(max=num)
    own = torch.arange(is_it_BNC.shape[2], device=place.device).expand_as(place)
    return own.new_zeros((*place.shape[:2], num + 1)).scatter_(2, place, own)[..., :num]


def _first_place(target_BNR: Tensor, num_slots: int) -> Tensor:
    """For each entry, the first one with the same target: so sums need no room for all slots."""
    own = torch.arange(target_BNR.shape[2], device=target_BNR.device).expand_as(target_BNR)
    first = own.new_full((*target_BNR.shape[:2], num_slots), target_BNR.shape[2])
    return first.scatter_reduce_(2, target_BNR, own, "amin").gather(2, target_BNR)


def _mean(v_BNRD: Tensor, m_BNR: Tensor, sum_BNRD: Tensor, m_all_BNR: Tensor) -> Tensor:
    """Mean value of m keys and others, of which the sum is given; in the dtype of the sum."""
    return (v_BNRD.to(sum_BNRD.dtype) * m_BNR[..., None] + sum_BNRD) / m_all_BNR.clamp(min=1)[..., None]


_STATE = ("m_BNC", "partner_BNC", "count_BN")

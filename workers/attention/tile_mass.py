"""How much softmax mass lies in each tile of keys, from a few keys of it: what a selection of tiles is made by.

A tile's mass for a query is the sum of exp(logit) m over a sample of its keys, times how many keys each stands for. The
logits are those after RoPE: on the bundled model, means of keys lose most of what RoPE tells apart, and 8 of 64 keys
come within 0.01 recall of choosing by the true mass. Which keys are looked at depends on places alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from workers.contracts import KeyValues
from workers.packed_keys import PackedKeys
from workers.search.protocol import MAX_SCORES, Search

Rotate = Callable[[KeyValues], KeyValues]
"""RoPE of keys at their positions as this chunk sees them; values are passed on."""

_MAX_SHORTFALL = 1.5  # at 2 the worst head of the bundled model loses 0.04 recall more, at the same density
_SURE_SHARE = 2
"""Of what is to be seen each head and query tile has one in so many for sure, the rest is competed for. With a slow
camera a place lies in many tiles, each of them light, and the heads that look for it would lose them to heads whose few
are heavy: with one in 16 for sure, three such worlds lost 0.2 to 0.3 dB that they do not lose now."""
_LEAST_MASS = 0.16
"""Of a tile, times the number that is to be seen. On the bundled model a tenth more is seen with it than that number,
in the next chunk and in views of the past."""
_USUAL = 1.16
"""Times the number that is to be seen: what layers shall see on average."""
_FIRMNESS = 6
"""Power of what layers see, as a share of that, by which the next one ends at another mass. Without it chunks of the
bundled model see 63 (of 99, at frame 440) to 82 latent frames (from frame 1000 on), with it 76 to 84, at a recall that
is the same to 0.002."""

Shared = dict[tuple[int, ...], tuple[Tensor, Tensor]]
"""Positions by address -> themselves (kept, so that the address is not given to others) and those of a sample: layers
with the same positions then share one rotation table. To be emptied when a chunk begins."""


class TileSample(NamedTuple):
    """Some keys of each tile, after RoPE; tile by tile, equally many of each."""

    k_BNSD: Tensor
    log_weight_BNS: Tensor
    """Log of how many keys each stands for (log m included), -inf where there is none; broadcasts over B and N."""
    num_tiles: int


class TileMass(NamedTuple):
    """Shares of the softmax, averaged over the queries of a tile."""

    history_BNIJ: Tensor
    rest_BNI: Tensor
    """Of what is seen anyway."""


def sample_places(num_keys: int, tile: int, num_samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which places of each tile are looked at, and how many keys each stands for.

    One in each of `num_samples` equal stretches, at a place within it that changes from stretch to stretch and from
    tile to tile: with one fixed place, tiles that are whole rows of a picture would show one column only.

    Returns:
        place_S int64, below `num_keys`, and weight_S float32, tile by tile.
    """
    start_J1 = torch.arange(0, num_keys, tile, device=device)[:, None]
    size_J1 = (num_keys - start_J1).clamp(max=tile)
    stretch_S = torch.arange(num_samples, device=device)
    shift_JS = (stretch_S * 5 + torch.arange(len(start_J1), device=device)[:, None] * 3) % 8 / 8
    place_JS = start_J1 + ((stretch_S + shift_JS) * (size_J1 / num_samples)).long()
    weight_JS = (size_J1 / num_samples).expand_as(place_JS)
    return place_JS.flatten(), weight_JS.flatten()


def sample_tiles(
    keys: KeyValues,
    tile: int,
    num_samples: int,
    rotate: Rotate | None = None,
    *,
    key_order_BNK: Tensor | None = None,
    shared: Shared | None = None,
    first_tile: int = 0,
) -> TileSample:
    """Look at `num_samples` keys of each tile, from `first_tile` on.

    Args:
        keys: Before RoPE.
        tile: Keys of a tile; the last may be short.
        num_samples: At most `tile`.
        rotate: None takes the keys as they are.
        key_order_BNK: Which key stands at each place.
        shared: What other layers found.
    """
    places = sample_places(keys.num_tokens, tile, num_samples, keys.position_K3.device)
    place_S, weight_S = (x[first_tile * num_samples :] for x in places)
    sample = take_keys(keys, place_S if key_order_BNK is None else key_order_BNK[:, :, place_S])
    position = keys.position_K3
    if shared is not None and key_order_BNK is None and position.dim() == 2:
        key = position.data_ptr(), position.numel(), tile, num_samples
        sample = replace(sample, position_K3=shared.setdefault(key, (position, sample.position_K3))[1])
    k_BSND = (sample if rotate is None else rotate(sample)).k_BKND
    log_weight = weight_S.log()[None, None]
    if sample.log_mass_BNK is not None:
        log_weight = log_weight + sample.log_mass_BNK.float()
    return TileSample(k_BSND.transpose(1, 2), log_weight, -(-keys.num_tokens // tile) - first_tile)


def take_keys(keys: KeyValues, index: Tensor) -> KeyValues:
    """Some keys: index_S, the same for all heads, or index_BNS. The values are not taken: keys stand in their place."""
    position, mass = keys.position_K3, keys.log_mass_BNK
    if isinstance(keys, PackedKeys) and keys.are_all_packed:
        batch, heads = keys.position_K3.shape[0], keys.position_K3.shape[2]
        return keys.take_keys(index.expand(batch, heads, -1) if index.dim() == 1 else index)
    if index.dim() == 1:
        k = keys.k_BKND[:, index]
        at = position[index] if position.dim() == 2 else position[:, index]
        return KeyValues(k, k, at, None if mass is None else mass[..., index])
    index_BSN = index.transpose(1, 2)
    k = keys.k_BKND.gather(1, index_BSN[..., None].expand(*index_BSN.shape, keys.k_BKND.shape[-1]))
    if position.dim() == 2:
        at = position[index_BSN]
    else:
        at = position.gather(1, index_BSN[..., None].expand(*index_BSN.shape, 3))
    return KeyValues(k, k, at, None if mass is None else mass.gather(-1, index))


def estimate_mass(search: Search, queries: TileSample, history: TileSample, rest: TileSample) -> TileMass:
    """Shares of the softmax over history and rest, for a sample of the queries of each tile.

    Args:
        search: Its codes give the inner products.
        queries: Weights are ignored: all of a tile count the same.
        history: Of whose tiles the mass is asked.
        rest: What else is seen; at least one key exists.
    """
    q_BNSD = queries.k_BNSD / math.sqrt(queries.k_BNSD.shape[-1])
    lse_BNSJ = _tile_lse(search, q_BNSD, history)
    rest_BNS1 = _tile_lse(search, q_BNSD, rest).logsumexp(-1, keepdim=True)
    total_BNS1 = torch.logaddexp(lse_BNSJ.logsumexp(-1, keepdim=True), rest_BNS1)
    history_BNIJ, rest_BNI1 = (
        (lse - total_BNS1).exp_().unflatten(2, (queries.num_tiles, -1)).mean(3) for lse in (lse_BNSJ, rest_BNS1)
    )
    return TileMass(history_BNIJ, rest_BNI1[..., 0])


def _tile_lse(search: Search, q_BNSD: Tensor, sample: TileSample) -> Tensor:
    """Log of the mass of each tile for each query, lse_BNSJ; no more logits at once than `MAX_SCORES`."""
    size = sample.k_BNSD.shape[2] // sample.num_tiles
    tiles_at_once = max(1, MAX_SCORES // max(1, q_BNSD[..., 0].numel() * size))
    found = []
    for first in range(0, sample.num_tiles, tiles_at_once):
        part = slice(first * size, (first + tiles_at_once) * size)
        logit = search.similarity(q_BNSD, sample.k_BNSD[:, :, part]).add_(sample.log_weight_BNS[:, :, None, part])
        found.append(_group_lse(logit, size))
    return torch.cat(found, -1)


def _group_lse(logit_BNSM: Tensor, size: int) -> Tensor:
    """Log-sum-exp of each `size` neighbours, written over the logits; -inf where a group has 80 less than the highest
    of its row: one pass of exponentials over whole rows is many times faster on a CPU than groups of eight."""
    if not logit_BNSM.is_cpu or logit_BNSM.dtype != torch.float32:
        groups: Tensor = logit_BNSM.unflatten(-1, (-1, size))
        return groups.logsumexp(-1)
    top = logit_BNSM.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    share: Tensor = logit_BNSM.sub_(top).exp_().view(-1, size) @ logit_BNSM.new_ones(size)
    return share.log_().view(*logit_BNSM.shape[:-1], -1).add_(top)


def keep_share(mass: TileMass, share: float) -> Tensor:
    """The heaviest tiles, the same number for each head and query tile: visible_BNIJ."""
    num_tiles = mass.history_BNIJ.shape[-1]
    num_kept = min(num_tiles, max(1, round(share * num_tiles)))
    top = mass.history_BNIJ.topk(num_kept, dim=-1).indices
    return torch.zeros_like(mass.history_BNIJ, dtype=torch.bool).scatter_(-1, top, True)


def keep_most(mass: TileMass, num: int) -> Tensor:
    """So many tiles for each head and query tile on average, the heaviest of a layer; each has a half of them for sure:
    visible_BNIJ.
    """
    return keep_most_jointly([mass], num)[0]


def keep_most_jointly(masses: Sequence[TileMass], num: int) -> list[Tensor]:
    """`keep_most` where all layers compete: so many tiles on average over them; visible_BNIJ of each.

    Some heads look at all of the past and others at next to nothing of it: a tile goes where it holds most.
    """
    raised = [_raise_sure(mass, num).flatten(1) for mass in masses]
    total = sum(
        min(num, mass.history_BNIJ.shape[-1]) * mass.rest_BNI.shape[1] * mass.rest_BNI.shape[2] for mass in masses
    )
    flat_BM = torch.cat(raised, 1)
    kept = torch.zeros_like(flat_BM, dtype=torch.bool).scatter_(-1, flat_BM.topk(total, dim=-1).indices, True)
    parts = kept.split([part.shape[1] for part in raised], 1)
    return [part.reshape(mass.history_BNIJ.shape) for part, mass in zip(parts, masses, strict=True)]


def keep_above(mass: TileMass, num: int, seen_before: Sequence[Tensor] | None = None) -> Tensor:
    """`keep_most_jointly` by a layer that knows those before it alone: the tiles above a mass, visible_BNIJ.

    Layers that compete end at one mass in all of them, which is about the same for every chunk (`_LEAST_MASS`): so each
    may stop there by itself. Where it and those before it would see more or less so than is usual, as with a short
    history or in new land, it ends at another mass and makes up for most of that: chunks cost about the same. However
    flat or sharp its attention is, each head and query tile has half of `num`, and a layer twice as many at most.

    Args:
        mass: Of the layer.
        num: Of tiles that are to be seen, as `keep_most_jointly` has it.
        seen_before: Mean number of tiles that each layer before it sees, [B] each; None ends at the usual mass.
    """
    rows, num_tiles = mass.rest_BNI.shape[1] * mass.rest_BNI.shape[2], mass.history_BNIJ.shape[-1]
    flat_BM = _raise_sure(mass, num).flatten(1)
    heavy_BM, index = flat_BM.topk(min(num_tiles, 2 * num) * rows, dim=-1)
    is_kept = heavy_BM > _LEAST_MASS / num
    if seen_before is not None:
        own_B = is_kept.sum(-1, dtype=torch.float32) / rows
        share_B = torch.stack((*seen_before, own_B)).mean(0) / (_USUAL * num)
        is_kept = heavy_BM > share_B.pow(_FIRMNESS)[:, None] * (_LEAST_MASS / num)
    # Those that are sure stay, whatever the mass.
    is_kept |= heavy_BM >= 2
    return torch.zeros_like(flat_BM, dtype=torch.bool).scatter_(-1, index, is_kept).view(mass.history_BNIJ.shape)


def heaviest_first(mass: TileMass, visible_BNIJ: Tensor) -> Tensor:
    """Numbers of tiles, those that each head and query tile sees before the others, the heaviest first: order_BNIJ."""
    order_BNIJ: Tensor = mass.history_BNIJ.masked_fill(~visible_BNIJ, -1.0).argsort(
        dim=-1, descending=True, stable=True
    )
    return order_BNIJ


def keep_heaviest(mass: TileMass, visible_BNIJ: Tensor, share: float) -> Tensor:
    """Of the tiles that each head and query tile sees, the heaviest share, rounded up: visible_BNIJ."""
    order_BNIJ = heaviest_first(mass, visible_BNIJ)
    num_BNI1 = (share * visible_BNIJ.sum(-1, keepdim=True)).ceil()
    is_kept = torch.arange(order_BNIJ.shape[-1], device=order_BNIJ.device) < num_BNI1
    return torch.zeros_like(visible_BNIJ).scatter_(-1, order_BNIJ, is_kept)


def _raise_sure(mass: TileMass, num: int) -> Tensor:
    """The masses, with 2 on top of those tiles that are seen for sure: a share is at most 1, so they come first."""
    sure_each = min(mass.history_BNIJ.shape[-1], -(-num // _SURE_SHARE))
    sure = torch.zeros_like(mass.history_BNIJ)
    return sure.scatter_(-1, mass.history_BNIJ.topk(sure_each, dim=-1).indices, 2.0).add_(mass.history_BNIJ)


def keep_mass(mass: TileMass, target: float) -> Tensor:
    """The fewest tiles of a layer with which its queries see `target` of their mass on average: visible_BNIJ.

    First each head and query tile gets the fewest tiles that leave it at most `_MAX_SHORTFALL` times the mass that the
    target leaves out; then all compete for the rest, so that it goes where a tile holds most. Where they compete for
    all of it, the mean is as high, but the worst head falls far behind.
    """
    heavy, index = mass.history_BNIJ.sort(dim=-1, descending=True, stable=True)
    seen_before = heavy.cumsum(-1) - heavy + mass.rest_BNI[..., None]
    is_due = seen_before < 1 - _MAX_SHORTFALL * (1 - target)
    due = torch.zeros_like(is_due).scatter_(-1, index, is_due)
    # A share is at most 1: with 2 on top, those that are due come first.
    flat_BM = (mass.history_BNIJ + 2.0 * due).flatten(1)
    raised, index = flat_BM.sort(dim=-1, descending=True, stable=True)
    heavy = raised - 2.0 * (raised >= 2)
    rows = mass.rest_BNI.shape[1] * mass.rest_BNI.shape[2]
    seen_before = (heavy.cumsum(-1) - heavy + mass.rest_BNI.flatten(1).sum(-1, keepdim=True)) / rows
    kept = torch.zeros_like(flat_BM, dtype=torch.bool).scatter_(-1, index, seen_before < target)
    return kept.view_as(due) | due

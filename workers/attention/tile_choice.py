"""Which tiles of a table a tile of queries sees, in fixed shapes: always some, and the same number of others.

As `tile_mass.py`: the mass of a tile is estimated from a sample of its keys, after RoPE and with log m, and a sample of
the queries; tiles with the highest mean share of the softmax are seen. Equal counts keep the work of all query tiles
equal and every shape fixed, so a choice can be captured in a CUDA graph. Inner products are exact, of 8-bit codes
(`quant`), or guessed from the signs of random projections (`lsh`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from workers.attention.tile_mass import sample_places
from workers.key_codes import KeyCodes

CODES_ON = (9, 0)
"""Compute capability on which codes are read as they are: where it is known to be faster, and to give the same bits."""
Estimate = Literal["exact", "quant", "lsh"]


@dataclass(frozen=True)
class TileRuns:
    """Tiles of a table, by number."""

    candidates: tuple[tuple[int, int], ...]
    """Runs [first, stop) among which is chosen."""
    always: tuple[tuple[int, int], ...]
    """Runs that every query sees."""
    num_tiles: int
    """Of the whole table."""


@dataclass(frozen=True)
class ChoiceSettings:
    """How tiles are chosen."""

    num_chosen: int
    """Candidates that a tile of queries sees, beside those that are always seen."""
    keys_per_tile: int = 16
    """Keys of a tile that are looked at."""
    queries_per_tile: int = 8
    estimate: Estimate = "exact"
    bits: int = 128
    """Random projections of `lsh`."""
    tile: int = 128
    fused: bool = False
    """By kernels of our own, on a GPU; channels and samples are then powers of two. `lsh` has none."""
    clean_share: float = 1.0
    """Of the chosen tiles, the heaviest that a clean pass sees, in (0, 1]: nothing is denoised there."""
    num_early: int = 0
    """Candidates that are seen until the history merges for the first time; 0: as many as later."""


class TileChoice:
    """Chooses for one layer at a time.

    Args:
        settings: How.
        runs: Among which tiles.
        num_queries: Of a chunk.
        head_dim: Channels of a key without those of log m.
        device: Where all of it is.
    """

    def __init__(
        self, settings: ChoiceSettings, runs: TileRuns, num_queries: int, head_dim: int, device: torch.device
    ) -> None:
        s = self.settings = settings
        self.runs = runs
        self._candidate_J = _numbers(runs.candidates, device)
        self._always_A = _numbers(runs.always, device)
        self.num_chosen = min(s.num_chosen, len(self._candidate_J))
        self.num_early = min(s.num_early or s.num_chosen, len(self._candidate_J))
        self.query_tiles = -(-num_queries // s.tile)
        self._query_S = sample_places(num_queries, s.tile, s.queries_per_tile, device)[0]
        self.sampled_slot_R = sample_places(runs.num_tiles * s.tile, s.tile, s.keys_per_tile, device)[0]
        """Slots of a table whose keys are read, int64: tile by tile, equally many of each."""
        generator = torch.Generator().manual_seed(head_dim)
        projection = torch.randn(head_dim, s.bits, generator=generator).to(device)
        self._similarity = _make_similarity(s.estimate, head_dim, projection)
        self._estimate: Callable[..., Tensor] = _estimate
        self._is_fused = s.fused and s.estimate != "lsh"
        if self._is_fused:
            sizes = (head_dim, s.keys_per_tile, s.queries_per_tile)
            assert all(size & (size - 1) == 0 for size in sizes), f"kernels take powers of two, not {sizes}"
            self._is_candidate_J = torch.zeros(runs.num_tiles, dtype=torch.int32, device=device)
            self._is_candidate_J[self._candidate_J] = 1
            self._head_dim = head_dim

    def num_slots_seen(self, *, early: bool = False) -> int:
        """By a query, empty ones included."""
        return (self._num_listed(early) + len(self._always_A)) * self.settings.tile

    def compile(self, backend: str | Callable[..., object] = "inductor") -> None:
        """Fuse what follows the products."""
        self._estimate = torch.compile(_estimate, dynamic=False, backend=backend)

    @property
    def num_tiles(self) -> int:
        """Of the whole table."""
        return self.runs.num_tiles

    @property
    def has_clean_list(self) -> bool:
        """Whether a clean pass sees fewer than a step."""
        return self._num_listed(early=False, for_clean_pass=True) < self.num_chosen

    @property
    def has_early_list(self) -> bool:
        """Whether another number is seen until the history merges."""
        return self.num_early != self.num_chosen

    def _num_listed(self, early: bool, for_clean_pass: bool = False) -> int:
        num = self.num_early if early else self.num_chosen
        return max(1, round(self.settings.clean_share * num)) if for_clean_pass else num

    def new_list(self, num_heads: int, *, for_clean_pass: bool = False, early: bool = False) -> Tensor:
        """A list to be filled, int32 [N, I, listed]: the chosen first, then those that are always seen."""
        num = self._num_listed(early, for_clean_pass)
        shape = (num_heads, self.query_tiles, num + len(self._always_A))
        index = torch.zeros(shape, dtype=torch.int32, device=self._candidate_J.device)
        index[..., :num] = self._candidate_J[:num]
        index[..., num:] = self._always_A
        return index

    def takes_codes(self, keys: KeyCodes | None) -> bool:
        """Whether `choose` reads such keys as they are; else those of `sampled_slot_R` are to be unpacked for it."""
        if keys is None or not self._is_fused or self.settings.estimate != "exact" or not keys.end_NLW.is_cuda:
            return False
        form = keys.code_NCB.dtype, keys.end_NLW.dtype, self._head_dim
        is_form = form == (torch.uint8, torch.bfloat16, 128)
        return is_form and torch.cuda.get_device_capability(keys.end_NLW.device) == CODES_ON

    def choose(
        self, q_QNW: Tensor, keys: Tensor | KeyCodes, index_NIJ: Tensor, clean_NIJ: Tensor | None = None
    ) -> None:
        """Write the chosen tiles into a list.

        Args:
            q_QNW: Queries after RoPE, ones in the channels of log m.
            keys: Of the layer, those of the chunk in hand included, of which those of `sampled_slot_R` are read: k_NLW,
                or codes where `takes_codes` says so.
            index_NIJ: From `new_list`.
            clean_NIJ: From `new_list` for a clean pass: the heaviest of them.
        """
        if self._is_fused:
            self._choose_by_kernels(q_QNW, keys, index_NIJ, clean_NIJ)
            return
        assert isinstance(keys, Tensor), "no codes without kernels"
        mass_NIJ = self.mass(q_QNW, keys).index_select(2, self._candidate_J)
        num = self._num_to_fill(index_NIJ)
        chosen = mass_NIJ.topk(num, dim=-1, sorted=clean_NIJ is not None).indices
        index_NIJ[..., :num] = self._candidate_J[chosen]
        if clean_NIJ is not None:
            fewer = self._num_to_fill(clean_NIJ)
            clean_NIJ[..., :fewer] = self._candidate_J[chosen[..., :fewer]]

    def _num_to_fill(self, index_NIJ: Tensor) -> int:
        return index_NIJ.shape[-1] - len(self._always_A)

    def _choose_by_kernels(
        self, q_QNW: Tensor, keys: Tensor | KeyCodes, index_NIJ: Tensor, clean_NIJ: Tensor | None
    ) -> None:
        from workers.attention.coded_choice import fits
        from workers.attention.triton_choice import tile_sums, write_heaviest
        from workers.attention.triton_coded_choice import coded_tile_sums

        s = self.settings
        if isinstance(keys, KeyCodes) and fits(keys, (self._head_dim, s.tile, s.keys_per_tile, s.queries_per_tile)):
            self._choose_by_cuda(q_QNW, keys, index_NIJ, clean_NIJ)
            return
        shape = (q_QNW.shape[1], len(self._query_S), len(self._is_candidate_J))
        sum_NSJ = torch.empty(shape, dtype=torch.float32, device=q_QNW.device)
        sizes = self._head_dim, s.tile, s.keys_per_tile
        if isinstance(keys, KeyCodes):
            coded_tile_sums(q_QNW, keys, self._query_S, sum_NSJ, sizes)
        else:
            tile_sums(q_QNW, keys, self._query_S, sum_NSJ, sizes, quant=s.estimate == "quant")
        write_heaviest(sum_NSJ, self._is_candidate_J, len(self._always_A), index_NIJ, clean_NIJ)

    def _choose_by_cuda(self, q_QNW: Tensor, keys: KeyCodes, index_NIJ: Tensor, clean_NIJ: Tensor | None) -> None:
        from workers.attention.coded_choice import list_heaviest, new_sums, sum_tiles

        sums = new_sums(q_QNW.shape[1], self.query_tiles, len(self._is_candidate_J), q_QNW.device)
        sum_tiles(q_QNW, keys, self._query_S, sums)
        list_heaviest(sums, self._is_candidate_J, len(self._always_A), index_NIJ, clean_NIJ)

    def mass(self, q_QNW: Tensor, k_NLW: Tensor) -> Tensor:
        """Estimated share of the softmax in each tile of the table, mean over the queries of a tile, [N, I, J]."""
        q_NSW = q_QNW.index_select(0, self._query_S).transpose(0, 1)
        k_NRW = k_NLW.index_select(1, self.sampled_slot_R)
        return self._estimate(q_NSW, k_NRW, self._similarity, self.query_tiles, self.settings.keys_per_tile)


def _estimate(q_NSW: Tensor, k_NRW: Tensor, similarity: Callable[..., Tensor], tiles: int, samples: int) -> Tensor:
    logit = similarity(q_NSW, k_NRW).unflatten(-1, (-1, samples))
    lse_NSJ = logit.logsumexp(-1)
    share = (lse_NSJ - lse_NSJ.logsumexp(-1, keepdim=True)).exp()
    mass: Tensor = share.unflatten(1, (tiles, -1)).mean(2)
    return mass


def _make_similarity(estimate: Estimate, head_dim: int, projection: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(q_NSW, k_NRW) -> logits in float32, log m included."""
    scale = 1 / math.sqrt(head_dim)

    def exact(q: Tensor, k: Tensor) -> Tensor:
        return torch.bmm(q, k.mT).float() * scale

    def quantised(q: Tensor, k: Tensor) -> Tensor:
        q_code, q_step = _code(q[..., :head_dim])
        k_code, k_step = _code(k[..., :head_dim])
        return torch.bmm(q_code, k_code.mT).float() * (q_step * scale) * k_step.mT + mass(k)

    def signs(q: Tensor, k: Tensor) -> Tensor:
        q, k_only = q[..., :head_dim], k[..., :head_dim]
        p = projection.to(q.dtype)
        agreement = torch.bmm((q @ p).sign(), (k_only @ p).sign().mT).float() / p.shape[1]
        length = q.float().norm(dim=-1, keepdim=True) * scale
        logit: Tensor = (agreement * (math.pi / 2)).sin() * length * k_only.float().norm(dim=-1)[:, None] + mass(k)
        return logit

    def mass(k: Tensor) -> Tensor:
        return k[..., head_dim : head_dim + 2].float().sum(-1)[:, None] * scale

    return {"exact": exact, "quant": quantised, "lsh": signs}[estimate]


def _code(x: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes as whole numbers, which bfloat16 holds exactly, and their step."""
    step = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
    return (x.float() / step).round().to(x.dtype), step


def _numbers(runs: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.tensor([tile for first, stop in runs for tile in range(first, stop)], dtype=torch.int64, device=device)

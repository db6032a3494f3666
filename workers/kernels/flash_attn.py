"""FlashAttention: generation 4 (CuTe DSL, `flash_attn.cute`), 3 (`flash_attn_interface`) or 2 (`flash_attn`).

log m travels in 16 more channels (two of them used), which costs 5% on an H100 where a score function costs 40%.
Generation 4 on Hopper skips tiles of 128 x 128 or multiples; elsewhere the keys of each query tile are gathered.
Generation 4 has run on an H200 (tests/gpu/test_flash_attn.py), the others on no GPU.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import KernelPart, KeyValues, TiledKeys
from workers.kernels.lse import attend_parts
from workers.kernels.mass import through_channels
from workers.kernels.skip_tiles import TileSkipper
from workers.kernels.tile_lists import TileList
from workers.kernels.tiled import GroupMemory, attend_tiled

Generation = Literal[4, 3, 2]
AttendPlain = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(q_BQND, k_BKND, v_BKND, scale) -> out_BQND, lse_BNQ; D side by side in memory, one 16-bit dtype."""

_TILE = 128
GENERATIONS: dict[str, Generation] = {"flash-attn-4": 4, "flash-attn-3": 3, "flash-attn-2": 2}
_PACKAGES: dict[Generation, str] = {4: "flash-attn-4", 3: "flash-attn-3", 2: "flash-attn"}


def _load_4() -> AttendPlain:
    from flash_attn.cute.interface import _flash_attn_fwd  # the public function hides the log-sum-exp

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = _flash_attn_fwd(q, k, v, softmax_scale=scale, num_splits=1, return_lse=True)[:2]
        return out, lse

    return attend


def _load_3() -> AttendPlain:
    from flash_attn_interface import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True)[:2]
        return out, lse

    return attend


def _load_2() -> AttendPlain:
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True)[:2]
        return out, lse

    return attend


_LOADERS: dict[Generation, Callable[[], AttendPlain]] = {4: _load_4, 3: _load_3, 2: _load_2}


def _attend_listed(q: Tensor, k: Tensor, v: Tensor, scale: float, lists: TileList) -> tuple[Tensor, Tensor]:
    """Generation 4 over whole tiles of 128 keys; out_BQND and lse_BNQ."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    none = torch.zeros_like(lists.count_BNI)  # tiles under a mask: we have none
    sparse = BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=none[..., None],
        full_block_cnt=lists.count_BNI,
        full_block_idx=lists.index_BNIJ,
        block_size=(_TILE, _TILE),
    )
    out, lse = _flash_attn_fwd(
        q, k, v, softmax_scale=scale, num_splits=1, return_lse=True, block_sparse_tensors=sparse
    )[:2]
    return out, lse


class FlashAttnKernel:
    """One generation of FlashAttention.

    Args:
        generation: Which package.
        skips_tiles: Generation 4 on Hopper.
    Raises:
        ImportError: The package is not installed.
    """

    def __init__(self, generation: Generation, *, skips_tiles: bool) -> None:
        self._generation: Generation = generation
        self._attend_plain = _LOADERS[generation]()
        self._skipper = TileSkipper(_attend_listed, _TILE) if skips_tiles and generation == 4 else None
        self._groups = GroupMemory()

    @property
    def version(self) -> str:
        package = _PACKAGES[self._generation]
        try:
            number = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # built from source
            number = "unknown"
        return f"flash-attn-{self._generation} ({package} {number}, torch {torch.__version__})"

    def attend(self, q_BQND: Tensor, parts: tuple[KernelPart, ...]) -> tuple[Tensor, Tensor]:
        return attend_parts(self._attend_dense, self._attend_tiled, q_BQND, parts)

    def _attend_dense(self, q_BQND: Tensor, keys: KeyValues, scale: float | None = None) -> tuple[Tensor, Tensor]:
        if keys.log_mass_BNK is not None:
            return through_channels(self._attend_dense, q_BQND, keys)
        scale = scale or q_BQND.shape[-1] ** -0.5
        q, k, v = (_pad_channels(x.to(q_BQND.dtype)) for x in (q_BQND, keys.k_BKND, keys.v_BKND))
        out, lse_BNQ = self._attend_plain(q, k, v, scale)
        return out[..., : q_BQND.shape[-1]], lse_BNQ.transpose(1, 2)

    def _attend_tiled(self, q_BQND: Tensor, part: TiledKeys) -> tuple[Tensor, Tensor]:
        if self._skipper is not None and self._skipper.takes(part.tiles):
            return self._skipper.attend(q_BQND, part)
        return attend_tiled(q_BQND, part, self._attend_dense, self._groups)


def _pad_channels(x: Tensor) -> Tensor:
    """A multiple of 8 channels, as all generations want; the scale is given, so zeros change nothing."""
    pad = -x.shape[-1] % 8
    x = F.pad(x, (0, pad)) if pad else x
    return x if x.stride(-1) == 1 else x.contiguous()

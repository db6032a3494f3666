"""Launches fp8_attention.cu: attention in 8 bits over listed tiles of 128 keys, on compute capability 9.0 (see
coded_tiles.py, which says how queries and tiles lie)."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers.coded_tiles import MASS_BYTES, MASS_SCALES
from workers.nvrtc import address_of, launch, load_functions, make_hopper_source, product_of_registers

PROMOTE = 4
"""Tiles after which products are added to the rest outside of tensor cores: 2 takes longer, 8 loses more."""
STAGES = 4
"""Tiles of keys and of values that shared memory has room for."""
_TILE_BYTES, _PART_FLOATS = 16384, 68 * 256
_SHARED_BYTES = _TILE_BYTES + STAGES * (2 * _TILE_BYTES + MASS_BYTES + 1024) + 1024 + 65536
"""Queries; tiles, log m of keys and rows of ones behind values; what it takes to begin at a multiple of 1024; sums."""


class Coded(NamedTuple):
    """What it reads."""

    q_NIB: Tensor
    k_NTB: Tensor
    v_NTB: Tensor
    mass_NTB: Tensor
    index_NIJ: Tensor | None


def make_source(factor: float, v_scale: float) -> str:
    """CUDA of the kernel.

    Args:
        factor: From products to logits in base 2.
        v_scale: Of values.
    """
    codes = torch.tensor(MASS_SCALES).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    masses = int.from_bytes(bytes(codes), "little")
    names = {
        "STAGES": STAGES,
        "PROMOTE": PROMOTE,
        "FACTOR": f"{factor!r}f",
        "V_SCALE": f"{v_scale!r}f",
        "MASSES": f"0x{masses:08X}u",
    }
    products = "".join(
        product_of_registers(f"__device__ __forceinline__ void {name}", columns // 2, columns, "k32.f32.e4m3.e4m3")
        for name, columns in (("wgmma_qk", 128), ("wgmma_pv", 136))
    )
    return make_hopper_source(names, products, Path(__file__).with_suffix(".cu"))


@functools.cache
def _load(factor: float, v_scale: float, device: int) -> list[ctypes.c_void_p]:
    return load_functions(make_source(factor, v_scale), ("attend", "join"), _SHARED_BYTES, device)


def attend_tiles(
    coded: Coded, num_queries: int, scales: tuple[float, float], out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """out_QND in bfloat16 and the natural lse_QN in float32.

    Args:
        coded: Queries and keys.
        num_queries: Those that exist.
        scales: Of products of queries and keys, and of values.
        out: Written if given: out_QND, contiguous, and lse_QN, with any strides.
    """
    q, k, v, mass, index = coded
    heads, query_tiles = q.shape[:2]
    tiles = k.shape[1]
    length = tiles if index is None else index.shape[2]
    _check(coded, num_queries, length)
    device = q.get_device()
    assert device == torch.cuda.current_device()
    factor = math.log2(math.e) / math.sqrt(128) / scales[0]
    attend, join = _load(factor, scales[1], device)
    if out is None:
        out = (
            torch.empty(num_queries, heads, 128, dtype=torch.bfloat16, device=q.device),
            torch.empty(num_queries, heads, dtype=torch.float32, device=q.device),
        )
    out_QND, lse_QN = out
    _check_results(out_QND, lse_QN, (num_queries, heads))
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    parts = torch.empty(programs * 2 * _PART_FLOATS, dtype=torch.float32, device=q.device)
    sizes, strides = map(_as_ints, ((heads, query_tiles, num_queries), lse_QN.stride()))
    tensors = map(address_of, (q, k, v, mass, index, out_QND, lse_QN, parts))
    given = [*tensors, *sizes, *_as_ints((tiles, length)), *strides]
    launch(attend, programs, 384, _SHARED_BYTES, given, device)
    shared = heads * query_tiles % programs
    if shared:
        given = [*map(address_of, (parts, out_QND, lse_QN)), *sizes, *_as_ints((length, programs)), *strides]
        launch(join, shared, 256, 0, given, device)
    return out


def _as_ints(numbers: Iterable[int]) -> list[Any]:
    return [ctypes.c_int(number) for number in numbers]


def _check(coded: Coded, num_queries: int, length: int) -> None:
    """Shapes, kinds and places."""
    q, k, v, mass, index = coded
    heads, query_tiles = q.shape[:2]
    tiles = k.shape[1]
    assert q.shape == (heads, query_tiles, _TILE_BYTES)
    assert k.shape == v.shape == (heads, tiles, _TILE_BYTES)
    assert mass.shape == (heads, tiles, MASS_BYTES)
    assert 128 * (query_tiles - 1) < num_queries <= 128 * query_tiles
    assert q.dtype == k.dtype == v.dtype == mass.dtype == torch.uint8
    assert index is None or (index.shape == (heads, query_tiles, length) and index.dtype == torch.int32)
    assert length > 0
    assert heads * query_tiles * length < 2**31
    for given in coded:
        assert given is None or (given.is_cuda and given.is_contiguous() and given.data_ptr() % 16 == 0)


def _check_results(out_QND: Tensor, lse_QN: Tensor, sizes: tuple[int, int]) -> None:
    """Shapes, kinds and places."""
    assert out_QND.shape == (*sizes, 128)
    assert out_QND.is_cuda
    assert out_QND.dtype == torch.bfloat16
    assert out_QND.is_contiguous()
    assert out_QND.data_ptr() % 16 == 0
    assert lse_QN.shape == sizes
    assert lse_QN.is_cuda
    assert lse_QN.dtype == torch.float32
    assert sum(stride * size for stride, size in zip(lse_QN.stride(), sizes, strict=True)) < 2**31

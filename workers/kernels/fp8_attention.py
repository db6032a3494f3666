"""Launches fp8_attention.cu: attention in 8 bits over listed tiles of 128 keys, on compute capability 9.0 (see
fp8_tiles.py, which says how queries and tiles lie)."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers.nvrtc import launch, load_functions

_PART_FLOATS = 68 * 256


class Cut(NamedTuple):
    """How the kernel is made; see fp8_attention.cu."""

    stages: int = 5
    turns: bool = True
    two_levels: bool = False
    start_bias: bool = False
    lazy: bool = False
    split: bool = False
    """A program for each multiprocessor, which share all lists evenly, instead of one for each tile of queries."""

    @property
    def shared_bytes(self) -> int:
        return 16384 + self.stages * (2 * 16384 + 512) + 1024


class Coded(NamedTuple):
    """What it reads."""

    q_NIB: Tensor
    k_NTB: Tensor
    v_NTB: Tensor
    bias_NL: Tensor
    index_NIJ: Tensor | None


def make_source(factor: float, v_scale: float, cut: Cut) -> str:
    """CUDA of the kernel.

    Args:
        factor: From products to logits in base 2.
        v_scale: Of values.
    """
    names = {
        "STAGES": cut.stages,
        "TURNS": int(cut.turns),
        "TWO_LEVELS": int(cut.two_levels),
        "START_BIAS": int(cut.start_bias),
        "LAZY": int(cut.lazy),
        "FACTOR": f"{factor!r}f",
        "V_SCALE": f"{v_scale!r}f",
    }
    defines = "\n".join(f"#define {name} {value}" for name, value in names.items())
    products = _make_product("wgmma_qk", 1) + _make_product("wgmma_pv", 4)
    return defines + products + Path(__file__).with_suffix(".cu").read_text()


def _make_product(name: str, count: int) -> str:
    """A product of 64 rows and 128 columns over 32 bytes.

    Args:
        count: Of registers with the left side: 1, where it lies, or 4, the bytes themselves.
    """
    totals, outputs = ", ".join(f"%{i}" for i in range(64)), ", ".join(f'"+f"(d[{i}])' for i in range(64))
    if count == 1:
        taken, left, given = "unsigned long long a", "%64", '"l"(a)'
    else:
        taken = ", ".join(f"unsigned int a{i}" for i in range(4))
        left, given = "{%64, %65, %66, %67}", ", ".join(f'"r"(a{i})' for i in range(4))
    right = 64 + count
    return f"""
__device__ __forceinline__ void {name}(float (&d)[64], {taken}, unsigned long long b, int adds) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{right + 1}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {{{totals}}}, {left}, %{right}, p, 1, 1;\\n}}"
        : {outputs} : {given}, "l"(b), "r"(adds));
}}
"""


@functools.cache
def _load(factor: float, v_scale: float, cut: Cut, device: int) -> list[ctypes.c_void_p]:
    return load_functions(make_source(factor, v_scale, cut), ("attend", "join"), cut.shared_bytes, device)


def attend_tiles(coded: Coded, num_queries: int, scales: tuple[float, float], cut: Cut) -> tuple[Tensor, Tensor]:
    """out_QND in bfloat16 and the natural lse_QN in float32.

    Args:
        scales: Of products of queries and keys, and of values.
        cut: How to do it.
    """
    q, k, v, bias, index = coded
    heads, query_tiles = q.shape[:2]
    tiles = k.shape[1]
    length = tiles if index is None else index.shape[2]
    _check(coded, num_queries, length)
    device = q.get_device()
    assert device == torch.cuda.current_device()
    factor = math.log2(math.e) / math.sqrt(128) / scales[0]
    attend, join = _load(factor, scales[1], cut, device)
    out = torch.empty(num_queries, heads, 128, dtype=torch.bfloat16, device=q.device)
    lse = torch.empty(num_queries, heads, dtype=torch.float32, device=q.device)
    programs = units = heads * query_tiles
    if cut.split:
        programs = min(torch.cuda.get_device_properties(device).multi_processor_count, units * length)
    parts = torch.empty(programs * 2 * _PART_FLOATS, dtype=torch.float32, device=q.device) if cut.split else None
    results = [_at(out), _at(lse)]
    sizes = [*map(ctypes.c_int, (heads, query_tiles, num_queries))]
    given: list[Any] = [*map(_at, (q, k, v, bias, index)), *results, _at(parts), *sizes]
    given += [ctypes.c_int(tiles), ctypes.c_int(length)]
    launch(attend, programs, 384, cut.shared_bytes, given, device)
    if cut.split:
        launch(join, units, 256, 0, [_at(parts), *results, *sizes, *map(ctypes.c_int, (length, programs))], device)
    return out, lse


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def _check(coded: Coded, num_queries: int, length: int) -> None:
    """Shapes, kinds and places."""
    q, k, v, bias, index = coded
    heads, query_tiles = q.shape[:2]
    tiles = k.shape[1]
    assert q.shape == (heads, query_tiles, 16384)
    assert k.shape == v.shape == (heads, tiles, 16384)
    assert bias.shape == (heads, tiles * 128)
    assert 128 * (query_tiles - 1) < num_queries <= 128 * query_tiles
    assert q.dtype == k.dtype == v.dtype == torch.uint8
    assert bias.dtype == torch.float32
    assert index is None or (index.shape == (heads, query_tiles, length) and index.dtype == torch.int32)
    assert length > 0
    assert heads * query_tiles * length < 2**31
    for given in coded:
        assert given is None or (given.is_cuda and given.is_contiguous() and given.data_ptr() % 16 == 0)

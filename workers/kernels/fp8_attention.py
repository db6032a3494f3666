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

    promote: int = 4
    """Tiles after which products are added to the rest outside of tensor cores."""
    held_queries: bool = True
    """Registers have the queries, shared memory what was added up; else the other way round."""
    polynomial: int = 0
    """Every so manieth exponential is a polynomial."""
    split: bool = False
    """A program for each multiprocessor, which share the lists evenly, instead of one for each tile of queries."""
    stages: int = 4

    @property
    def shared_bytes(self) -> int:
        stage = 2 * 16384 + 2 * 1024
        return 16384 + self.stages * stage + 1024 + 65536 * self.held_queries


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
        "PROMOTE": cut.promote,
        "HELD_QUERIES": int(cut.held_queries),
        "POLYNOMIAL": cut.polynomial,
        "FACTOR": f"{factor!r}f",
        "V_SCALE": f"{v_scale!r}f",
    }
    defines = "\n".join(f"#define {name} {value}" for name, value in names.items())
    products = _make_product("wgmma_qk", 1, 64) + _make_product("wgmma_held", 4, 64) + _make_product("wgmma_pv", 4, 136)
    return defines + products + Path(__file__).with_suffix(".cu").read_text()


def _make_product(name: str, count: int, columns: int) -> str:
    """A product of 64 rows and some columns over 32 bytes.

    Args:
        count: Of registers with the left side: 1, where it lies, or 4, the bytes themselves.
    """
    sums = columns // 2
    totals, outputs = ", ".join(f"%{i}" for i in range(sums)), ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    if count == 1:
        taken, left, given = "unsigned long long a", f"%{sums}", '"l"(a)'
    else:
        taken = ", ".join(f"unsigned int a{i}" for i in range(4))
        left, given = "{" + ", ".join(f"%{sums + i}" for i in range(4)) + "}", ", ".join(f'"r"(a{i})' for i in range(4))
    right = sums + count
    return f"""
__device__ __forceinline__ void {name}(float (&d)[{sums}], {taken}, unsigned long long b, int adds) {{
    asm volatile(
        "{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{right + 1}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3 {{{totals}}}, {left}, %{right}, p, 1, 1;\\n}}"
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
        programs = torch.cuda.get_device_properties(device).multi_processor_count
    parts = torch.empty(programs * 2 * _PART_FLOATS, dtype=torch.float32, device=q.device) if cut.split else None
    results = [_at(out), _at(lse)]
    sizes = [*map(ctypes.c_int, (heads, query_tiles, num_queries))]
    given: list[Any] = [*map(_at, (q, k, v, bias, index)), *results, _at(parts), *sizes]
    given += [ctypes.c_int(tiles), ctypes.c_int(length)]
    launch(attend, programs, 384, cut.shared_bytes, given, device)
    if units % programs:
        launch(
            join,
            units % programs,
            256,
            0,
            [_at(parts), *results, *sizes, *map(ctypes.c_int, (length, programs))],
            device,
        )
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

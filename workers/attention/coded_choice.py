"""Launches coded_choice.cu and heaviest_tiles.cu: tiles chosen by keys as codes of 4 bits, on compute capability 9.0.

For heads of 128 channels, groups of 32 and the samples of the usual choice: 16 keys of a tile of 128, eight queries of
a tile of queries. For any other there are the kernels of triton_coded_choice.py and triton_choice.py, which write the
same sums and list the same tiles but for those whose shares are the same to the last bits.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.key_codes import KeyCodes
from workers.nvrtc import (
    address_of,
    define,
    lacks_compiler,
    launch,
    load_functions,
    make_coded_source,
    product_of_registers,
)

SAMPLES = 128, 128, 16, 8
"""Channels, keys of a tile, and how many of these and of the queries of a tile are looked at."""
_LOG2_E = 1.4426950408889634
_MOST_GROUPS = 40
"""Of eight queries of a program: registers have their sums."""
_TILES = 32
"""Of a batch, which a group of warps sums up."""
_PARTS, _WARPGROUPS = 4, 2
"""Of a product, an even number; and of a program. No other was faster on an H200."""
_LIST_THREADS = 256
"""Of a block of the second kernel."""


def make_source(groups: int) -> str:
    """CUDA of the first kernel, for so many groups of eight queries of a program."""
    sizes = sorted({groups // _PARTS, -(-groups // _PARTS)})
    assert sizes[0] > 0
    names = {
        "GROUPS": groups,
        "PARTS": _PARTS,
        "MOST": sizes[-1],
        "WARPGROUPS": _WARPGROUPS,
        "SCALE": f"{_LOG2_E * SAMPLES[0] ** -0.5!r}f",
    }
    return make_coded_source(names, Path(__file__).with_suffix(".cu"), _declare_products(sizes))


def _declare_products(sizes: Iterable[int]) -> str:
    """Products of 64 rows, in four registers, and so many times eight columns over 16 channels."""
    head, taken = "__device__ __forceinline__ void product", "u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int adds"
    source = f"template <int GROUPS_OF> {head}(float (&d)[MOST * 4], {taken});\n"
    kind = "k16.f32.bf16.bf16"
    return source + "".join(
        product_of_registers(f"template <> {head}<{size}>", "MOST * 4", size * 8, kind) for size in sizes
    )


def make_list_source(num_tiles: int) -> str:
    """CUDA of the second kernel, for a table of so many tiles."""
    names = {"THREADS": _LIST_THREADS, "EACH": -(-num_tiles // _LIST_THREADS)}
    return define(names) + Path(__file__).with_name("heaviest_tiles.cu").read_text()


def _shared_bytes(groups: int) -> int:
    """Queries, and what it takes to begin at a multiple of 1024."""
    return groups * 2048 + 1024


@functools.cache
def _load(groups: int, device: int) -> ctypes.c_void_p:
    return load_functions(make_source(groups), ("sum_tiles",), _shared_bytes(groups), device)[0]


@functools.cache
def _load_list(num_tiles: int, device: int) -> ctypes.c_void_p:
    return load_functions(make_list_source(num_tiles), ("list_heaviest",), 0, device)[0]


@functools.cache
def _count_multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _can_run(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and not lacks_compiler()


def fits(keys: KeyCodes, sizes: tuple[int, int, int, int]) -> bool:
    """Whether the kernels are for such keys and samples, given as SAMPLES, and for this GPU."""
    return sizes == SAMPLES and keys.largest_NCG.shape[2] == sizes[0] // 32 and _can_run(keys.end_NLW.device)


class _Queries(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_void_p),
        ("place", ctypes.c_void_p),
        ("row_bytes", ctypes.c_longlong),
        ("head_bytes", ctypes.c_longlong),
        ("num", ctypes.c_int),
        ("tiles", ctypes.c_int),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_void_p),
        ("largest", ctypes.c_void_p),
        ("mass", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("end_head_bytes", ctypes.c_longlong),
        ("end_row_bytes", ctypes.c_uint),
        ("batches", ctypes.c_int),
        ("num_history", ctypes.c_int),
        ("num_ends", ctypes.c_int),
        ("first_tile", ctypes.c_int),
    )


class _Lists(ctypes.Structure):
    _fields_ = (
        ("to", ctypes.c_void_p * 2),
        ("num_chosen", ctypes.c_int * 2),
        ("num_listed", ctypes.c_int * 2),
    )


def new_sums(num_heads: int, query_tiles: int, num_tiles: int, device: torch.device) -> Tensor:
    """Scratch [N, I, 2, J, 4], float32: a tile's sums for half of the eight queries stand together."""
    return torch.empty(num_heads, query_tiles, 2, num_tiles, 4, dtype=torch.float32, device=device)


def sum_tiles(q_QNW: Tensor, keys: KeyCodes, query_place_S: Tensor, sums: Tensor) -> None:
    """Mass of a sample of each tile's keys, for a sample of the queries; see `triton_coded_choice.coded_tile_sums`.

    Args:
        q_QNW: After RoPE; bfloat16.
        keys: Groups of 32 channels.
        query_place_S: Of the sampled queries, int64, eight of each tile of queries.
        sums: Written, from `new_sums`.
    """
    heads, query_tiles, _, num_tiles, _ = sums.shape
    _, tile, _, queries = SAMPLES
    num_history, device = keys.code_NCB.shape[1] // tile, q_QNW.get_device()
    _check(q_QNW, keys)
    assert len(query_place_S) == queries * query_tiles
    assert query_place_S.dtype == torch.int64
    assert sums.is_contiguous()
    columns = -(-query_tiles // _MOST_GROUPS)
    groups = max(_PARTS, -(-query_tiles // columns))
    num_ends, batches = num_tiles - num_history, -(-num_history // _TILES)
    assert keys.end_NLW.shape[1] >= num_ends * tile
    all_batches = batches + -(-num_ends // _TILES)
    programs = max(1, min(_count_multiprocessors(device) // (heads * columns), -(-all_batches // _WARPGROUPS)))
    strides = [2 * stride for stride in (*q_QNW.stride()[:2], *keys.end_NLW.stride()[:2])]
    given = _Queries(
        q_QNW.data_ptr(), query_place_S.data_ptr(), strides[0], strides[1], len(query_place_S), query_tiles
    )
    layer = _Layer(
        *(x.data_ptr() for x in keys[:4]), strides[2], strides[3], batches, num_history, num_ends,
        keys.history_start // tile,
    )  # fmt: skip
    numbers = ctypes.c_int(heads), ctypes.c_int(programs)
    arguments = [given, layer, address_of(sums), *numbers]
    blocks, threads = programs * heads * columns, _WARPGROUPS * 128
    launch(_load(groups, device), blocks, threads, _shared_bytes(groups), arguments, device)


def _check(q_QNW: Tensor, keys: KeyCodes) -> None:
    """Kinds, shapes and places."""
    channels, tile = SAMPLES[:2]
    code, largest, mass, end = keys[:4]
    assert q_QNW.dtype == largest.dtype == mass.dtype == end.dtype == torch.bfloat16
    assert code.dtype == torch.uint8
    assert code.shape[2] == channels // 2
    assert largest.shape[2] == channels // 32
    assert code.shape[1] % tile == keys.history_start % tile == 0
    assert q_QNW.stride(2) == end.stride(2) == 1
    assert all(stride % 8 == 0 for x in (q_QNW, end) for stride in x.stride()[:2]), (
        "rows begin at multiples of 16 bytes"
    )
    for x in (code, largest, mass):
        assert x.is_contiguous()
    for x in (q_QNW, *keys[:4]):
        assert x.data_ptr() % 16 == 0


def list_heaviest(
    sums: Tensor,
    is_candidate_J: Tensor,
    num_always: int,
    index_NIJ: Tensor,
    fewer_NIJ: Tensor | None = None,
) -> None:
    """The candidates with the highest mean share into the lists, in rising order; see `triton_choice.write_heaviest`.

    Args:
        sums: From `sum_tiles`.
        is_candidate_J: int32.
        num_always: Last entries of each list, which are not written.
        index_NIJ, fewer_NIJ: Lists of the same tiles of queries.
    """
    num_tiles, device = len(is_candidate_J), sums.get_device()
    heads, query_tiles, listed = index_NIJ.shape
    assert sums.numel() == heads * query_tiles * SAMPLES[3] * num_tiles
    assert num_tiles < 1 << 15, "two counts share 32 bits"
    fewer = 0 if fewer_NIJ is None else fewer_NIJ.shape[2]
    for x in (sums, index_NIJ, index_NIJ if fewer_NIJ is None else fewer_NIJ):
        assert x.is_contiguous()
    chosen = listed - num_always, fewer - num_always if fewer else listed - num_always
    lists = _Lists(
        (index_NIJ.data_ptr(), fewer_NIJ.data_ptr() if fewer_NIJ is not None else 0), chosen, (listed, fewer)
    )
    arguments: list[Any] = [address_of(sums), address_of(is_candidate_J), lists, ctypes.c_int(num_tiles)]
    launch(_load_list(num_tiles, device), heads * query_tiles, _LIST_THREADS, 0, arguments, device)

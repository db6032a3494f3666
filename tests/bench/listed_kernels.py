"""Attention kernels of the hot path against the fastest dense one of the same run.

`python -m tests.bench.listed_kernels` on a GPU, at the sizes of Wan2.1-1.3B: the table of the rollout (see
PERFORMANCE.md), 131,072 keys at several densities, and the dense segments of the native windows. Calls are replayed as
CUDA graphs, as in the rollout, so that no launch is timed. Work is what a dense kernel would do for the same queries
and keys: channels that carry log m are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.bench.record import keep, report
from tests.tables import code_table
from workers.cache.table_layout import EXTRA_CHANNELS, write_log_mass
from workers.config import KernelName
from workers.contracts import Kernel, KeyValues
from workers.errors import KernelUnavailable
from workers.kernels.listed_codes import CodedKeys
from workers.kernels.listed_tiles import AttendTable, attend_listed_plain, make_attend
from workers.kernels.select import Hardware, KernelNeed, choose, load_kernel

HEADS, HEAD_DIM, TILE = 12, 128, 128
DENSE: tuple[KernelName, ...] = ("flash-attn-4", "flash-attn-3", "flashinfer", "sdpa")
LARGEST_ERROR = 0.02
"""bfloat16 rounds inputs and weights to 0.4%."""


@dataclass(frozen=True)
class Case:
    """Queries over a table of tiles of which each tile of queries sees some."""

    name: str
    num_queries: int
    num_tiles: int
    num_listed: int
    tries: bool = False
    """Every shape of the Triton kernel is timed."""


CASES = (
    Case("table of the rollout, a tenth", 4680, 623, 96, tries=True),
    Case("table of the rollout, all (TempCache alone)", 4680, 623, 623),
    *(
        Case(f"131,072 keys, {density:.0%}", 4680, 1024, round(1024 * density), density == 0.2)
        for density in (0.05, 0.1, 0.2, 0.3)
    ),
    Case("1,165,312 keys, 10%", 4680, 9104, 910),
)
"""The last one is of a size that only a replayed table has."""
TRITON_SHAPES = (
    *((128, 128, 8, 2, tma) for tma in (True, False)),
    *((128, 64, 8, stages, True) for stages in (3, 4)),
    (128, 64, 8, 3, False),
    (128, 64, 4, 3, True),
    *((64, 64, 4, stages, True) for stages in (2, 3)),
    (64, 128, 4, 2, True),
)
"""Queries and keys of a step, warps, stages, and whether tensor descriptors bring the keys."""
CODE_SHAPES = ((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3))
"""The same of the kernel for 8-bit codes, which has no descriptors."""
DENSE_CASES = ((4680, 32_760), (23_400, 32_760), (4680, 131_072))
"""Queries and keys of the native windows, chunk by chunk and rolling, and of a long history."""


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Median of a call replayed as a CUDA graph; one that cannot be captured, or has no GPU, is called."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles
            call()
    torch.cuda.synchronize()
    run: Callable[[], object] = call
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
        run = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    run()
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def dense_kernels(device: torch.device, dtype: torch.dtype, has_flashinfer: bool) -> dict[str, Kernel]:
    """Those that can run here."""
    kernels: dict[str, Kernel] = {}
    for name in DENSE:
        if name == "flashinfer" and not has_flashinfer:
            continue
        try:
            kernels[name] = choose(name, Hardware.of(device), KernelNeed(dtype, HEAD_DIM), load_kernel).kernel
        except KernelUnavailable as error:
            print(f"left out: {error}", flush=True)
    return kernels


def draw_keys(num_keys: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys with their channels of log m, all 0, and values; a head's lie together."""
    k, v = (
        torch.empty(HEADS, num_keys, width, device=device, dtype=dtype).normal_()
        for width in (HEAD_DIM + EXTRA_CHANNELS, HEAD_DIM)
    )
    k[..., HEAD_DIM:] = 0
    write_log_mass(k, HEAD_DIM, 0.0)
    return k, v


def draw_queries(num_queries: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    q = torch.randn(num_queries, HEADS, HEAD_DIM + EXTRA_CHANNELS, device=device, dtype=dtype)
    q[..., HEAD_DIM:] = 0
    q[..., HEAD_DIM : HEAD_DIM + 2] = 1
    return q


def draw_lists(case: Case, device: torch.device, *, ordered: bool) -> Tensor:
    """Each tile of queries sees other tiles, in rising order or in that of a choice, which is none."""
    rows = -(-case.num_queries // TILE)
    index = torch.rand(HEADS, rows, case.num_tiles, device=device).topk(case.num_listed, -1).indices
    index = index.sort(-1).values if ordered else index
    return index.int().contiguous()


def work_tflop(num_queries: int, num_keys: int) -> float:
    return 4e-12 * num_queries * num_keys * HEADS * HEAD_DIM


def dense_milliseconds(
    kernels: dict[str, Kernel], num_queries: int, num_keys: int, device: torch.device
) -> dict[str, float]:
    """By kernel, over so many keys side by side, as a cache of a general path keeps them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.randn(1, num_queries, HEADS, HEAD_DIM, device=device, dtype=dtype)
    k, v = (torch.randn(1, num_keys, HEADS, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    keys = KeyValues(k, v, torch.zeros(num_keys, 3, device=device))
    taken = {}
    for name, kernel in kernels.items():
        try:
            taken[name] = milliseconds(partial(kernel.attend, q, (keys,)), device)
        except RuntimeError as error:
            print(f"failed: {name} over {num_keys:,} keys: {str(error)[:200]}", flush=True)
    return taken


def check_error(attend: AttendTable, device: torch.device, dtype: torch.dtype) -> float:
    """Root-mean-square difference from the reference over the size of the result."""
    case = Case("check", 2 * TILE + 37, 11, 5)
    q, (k, v) = draw_queries(case.num_queries, device, dtype), draw_keys(case.num_tiles * TILE, device, dtype)
    k[..., HEAD_DIM] = (torch.rand(k.shape[:2], device=device) * 4 * HEAD_DIM**0.5).to(dtype)
    write_log_mass(k[:, TILE : 2 * TILE + 50], HEAD_DIM, -torch.inf)
    index = draw_lists(case, device, ordered=False)
    expected = attend_listed_plain(q.float(), k.float(), v.float(), index, TILE)
    found = attend(q, k, v, index).float()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def listed_ways(device: torch.device, dtype: torch.dtype) -> dict[str, AttendTable]:
    """Ways that can run here and agree with the reference; for the others one line says why not."""
    makers: dict[str, Callable[[], AttendTable]] = {
        "flash-attn-4": partial(make_attend, "flash-attn-4", TILE),
        "triton": partial(make_attend, "triton", TILE),
    }
    for shape in TRITON_SHAPES:
        makers[f"triton {shape}"] = partial(_make_triton, shape)
    for cut in CODE_SHAPES:
        makers[f"triton codes {cut}"] = partial(_make_codes, cut)
    if device.type != "cuda":
        makers = {"torch": partial(make_attend, "torch", TILE)}
    ways = {}
    for name, make in makers.items():
        try:
            attend = make()
            error = check_error(attend, device, dtype)
        except Exception as problem:
            print(f"left out: {name}: {type(problem).__name__}: {str(problem).strip()[:300]}", flush=True)
            continue
        if error > LARGEST_ERROR:
            print(f"left out: {name}: differs from the reference by {error:.2e}", flush=True)
            continue
        ways[name] = attend
    return ways


def _make_triton(shape: tuple[int, int, int, int, bool]) -> AttendTable:
    from workers.kernels.triton_listed import Config, make_triton_listed

    return make_triton_listed(TILE, Config(*shape))


def _make_codes(shape: tuple[int, int, int, int]) -> AttendTable:
    """Over keys in 8 bits, which are made of a table once."""
    from workers.kernels.triton_codes import make_triton_codes
    from workers.kernels.triton_listed import Config

    attend, held = make_triton_codes(TILE, Config(*shape)), dict[tuple[int, torch.Size], CodedKeys]()

    def attend_table(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        key = k.data_ptr(), k.shape
        if key not in held:
            held.clear()
            held[key] = code_table(k, v)
        return attend(q[..., :HEAD_DIM], held[key], index)[0]

    return attend_table


def bench(
    device: torch.device,
    on_rows: Callable[[Sequence[dict[str, Any]]], None],
    *,
    has_flashinfer: bool = False,
    ends_at: float = float("inf"),
) -> list[dict[str, Any]]:
    """All rows; `on_rows` is told those so far."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernels, rows = dense_kernels(device, dtype, has_flashinfer), list[dict[str, Any]]()
    for num_queries, num_keys in DENSE_CASES:
        for name, ms in dense_milliseconds(kernels, num_queries, num_keys, device).items():
            what = f"dense, {num_queries:,} queries, {num_keys:,} keys"
            rows.append(
                {"case": what, "kernel": name, "ms": ms, "tflops": work_tflop(num_queries, num_keys) / ms * 1e3}
            )
    highest = max((row["tflops"] for row in rows), default=None)
    on_rows(rows)
    ways = listed_ways(device, dtype)
    for case in CASES:
        if time.monotonic() > ends_at:
            print(f"not begun, the time given has run out: {case.name}", flush=True)
            continue
        try:
            rows += listed_rows(case, ways, kernels, device, highest)
        except RuntimeError as error:
            print(f"failed: {case.name}: {str(error).strip()[:300]}", flush=True)
        on_rows(rows)
    return rows


def listed_rows(
    case: Case, ways: dict[str, AttendTable], kernels: dict[str, Kernel], device: torch.device, highest: float | None
) -> list[dict[str, Any]]:
    """Every way at one size, beside dense kernels over as many keys as a query sees."""
    seen, dtype = case.num_listed * TILE, torch.bfloat16 if device.type == "cuda" else torch.float32
    dense = dense_milliseconds(kernels, case.num_queries, seen, device)
    best = min(dense, key=lambda name: dense[name])
    q, (k, v) = draw_queries(case.num_queries, device, dtype), draw_keys(case.num_tiles * TILE, device, dtype)
    rows = []
    for ordered in (False, True):
        index = draw_lists(case, device, ordered=ordered)
        for name, attend in ways.items():
            if (ordered and " " in name) or (name.startswith("triton ") and not case.tries):
                continue
            ms = milliseconds(partial(attend, q, k, v, index), device)
            tflops = work_tflop(case.num_queries, seen) / ms * 1e3
            rows.append(
                {
                    "case": case.name,
                    "kernel": name + (", lists in rising order" if ordered else ""),
                    "ms": ms,
                    "tflops": tflops,
                    "keys_seen": seen,
                    "of_dense_same_work": dense[best] / ms,
                    "of_highest_dense_rate": tflops / highest if highest else None,
                    "dense": f"{best} {dense[best]:.4g} ms",
                }
            )
            print(rows[-1], flush=True)
    return rows


def keep_so_far(name: str, notes: str, rows: Sequence[dict[str, Any]]) -> None:
    keep(name, rows, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--flashinfer", action="store_true", help="its dense kernel too, which it may have to build first"
    )
    parser.add_argument("--seconds", type=float, default=80.0, help="no case is begun after so many")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("these kernels need a GPU")
    torch.manual_seed(0)
    notes = (
        f"{HEADS} heads of {HEAD_DIM}, bfloat16, tiles of {TILE}, random lists; torch {torch.__version__}; medians of "
        "7 replays of a CUDA graph. of_dense_same_work: time of the fastest dense kernel of this run over as many keys "
        "as a query sees, over the time of the row. of_highest_dense_rate: TFLOP/s of the row over the highest of the "
        "dense rows. Channels that carry log m count as no work. Of Triton: queries and keys of a step, warps, stages, "
        "whether tensor descriptors bring the keys; codes: keys and values in 8 bits"
    )
    name = "listed_kernels-" + "-".join(torch.cuda.get_device_name().lower().removeprefix("nvidia ").split())
    with torch.inference_mode():
        rows = bench(
            torch.device("cuda"),
            partial(keep_so_far, name, notes),
            has_flashinfer=asked.flashinfer,
            ends_at=time.monotonic() + asked.seconds,
        )
    report(name, rows, notes)


if __name__ == "__main__":
    main()

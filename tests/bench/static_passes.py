"""The passes between products of a static layer, each against its bytes and against what the compiler makes of it.

`python -m tests.bench.static_passes` on a GPU, at the sizes of a chunk of Wan2.1-1.3B. Each pass follows a product that
writes what it reads, over streams that do not fit into the second-level cache together, as in a layer; times are those
of its own kernels in a profile of that. Every cut of a kernel says whether it wrote the bits of the usual one. A last
group says which calls clear memory. `--layers` times whole layers instead. Elsewhere `--small` tries the code.
"""

from __future__ import annotations

import argparse
import importlib
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.bench.fp8_linears import Bench, LayerWay, Row, layers, measure, random_product
from tests.bench.history_parts import kernel_times
from tests.bench.least_work import milliseconds_of
from tests.bench.record import report
from workers.model.add_norm import Norm, add_product, norm_codes_plain, norm_rows, norm_rows_plain
from workers.model.backbones import find_backbone
from workers.model.fp8_linears import Fp8Way, LinearWeights, Product, multiply, quantise
from workers.model.rope import Rotation, grid_positions, make_rotation
from workers.model.static_layers import Targets, linear_gelu, norm_rotate_plain

EPS, SETS, PADDING = 1e-6, 8, 16
"""SETS: of streams and products that take turns; PADDING: channels of log m behind those of a head."""
CUTS = [(1, 1, 1), (1, 2, 1), (1, 4, 1), (4, 4, 2), (12, 2, 3), (12, 4, 3)]
"""Tokens of a program, warps, stages; the best is tried from behind, too."""
ROTATIONS = [(1, 1), (1, 2), (1, 4), (2, 4), (4, 8)]
"""Tokens of a program, warps; likewise."""
_PRODUCT = re.compile("nvjet|gemm|cutlass|cublas|splitk", re.I)
_NOTES = (
    "ms: of one launch, or of all kernels of the pass. differ: share of values whose bits are not those of the "
    "compiler's; beyond: of these, more than one rounding of bfloat16 apart. least_ms: bytes at 4.2 TB/s."
)


class Pass(NamedTuple):
    """One pass; each way takes one of the sets and what the product before gave."""

    name: str
    num_bytes: float
    sets: Sequence[Any]
    before: Callable[[int], Product]
    plain: Callable[[Any, Product], Sequence[Tensor]]
    """By the compiler on a GPU."""
    kernel: Callable[[Any, Product, Any], Sequence[Tensor]]
    """With a cut."""
    cuts: Sequence[Any]
    usual: Any
    """First of all cuts, as it is used; None elsewhere than on a GPU."""


def kernels_of(bench: Bench, calls: Sequence[Callable[[], object]]) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches by kernel of all calls, replayed as one graph."""
    for call in calls:
        call()
    if bench.device.type != "cuda":
        began = time.perf_counter()
        for call in calls:
            call()
        return {"all": ((time.perf_counter() - began) * 1e3, len(calls))}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return kernel_times(graph.replay, 5)


def ms_of(bench: Bench, one: Pass, way: Callable[[Any, Product], object]) -> float:
    """Milliseconds of one pass, the products before it left out."""

    def call(index: int) -> None:
        way(one.sets[index], one.before(index))

    times = kernels_of(bench, [partial(call, index) for index in range(SETS)])
    return sum(ms for name, (ms, _) in times.items() if not _PRODUCT.search(name) and "Memset" not in name) / SETS


def differences(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Row:
    """Of all that is written: shares of values."""
    num, differ, beyond = 0, 0, 0
    for a, b in zip(found, expected, strict=True):
        num += a.numel()
        if a.dtype != torch.bfloat16:
            differ += int((a.float() != b.float()).sum())
            continue
        bits = [x.contiguous().view(torch.int16).int() for x in (a, b)]
        rank = [torch.where(x < 0, -32768 - x, x) for x in bits]
        apart = (rank[0] - rank[1]).abs()
        differ, beyond = differ + int((apart > 0).sum()), beyond + int((apart > 1).sum())
    return {"differ": differ / num, "beyond": beyond / num}


def rows_of(bench: Bench, one: Pass) -> list[Row]:
    """What the compiler makes of the pass, then every cut of the kernel; the best one from behind as well."""
    compiled = torch.compile(one.plain, dynamic=False) if bench.device.type == "cuda" else one.plain
    product = one.before(0)
    expected = [x.clone() for x in compiled(one.sets[0], product)]
    rows = [_row(one, "compiler", ms_of(bench, one, compiled))]
    if one.usual is None:
        return rows
    usual = [x.clone() for x in one.kernel(one.sets[0], product, one.usual)]

    def add(cut: Any) -> None:
        try:
            found = one.kernel(one.sets[0], product, cut)
            same = all(torch.equal(a.float(), b.float()) for a, b in zip(found, usual, strict=True))
            row = _row(one, str(cut), 0.0) | differences(found, expected) | {"same_bits": same}
            row |= _row(one, str(cut), ms_of(bench, one, lambda some, p: one.kernel(some, p, cut)))
        except Exception as problem:  # one way's failure leaves the others
            row = {"part": one.name, "way": str(cut), "failed": f"{type(problem).__name__}: {str(problem)[:160]}"}
        rows.append(row)
        print(row, flush=True)

    for cut in one.cuts:
        add(cut)
    fastest = min((row["ms"], place) for place, row in enumerate(rows[1:]) if "ms" in row)[1]
    add(one.cuts[fastest]._replace(is_reversed=True))
    best = min((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    print(f"{one.name}: compiler {rows[0]['ms']}, best {best['ms']} ms by {best['way']}", flush=True)
    return rows


def _row(one: Pass, way: str, ms: float) -> Row:
    row: Row = {"part": one.name, "way": way, "ms": round(ms, 5), "least_ms": milliseconds_of(one.num_bytes / 1e9)}
    return row | ({"gb_per_s": one.num_bytes / ms / 1e6} if ms else {})


class Sizes(NamedTuple):
    """What all passes share."""

    bench: Bench
    x: list[Tensor]
    inputs: list[Tensor]
    modulation: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, bench: Bench) -> Sizes:
        dim, tokens = bench.backbone.dim, bench.tokens
        x = [bench.draw(tokens, dim, seed=seed) for seed in range(SETS)]
        inputs = [bench.draw(tokens, dim, seed=seed + 20) for seed in range(SETS)]
        modulation = bench.draw(6, dim, seed=30), bench.draw(bench.frames, 6, dim, seed=31) / 4
        return cls(bench, x, inputs, modulation, (bench.draw(dim, seed=32), bench.draw(dim, seed=33)))

    def linear(self, width: int) -> LinearWeights:
        dim = self.bench.backbone.dim
        return LinearWeights(self.bench.draw(width, dim, seed=40) / dim**0.5, self.bench.draw(width, seed=41))


def norm_passes(sizes: Sizes) -> list[Pass]:
    """Into rows, and into codes of a product of codes."""
    bench, dim = sizes.bench, sizes.bench.backbone.dim
    stream, linear = bench.tokens * dim * bench.dtype.itemsize, sizes.linear(dim)
    scaled = random_product(bench, dim)

    def value(index: int) -> Product:
        return multiply(linear, sizes.inputs[index])

    def codes(index: int) -> Product:  # as long as one of codes, and written as lately
        return scaled._replace(sum_QO=value(index).sum_QO)

    def rows(name: str, norm: Norm) -> Pass:
        def plain(x: Tensor, product: Product) -> Sequence[Tensor]:
            return norm_rows_plain(x, product, norm, EPS)

        def kernel(x: Tensor, product: Product, cut: Any) -> Sequence[Tensor]:
            return fused_norms.norm_rows(x, product, norm, EPS, cut)

        return Pass(name, 4 * stream, sizes.x, value, plain, kernel, cuts, fused_norms and fused_norms.ROWS)

    def in_codes(name: str, norm: Norm) -> Pass:
        def plain(x: Tensor, product: Product) -> Sequence[Tensor]:
            out, found = norm_codes_plain(x, product, norm, EPS)
            return out, *found

        def kernel(x: Tensor, product: Product, cut: Any) -> Sequence[Tensor]:
            return fused_norms.norm_codes(x, product, norm, EPS, cut)

        return Pass(name, 3.5 * stream, sizes.x, codes, plain, kernel, cuts, fused_norms and fused_norms.CODES)

    fused_norms = _import("fused_norms", bench)
    cuts = [fused_norms.Launch(*cut) for cut in CUTS] if fused_norms else []
    m = sizes.modulation
    return [
        rows("rows: gated, modulated", Norm(*m, 5, 0)),
        rows("rows: gated, weighted", Norm(*m, 2, -1, *sizes.weights)),
        rows("rows: not gated, modulated", Norm(*m, -1, 3)),
        in_codes("codes: gated, modulated", Norm(*m, 5, 0)),
    ]


def rotate_passes(sizes: Sizes) -> list[Pass]:
    """Queries, keys and values where attention reads them, of values and of a product of codes."""
    bench, b = sizes.bench, sizes.bench.backbone
    linear, norms = sizes.linear(3 * b.dim), (bench.draw(b.dim, seed=50), bench.draw(b.dim, seed=51))
    position = grid_positions(torch.arange(bench.frames, device=bench.device), *bench.grid)
    rotation = make_rotation(position[None], b.head_dim, b.rope_theta)
    scaled = random_product(bench, 3 * b.dim)
    wide = b.head_dim + PADDING
    rooms = [
        (
            torch.zeros(bench.tokens, b.num_heads, wide, device=bench.device, dtype=bench.dtype),
            torch.zeros(b.num_heads, bench.tokens, wide, device=bench.device, dtype=bench.dtype),
            torch.zeros(b.num_heads, bench.tokens, b.head_dim, device=bench.device, dtype=bench.dtype),
        )
        for _ in range(SETS)
    ]
    to = [Targets(q[..., : b.head_dim], k[..., : b.head_dim], v) for q, k, v in rooms]

    def value(index: int) -> Product:
        return multiply(linear, sizes.inputs[index])

    def codes(index: int) -> Product:
        return scaled._replace(sum_QO=value(index).sum_QO)

    def plain(to: Targets, product: Product) -> Sequence[Tensor]:
        norm_rotate_plain(product.value, *norms, Rotation(*rotation), EPS, to)
        return to

    def kernel(to: Targets, product: Product, cut: Any) -> Sequence[Tensor]:
        sums, *scales = product
        fused_rotate.norm_rotate(sums, norms, rotation, EPS, to, None if scales[0] is None else scales, cut)
        return to

    num_bytes = 6 * bench.tokens * b.dim * bench.dtype.itemsize + 2 * rotation.cos.nbytes
    fused_rotate = _import("fused_rotate", bench)
    cuts = [fused_rotate.Launch(*cut) for cut in ROTATIONS] if fused_rotate else []
    usual = fused_rotate and fused_rotate.ROTATE
    name = "norm and rotation"
    return [
        Pass(name, num_bytes, to, value, plain, kernel, cuts, usual),
        Pass(f"{name} of a product of codes", num_bytes, to, codes, plain, kernel, cuts, usual),
    ]


def rotations_with_codes(sizes: Sizes) -> list[Row]:
    """The rotation and what codes queries, keys and values, of a product of codes."""
    from tests.bench.rotate_codes import Given, Rooms, rows_of_codes

    bench, b = sizes.bench, sizes.bench.backbone
    linear, scaled = sizes.linear(3 * b.dim), random_product(bench, 3 * b.dim)
    position = grid_positions(torch.arange(bench.frames, device=bench.device), *bench.grid)
    rotation = make_rotation(position[None], b.head_dim, b.rope_theta)

    def product(index: int) -> Product:
        return scaled._replace(sum_QO=multiply(linear, sizes.inputs[index]).value)

    def ms(way: Callable[[int, Any], None]) -> float:
        return ms_of(bench, Pass("codes", 0.0, range(SETS), product, way, way, [], None), way)  # type: ignore[arg-type]

    rooms = [Rooms(bench.tokens, b.num_heads, PADDING, bench.device) for _ in range(SETS)]
    norms = bench.draw(b.dim, seed=50), bench.draw(b.dim, seed=51)
    return rows_of_codes(Given(rooms, product, norms, (rotation.cos, rotation.sin), EPS, ms))


def _import(name: str, bench: Bench) -> Any:
    """A module of kernels, where there is a GPU."""
    return importlib.import_module(f"workers.model.{name}") if bench.device.type == "cuda" else None


def as_two(sizes: Sizes) -> list[Row]:
    """The end of a layer and the beginning of the next, by the compiler in two passes: what the first of `norm_passes`
    does in one; and each of them by the kernel."""
    bench, dim, m = sizes.bench, sizes.bench.backbone.dim, sizes.modulation
    stream, linear = bench.tokens * dim * bench.dtype.itemsize, sizes.linear(dim)
    rows = []
    for name, kernels in (("compiler", False), ("kernel", True)):

        def end(x: Tensor, product: Product, kernels: bool = kernels) -> Tensor:
            return add_product(x, product, *m, 5, kernels=kernels)

        def begin(x: Tensor, kernels: bool = kernels) -> Tensor:
            return norm_rows(x, None, Norm(*m, shift=0), EPS, kernels=kernels)[1]

        is_cuda = bench.device.type == "cuda"
        first, second = (torch.compile(one, dynamic=False) if is_cuda else one for one in (end, begin))

        def call(index: int, ways: Any = (first, second)) -> None:
            ways[1](ways[0](sizes.x[index], multiply(linear, sizes.inputs[index])))

        calls = [partial(call, index) for index in range(SETS)]
        times = kernels_of(bench, calls)
        for kernel, (ms, num) in times.items():
            if not _PRODUCT.search(kernel) and "Memset" not in kernel:
                row: Row = {"part": "end of a layer, beginning of the next", "way": f"{name}: {kernel[:60]}"}
                rows.append(row | {"ms": round(ms / num, 5)})
    least = (3 * stream, 2 * stream)
    print(f"least: {[round(milliseconds_of(num / 1e9), 5) for num in least]} ms", flush=True)
    return rows


def who_clears(sizes: Sizes) -> list[Row]:
    """Clearings of memory of one call of each product."""
    bench, b = sizes.bench, sizes.bench.backbone
    up, x = sizes.linear(b.ffn_dim), sizes.inputs[0]
    wide = bench.draw(bench.tokens, b.ffn_dim, seed=60)
    down = LinearWeights(bench.draw(b.dim, b.ffn_dim, seed=61) / b.ffn_dim**0.5, bench.draw(b.dim, seed=62))
    codes = norm_codes_plain(x, None, Norm(*sizes.modulation, shift=0), EPS)[1]
    calls: dict[str, Callable[[], object]] = {
        "product of queries, keys, values": partial(multiply, sizes.linear(3 * b.dim), x),
        "product of one width": partial(multiply, sizes.linear(b.dim), x),
        "product up, GELU": partial(linear_gelu, x, up.weight_OI, up.bias_O),
        "product down": partial(multiply, down, wide),
        "product up of codes": partial(multiply, quantise(up), codes),
    }
    rows = []
    for name, call in calls.items():
        found = kernels_of(bench, [call] * 4)
        cleared = sum(num for kernel, (_, num) in found.items() if "Memset" in kernel or "Fill" in kernel) / 4
        rows.append({"part": "clears memory", "way": name, "times": cleared, "kernels": [key[:60] for key in found]})
        print(rows[-1], flush=True)
    return rows


LAYER_WAYS = {
    "bfloat16, compiler": LayerWay("none", Fp8Way(kernels=False)),
    "bfloat16": LayerWay("none"),
    "all": LayerWay("all"),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="sizes of a test, on any device")
    parser.add_argument("--layers", action="store_true", help="whole layers instead")
    parser.add_argument("--parts", nargs="*", default=["norms", "rotations", "codes", "two", "clears"])
    parser.add_argument("--name", default="static_passes-h200")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.config.recompile_limit = 64  # one function, many ways
    named, grid = ("tiny-test", (2, 4)) if asked.small else ("wan2.1-t2v-1.3b", (30, 52))
    bench = Bench(find_backbone(named), device, torch.bfloat16, grid)
    if asked.layers:
        report(f"{asked.name}-layers", list(measure(bench, layers(bench, LAYER_WAYS))), _NOTES)
        return
    sizes, rows = Sizes.of(bench), []
    passes = {"norms": norm_passes, "rotations": rotate_passes}
    for part in asked.parts:
        for one in passes[part](sizes) if part in passes else []:
            rows += rows_of(bench, one)
    rows += as_two(sizes) if "two" in asked.parts else []
    rows += rotations_with_codes(sizes) if "codes" in asked.parts and device.type == "cuda" else []
    rows += who_clears(sizes) if "clears" in asked.parts else []
    report(asked.name, rows, _NOTES)


if __name__ == "__main__":
    main()

"""Linear layers in 8-bit floats, at the sizes of a chunk of Wan2.1-1.3B: products, what writes their inputs, a layer.

`python -m tests.bench.fp8_linears` on a GPU. Everything is replayed as a CUDA graph over the weights of four layers, so
that no launch is timed and no weight lies in the second-level cache; `chunk_ms` is of 30 layers and 5 calls. Kernels
are compared with their plain forms first; what fails is a row that says so. Elsewhere `--small` tries the code.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.history_engine import make_model
from tests.bench.record import report
from workers.model.add_norm import Norm, norm_codes_plain
from workers.model.backbones import Backbone, find_backbone
from workers.model.fp8_linears import (
    Codes,
    Fp8Linears,
    Fp8Way,
    LinearWeights,
    Product,
    encode_rows,
    gelu_codes_plain,
    multiply,
    quantise,
    row_codes_plain,
    weight_codes_plain,
)
from workers.model.prompt_attention import PromptAttention, attend_prompt, attend_prompt_plain, hold_prompt
from workers.model.rope import grid_positions, make_rotation
from workers.model.static_layers import LayerWeights, StaticLayers, Stream, Targets, linear_gelu

Row = dict[str, Any]
LAYERS, CALLS = 4, 5
"""Whose weights take turns; of the model in a chunk."""
_NOTES = (
    "error: RMS of the difference over that of the exact result (of a layer: of what it adds); products against "
    "float32 over the same bfloat16 numbers, codes against the plain form's; a product writes its weight's codes, too. "
    "A chunk is four calls in 8 bits and a clean pass in bfloat16 for a layer, five calls for a part. vectors: scales "
    "and bias by the product itself, else by what follows it. kernels: codes by our own, else by what the compiler "
    "makes of the plain form."
)
SHAPES = {"qkv": (1, 3, 1), "o, cross q, cross o": (1, 1, 3), "up": (1, 0, 1), "down": (0, 1, 1)}
"""Inputs and outputs in widths of the model, 0 for the feed-forward's, and how many there are in a layer."""


class Bench:
    """Sizes and clock.

    Args:
        backbone: Of the model.
        device, dtype: Where and how it computes.
        grid: Rows and columns of tokens in a latent frame.
    """

    def __init__(self, backbone: Backbone, device: torch.device, dtype: torch.dtype, grid: tuple[int, int]) -> None:
        self.backbone, self.device, self.dtype, self.grid = backbone, device, dtype, grid
        self.frames = backbone.chunk_latent_frames
        self.tokens = self.frames * grid[0] * grid[1]
        self.per_chunk = CALLS * backbone.num_layers

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, device=self.device, generator=generator).to(self.dtype)

    def ms(self, calls: list[Callable[[], object]], repeats: int = 15) -> float:
        """Of one call, median."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - began) * 1e3 / len(calls)
        for call in calls * 2:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(repeats + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times[3:]) / len(calls)


class Case(NamedTuple):
    """Something to time beside others of its group."""

    group: str
    name: str
    calls: list[Callable[[], object]]
    error: Callable[[], float]
    flop: float = 0.0
    num_bytes: float = 0.0
    times: int = 1
    """In a layer."""


def measure(bench: Bench, cases: Iterator[Case]) -> Iterator[Row]:
    """Error, then time; what fails says why."""
    for case in cases:
        row: Row = {"part": case.group, "way": case.name}
        try:
            row["error"] = case.error()
            ms = bench.ms(case.calls)
            row |= {"ms": round(ms, 4), "chunk_ms": round(ms * bench.per_chunk * case.times, 2)}
            row |= {"tflop_per_s": case.flop / ms / 1e9} if case.flop else {}
            row |= {"gb_per_s": case.num_bytes / ms / 1e6} if case.num_bytes else {}
        except Exception as problem:  # one way's failure leaves the others
            row["failed"] = f"{type(problem).__name__}: {str(problem)[:160]}"
        print(row, flush=True)
        yield row


def products(bench: Bench) -> Iterator[Case]:
    """Each shape in bfloat16 and in 8 bits."""
    dim, ffn = bench.backbone.dim, bench.backbone.ffn_dim
    for name, (wide_in, wide_out, times) in SHAPES.items():
        num_in, num_out = wide_in * dim or ffn, wide_out * dim or ffn
        x = bench.draw(bench.tokens, num_in)
        linears = [
            LinearWeights(bench.draw(num_out, num_in, seed=seed) / num_in**0.5, bench.draw(num_out, seed=seed))
            for seed in range(LAYERS)
        ]
        wide = [one.float() for one in (x, *linears[0][:2])]  # type: ignore[union-attr]
        exact = F.linear(*wide)
        flop, codes = 2.0 * bench.tokens * num_in * num_out, encode_rows(x)

        def case(
            way: str,
            result: Callable[[LinearWeights], Product],
            some: list[LinearWeights],
            exact: Tensor = exact,
            name: str = name,
            sizes: tuple[float, int] = (flop, times),
        ) -> Case:
            calls = [partial(result, one) for one in some]
            return Case(name, way, list(calls), lambda: distance(calls[0]().value, exact), sizes[0], times=sizes[1])

        yield case("bfloat16", partial(_multiply, x), linears)
        if name == "up":
            yield case("bfloat16, GELU in it", partial(_multiply_gelu, x), linears, F.gelu(exact, approximate="tanh"))
        for way, vectors in (("8 bits", False), ("8 bits, vectors", True)):
            yield case(way, partial(_multiply, codes), [quantise(one, vectors=vectors) for one in linears])


def _multiply(x: Tensor | Codes, linear: LinearWeights) -> Product:
    return multiply(linear, x)


def _multiply_gelu(x: Tensor, linear: LinearWeights) -> Product:
    return Product(linear_gelu(x, linear.weight_OI, linear.bias_O))


class Cast(NamedTuple):
    """What writes codes: its plain form, and the kernel by its number of warps."""

    name: str
    plain: Callable[[], Codes]
    kernels: dict[str, Callable[[], tuple[Tensor, ...]]]
    num_bytes: int


def all_casts(bench: Bench) -> Iterator[Cast]:
    from workers.model import fused_codes as own
    from workers.model import fused_norms

    dim, ffn, tokens = bench.backbone.dim, bench.backbone.ffn_dim, bench.tokens
    x, modulation = bench.draw(tokens, dim), (bench.draw(6, dim, seed=1), bench.draw(bench.frames, 6, dim, seed=2))
    weights = bench.draw(dim, seed=3), bench.draw(dim, seed=4)
    added, wide = (random_product(bench, width) for width in (dim, ffn))
    heads = bench.draw(bench.backbone.num_heads, tokens, bench.backbone.head_dim).transpose(0, 1)
    first, gated = Norm(*modulation, shift=0), Norm(*modulation, 2, -1, *weights)

    def norm(product: Product | None, warps: int) -> tuple[Tensor, ...]:
        launch = fused_norms.CODES._replace(num_warps=warps)
        return fused_norms.norm_codes(x, product, first if product is None else gated, 1e-6, launch)[1:]

    def by_warps(way: Callable[[int], tuple[Tensor, ...]], *warps: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        return {f"kernel, {num} warps": partial(way, num) for num in warps}

    yield Cast(
        "norm -> codes",
        lambda: norm_codes_plain(x, None, first, 1e-6)[1],
        by_warps(lambda num: norm(None, num), 2, 4, 8),
        3 * tokens * dim,
    )
    yield Cast(
        "product + stream -> norm -> codes",
        lambda: norm_codes_plain(x, added, gated, 1e-6)[1],
        by_warps(lambda num: norm(added, num), 2, 4, 8),
        7 * tokens * dim,
    )
    gelu = by_warps(lambda num: own.gelu_codes(wide, num, approximate=True), 4, 8, 16)
    gelu |= {"kernel, 8 warps, exp": lambda: own.gelu_codes(wide, 8, approximate=False)}
    yield Cast("GELU -> codes", lambda: gelu_codes_plain(wide), gelu, 3 * tokens * ffn)
    value = Product(bench.draw(tokens, ffn, seed=11))
    gelu = by_warps(lambda num: own.gelu_codes(value, num, approximate=True), 4, 8, 16)
    yield Cast("GELU of values -> codes", lambda: gelu_codes_plain(value), gelu, 3 * tokens * ffn)
    rows = by_warps(lambda num: own.row_codes(heads, num), 2, 4, 8)
    yield Cast("heads -> codes", lambda: row_codes_plain(heads), rows, 3 * tokens * dim)


def casts(bench: Bench) -> Iterator[Case]:
    """What writes codes, by the compiler and by kernels."""
    for cast in all_casts(bench):
        compiled = torch.compile(cast.plain, dynamic=False)
        ways = {"compiler": compiled} | cast.kernels
        for name, way in ways.items():

            def error(way: Callable[[], tuple[Tensor, ...]] = way, plain: Callable[[], Codes] = cast.plain) -> float:
                return distance(decode(*way()), decode(*plain()))

            yield Case(cast.name, name, [way], error, num_bytes=cast.num_bytes)


def weights(bench: Bench) -> Iterator[Case]:
    """Codes of a weight, written before each product."""
    dim, ffn = bench.backbone.dim, bench.backbone.ffn_dim
    for name, (wide_in, wide_out, times) in SHAPES.items():
        shape = wide_out * dim or ffn, wide_in * dim or ffn
        some = [bench.draw(*shape, seed=seed) for seed in range(LAYERS)]
        coded = [quantise(LinearWeights(weight, weight[:, 0])) for weight in some]
        ways: dict[str, Callable[[LinearWeights], Tensor]] = {
            f"kernel, {warps} warps": partial(_weight_codes, num_warps=warps) for warps in (2, 4, 8)
        }
        if bench.device.type != "cuda":
            ways = {"plain": _weight_codes_plain}
        for way, write in ways.items():

            def error(write: Callable[[LinearWeights], Tensor] = write, one: LinearWeights = coded[0]) -> float:
                return distance(write(one), _weight_codes_plain(one))

            calls = [partial(write, one) for one in coded]
            yield Case(f"weight of {name}", way, list(calls), error, num_bytes=3.0 * some[0].numel(), times=times)


def _weight_codes(linear: LinearWeights, num_warps: int) -> Tensor:
    from workers.model import fused_codes

    assert linear.scale_1O is not None
    return fused_codes.weight_codes(linear.weight_OI, linear.scale_1O, num_warps)


def _weight_codes_plain(linear: LinearWeights) -> Tensor:
    assert linear.scale_1O is not None
    return weight_codes_plain(linear.weight_OI, linear.scale_1O)


def decode(code: Tensor, scale: Tensor) -> Tensor:
    return code.float() * scale


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).square().mean().sqrt() / exact.float().square().mean().sqrt())


def random_product(bench: Bench, width: int) -> Product:
    """As a product of codes gives it."""
    sums = bench.draw(bench.tokens, width, seed=8) * 1e6
    scales = (bench.draw(*shape, seed=9).float().abs() * 1e-3 + 5e-4 for shape in ((bench.tokens, 1), (1, width)))
    return Product(sums, *scales, bench.draw(width, seed=10))


class LayerRun:
    """A layer without its self-attention: random numbers stand for what that gives.

    Args:
        bench: Sizes.
        dtype: Of the model.
    """

    def __init__(self, bench: Bench, dtype: torch.dtype) -> None:
        b, device = bench.backbone, bench.device
        self.model = make_model(replace(b, num_layers=LAYERS), device, bench.dtype)
        if dtype != bench.dtype:
            self.model = copy.deepcopy(self.model).to(dtype)
        self.x = bench.draw(bench.tokens, b.dim).to(dtype)
        self._out = bench.draw(bench.tokens, b.num_heads, b.head_dim, seed=1).to(dtype) / 8
        self._time = bench.draw(bench.frames, 6, b.dim, seed=2).to(dtype) / 4
        position = grid_positions(torch.arange(bench.frames, device=device), *bench.grid)
        self._rotation = make_rotation(position[None], b.head_dim, b.rope_theta)
        self.prompt = hold_prompt(self.model.project_prompt(bench.draw(1, 113, b.text_dim, seed=3).to(dtype)))
        q = torch.zeros(bench.tokens, b.num_heads, b.head_dim, device=device, dtype=dtype)
        self._targets = Targets(q, *(torch.zeros_like(q.transpose(0, 1).contiguous()) for _ in range(2)))
        self._stream = Stream(self.x)

    def __call__(self, parts: StaticLayers, index: int) -> Tensor:
        """One layer behind the one before; the last one settles the stream."""
        weights, stream = parts.weights[index], self._stream if index else Stream(self.x)
        x = parts.enter(weights, stream, self._time, self._rotation, self._targets)
        self._stream = parts.leave(weights, self.prompt[index], x, self._out, self._time)
        return parts.settle(self._stream, self._time) if index + 1 == LAYERS else self._stream.x_QE

    def seen(self, parts: StaticLayers) -> list[Tensor]:
        """What the first layer gives: what it adds to the stream, queries and keys, values."""
        self(parts, 0)
        added = parts.settle(self._stream, self._time).float() - self.x.float()
        q, k, v = (part.float() for part in self._targets)
        return [added, torch.cat((q.transpose(0, 1), k)), v]


class LayerWay(NamedTuple):
    """How a layer is computed."""

    fp8: Fp8Linears
    linear: Fp8Way = Fp8Way()
    attend: PromptAttention = attend_prompt


WAYS = {
    "bfloat16": LayerWay("none"),
    "bfloat16, compiler": LayerWay("none", Fp8Way(kernels=False)),
    "ffn": LayerWay("ffn"),
    "large": LayerWay("large"),
    "all": LayerWay("all"),
    "large, vectors, compiler (as it was)": LayerWay(
        "large", Fp8Way(LayerWeights._fields, kernels=False), attend_prompt_plain
    ),
    "large, up by vectors": LayerWay("large", Fp8Way(vectors=("up",))),
    "large, vectors": LayerWay("large", Fp8Way(LayerWeights._fields)),
    "large, compiler": LayerWay("large", Fp8Way(kernels=False)),
}


def layers(bench: Bench, ways: Mapping[str, LayerWay] = WAYS) -> Iterator[Case]:
    """Each way compiled: what a chunk takes without self-attention."""
    run, wide = LayerRun(bench, bench.dtype), LayerRun(bench, torch.float32)
    exact = wide.seen(StaticLayers(wide.model))
    del wide
    for name, way in ways.items():
        parts = StaticLayers(run.model, *way)
        if bench.device.type == "cuda":
            parts.compile()

        def error(parts: StaticLayers = parts) -> float:
            found = run.seen(parts)
            errors = [round(distance(a, b), 5) for a, b in zip(found, exact, strict=True)]
            print(f"{name}: what is added, queries and keys, values differ from float32 by {errors}", flush=True)  # noqa: B023
            return errors[0]

        yield Case("layer", name, [partial(run, parts, index) for index in range(LAYERS)], error)


PARTS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "layers": layers,
    "products": products,
    "casts": casts,
    "weights": weights,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--small", action="store_true", help="sizes of a test, on any device")
    parser.add_argument("--name", default="fp8-linears-h200")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.config.recompile_limit = 64  # one piece of a layer, many ways
    if asked.small:
        bench = Bench(find_backbone("tiny-test"), device, torch.bfloat16, (2, 4))
    else:
        bench = Bench(find_backbone("wan2.1-t2v-1.3b"), device, torch.bfloat16, (30, 52))
    rows = [row for part in asked.parts for row in measure(bench, PARTS[part](bench))]
    before = next((row["chunk_ms"] for row in rows if row["way"] == "bfloat16" and "chunk_ms" in row), None)
    for row in rows:
        if row["part"] == "layer" and before is not None and "chunk_ms" in row:
            steps = (CALLS - 1) / CALLS  # a clean pass does not round
            row["chunk_ms"] = round(before * (1 - steps) + row["chunk_ms"] * steps, 2)
            row["saved_ms"] = round(before - row["chunk_ms"], 2)
    report(asked.name, rows, _NOTES)


if __name__ == "__main__":
    main()

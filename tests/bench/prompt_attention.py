"""Cross-attention to the prompt, from the product of its queries to what the next linear layer takes.

`python -m tests.bench.prompt_attention` on a GPU, at the sizes of a chunk of Wan2.1-1.3B: what the compiler makes of
the plain form, and the kernels cut in many ways, each from values and from a product of codes; then whole layers, with
the cut that was best in both. Queries lie where a product just left them, as in a layer; prompts of four layers take
turns. What fails is a row that says so. Elsewhere `--small` tries the code.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tests.bench.fp8_linears import LAYERS, Bench, Case, LayerWay, Row, distance, layers, measure, random_product
from tests.bench.record import report
from workers.model.backbones import find_backbone
from workers.model.fp8_linears import Product
from workers.model.prompt_attention import PromptAttention, PromptTable, attend_prompt_plain

ROWS, LONG_ROWS = 112, 512
"""Of a prompt; the last seven have no weight."""
SOURCES = ("values", "product of codes")
EPS = 1e-6
SHAPES = [(64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 2), (64, 8, 3), (128, 8, 2), (128, 8, 3), (32, 4, 3)]
"""Tokens at once, warps, stages."""
PROGRAMS = (132, 264, 528, 10**6)
"""The last: each has one block of tokens."""
LONG_SHAPES = [(64, 4, 2, 64), (64, 4, 3, 64), (64, 8, 2, 128), (128, 8, 2, 64), (128, 8, 3, 64), (128, 8, 2, 128)]
"""Tokens at once, warps, stages, rows at once."""
NORMS = [(4, 2), (4, 4), (8, 4), (16, 4), (8, 8), (16, 8)]
"""Tokens of a program, warps."""
_COMPILER = "compiler"
_NOTES = (
    "error: RMS of the difference from float64 over the same numbers, over that of the exact result; of a layer, of "
    "what it adds, from float32. gb_per_s: by the bytes that must move: queries and the result once, and the prompt."
)


def make_prompts(bench: Bench, rows: int) -> list[PromptTable]:
    mass = torch.zeros(rows, device=bench.device)
    mass[-8], mass[-7:] = 6.0, -torch.inf
    shape = LAYERS, bench.backbone.num_heads, rows, bench.backbone.head_dim
    k, v = (bench.draw(*shape, seed=seed) for seed in (1, 2))
    return [PromptTable(k[layer], v[layer], mass) for layer in range(LAYERS)]


def sources(bench: Bench) -> dict[str, Product]:
    dim = bench.backbone.dim
    return dict(zip(SOURCES, (Product(bench.draw(bench.tokens, dim, seed=3)), random_product(bench, dim)), strict=True))


def attend_exactly(product: Product, norm_E: Tensor, prompt: PromptTable) -> Tensor:
    q = product.value.double()
    q = q * (q.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm_E.double()
    heads, _, head_dim = prompt.k_NPD.shape
    q_NQD = q.unflatten(-1, (heads, head_dim)).transpose(0, 1)
    logit = q_NQD @ prompt.k_NPD.double().mT / head_dim**0.5 + prompt.log_mass_P.double()
    return (logit.softmax(-1) @ prompt.v_NPD.double()).transpose(0, 1).flatten(1)


def attention(bench: Bench, source: str, rows: int, ways: dict[str, Callable[[], PromptAttention]]) -> Iterator[Case]:
    """The compiler's way first; what it gives lies as the next linear layer takes it, or as its codes are made of."""
    product, prompts, norm_E = sources(bench)[source], make_prompts(bench, rows), bench.draw(bench.backbone.dim, seed=4)
    exact = attend_exactly(product, norm_E, prompts[0]).float()
    num_bytes = 2 * product.sum_QO.nbytes + sum(part.nbytes for part in prompts[0])

    def plain(product: Product, norm_E: Tensor, prompt: PromptTable, eps: float) -> Tensor:
        out_QND = attend_prompt_plain(product, norm_E, prompt, eps)
        return out_QND.flatten(1) if product.scale_Q1 is None else out_QND

    compiled = torch.compile(plain, dynamic=False) if bench.device.type == "cuda" else plain
    for name, make in ({_COMPILER: lambda: compiled} | ways).items():

        def call(prompt: PromptTable, make: Callable[[], PromptAttention] = make) -> Tensor:
            return make()(product, norm_E, prompt, EPS)

        calls = [partial(call, prompt) for prompt in prompts]
        error = partial(lambda one: distance(one().flatten(1), exact), calls[0])
        yield Case(f"{source}, {rows} rows", name, list(calls), error, num_bytes=num_bytes)


def by_launch(**changes: int) -> Callable[[], PromptAttention]:
    """The kernels, cut otherwise; imported where they are asked for, so that a failure is a row."""

    def make() -> PromptAttention:
        from workers.model import fused_prompt

        return partial(fused_prompt.attend_prompt, launch=fused_prompt.HOPPER._replace(**changes))

    return make


def norms(bench: Bench, source: str) -> Iterator[Case]:
    """The pass that makes inverse norms, alone."""
    product = sources(bench)[source]
    exact = (product.value.double().square().mean(-1) + EPS).rsqrt().float()
    for tokens, warps in NORMS:

        def call(tokens: int = tokens, warps: int = warps) -> Tensor:
            from workers.model import fused_prompt

            launch = fused_prompt.HOPPER._replace(norm_tokens=tokens, norm_warps=warps)
            return fused_prompt.inverse_norms(product, EPS, launch)

        error = partial(lambda one: distance(one(), exact), call)
        yield Case(f"norms of {source}", _norm_name(tokens, warps), [call], error, num_bytes=product.sum_QO.nbytes)


def _norm_name(tokens: int, warps: int) -> str:
    return f"{tokens} tokens, {warps} warps"


def best_of(rows: list[Row]) -> str:
    """The way that takes least in all groups together, of those that ran in all."""
    ways: dict[str, list[float]] = {}
    for row in rows:
        if "ms" in row and row["way"] != _COMPILER:
            ways.setdefault(row["way"], []).append(row["ms"])
    most = max(map(len, ways.values()), default=0)
    whole = {way: sum(times) for way, times in ways.items() if len(times) == most}
    return min(whole, key=whole.__getitem__, default="")


def set_best(bench: Bench) -> list[Row]:
    """Measure cuts of both passes; from here on the kernels are launched by the best."""
    rows = [row for source in SOURCES for row in measure(bench, norms(bench, source))]
    by_name = {_norm_name(*norm): {"norm_tokens": norm[0], "norm_warps": norm[1]} for norm in NORMS}
    norm = by_name.get(best_of(rows), {})
    cuts = {}
    for (block_m, warps, stages), programs in itertools.product(SHAPES, PROGRAMS):
        name = f"{block_m} tokens, {warps} warps, {stages} stages, {programs} programs"
        cuts[name] = {"block_m": block_m, "num_warps": warps, "num_stages": stages, "programs": programs} | norm
    ways = {name: by_launch(**cut) for name, cut in cuts.items()}
    found = [row for source in SOURCES for row in measure(bench, attention(bench, source, ROWS, ways))]
    if (best := best_of(found)) in cuts:
        from workers.model import fused_prompt

        fused_prompt.HOPPER = fused_prompt.HOPPER._replace(**cuts[best])
        print(f"best of both: {fused_prompt.HOPPER}", flush=True)
    return rows + found


def long_prompts(bench: Bench) -> list[Row]:
    ways = {
        f"{m} tokens, {warps} warps, {stages} stages, {rows} rows at once": by_launch(
            block_m=m, num_warps=warps, num_stages=stages, block_p=rows
        )
        for m, warps, stages, rows in LONG_SHAPES
    }
    return list(measure(bench, attention(bench, "values", LONG_ROWS, ways)))


def whole_layers(bench: Bench) -> list[Row]:
    """Both ways; what the kernels save stands in their row."""
    ways: dict[str, LayerWay] = {}
    for name, fp8 in (("bfloat16", LayerWay("none")), ("all", LayerWay("all"))):
        ways[f"{name}, prompt by the {_COMPILER}"] = fp8._replace(attend=attend_prompt_plain)
        ways[f"{name}, prompt by kernels"] = fp8
    rows = list(measure(bench, layers(bench, ways)))
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        if "chunk_ms" in before and "chunk_ms" in after:
            after["saved_ms"] = round(before["chunk_ms"] - after["chunk_ms"], 2)
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="sizes of a test, on any device")
    parser.add_argument("--no-layers", action="store_true", help="without whole layers, which take long to compile")
    parser.add_argument("--name", default="prompt_attention-h200")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch._dynamo.config.recompile_limit = 64  # one function, many ways
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if asked.small:
        bench = Bench(find_backbone("longtake-world"), device, dtype, (2, 4))
    else:
        bench = Bench(find_backbone("wan2.1-t2v-1.3b"), device, dtype, (30, 52))
    rows = set_best(bench) + long_prompts(bench)
    rows += [] if asked.no_layers else whole_layers(bench)
    report(asked.name, rows, _NOTES)


if __name__ == "__main__":
    main()

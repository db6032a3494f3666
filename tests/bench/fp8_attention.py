"""Attention in 8-bit floats: `python -m tests.bench.fp8_attention --check` says whether each variant of the kernel is
right, `--time` how fast it is at the sizes of Wan2.1-1.3B, beside FlashAttention-4 if that is installed.

Needs torch and Triton alone; results are kept as JSON where what `tests.bench.record` imports is there too.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers.coded_tiles import CODED_TILE as TILE
from workers.coded_tiles import CodedTiles, code_queries_plain, code_tiles_plain
from workers.kernels import fp8_tiles
from workers.kernels.fp8_attention import Cut
from workers.kernels.fp8_plain import attend_coded_plain
from workers.kernels.fp8_tiles import attend_coded, code_chunk, code_queries, code_tiles
from workers.kernels.listed_tiles import attend_listed_plain_lse

HEADS, QUERIES, KEPT_TILES, SEEN = 12, 4680, 1829, (146, 49, 732)
VARIANTS: dict[str, Cut] = {
    "queries held": Cut(),
    "queries held, split": Cut(split=True),
    "queries held, promoted at 2": Cut(promote=2),
    "queries held, promoted at 8": Cut(promote=8),
    "queries held, every 8th polynomial": Cut(polynomial=8),
    "queries held, every 4th polynomial": Cut(polynomial=4),
    "sums held": Cut(held_queries=False, stages=5),
    "sums held, split": Cut(held_queries=False, stages=5, split=True),
}
LARGEST_ERROR, LARGEST_LOSS, LARGEST_LSE = 0.02, 0.08, 0.02
"""Relative, root mean square: against the same casts, and against float32; and of log-sum-exps against the casts."""


class Drawn(NamedTuple):
    """Inputs of a case."""

    q_QNW: Tensor
    k_NLW: Tensor
    v_NLD: Tensor
    index_NIJ: Tensor | None


class Case(NamedTuple):
    """Sizes of one."""

    name: str
    queries: int
    keys: int
    listed: int | None
    """None: all in one run."""
    heads: int = 3
    mass: bool = True
    sharp: float = 1.0
    absent: float = 0.0
    """Share of keys that do not exist."""
    absent_tiles: int = 0


CASES = (
    Case("one tile", 128, 128, 1, heads=1),
    Case("three tiles of five", 300, 640, 3),
    Case("run of keys, last tile partly filled", 300, 333, None),
    Case("run of keys without log m", 300, 333, None, mass=False),
    Case("keys absent", 300, 1280, 7, absent=0.3),
    Case("whole tiles absent", 300, 1280, 7, absent_tiles=4),
    Case("nothing but absent keys", 130, 256, 2, absent_tiles=2),
    Case("sharp", 300, 1280, 7, sharp=3.0),
    Case("true sizes, 49 tiles", QUERIES, 200 * TILE, 49, heads=2),
    Case("true sizes, own chunk", QUERIES, QUERIES, None, heads=12, mass=False),
)


def draw(case: Case, device: torch.device, kind: torch.dtype = torch.bfloat16) -> Drawn:
    """Random queries, keys and lists, the same each time."""
    made = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=made, device=device)

    tiles, query_tiles = -(-case.keys // TILE), -(-case.queries // TILE)
    q = torch.zeros(case.queries, case.heads, 144, device=device)
    k = torch.zeros(case.heads, case.keys, 144, device=device)
    q[..., :128], k[..., :128] = normal(case.queries, case.heads, 128) * case.sharp, normal(case.heads, case.keys, 128)
    q[..., 128:130] = 1.0
    if case.mass:
        mass = torch.randint(1, 20, (case.heads, case.keys), generator=made, device=device).float()
        k[..., 128] = mass.log() * math.sqrt(128)
        k[..., 128][torch.rand(mass.shape, generator=made, device=device) < case.absent] = -(2.0**17)
        k[:, : case.absent_tiles * TILE, 128] = -(2.0**17)
    v = normal(case.heads, case.keys, 128) + normal(case.heads, 1, 128)
    index = None
    if case.listed is not None:
        order = torch.rand(case.heads, query_tiles, tiles, generator=made, device=device).argsort(-1)
        index = order[..., : case.listed].int().contiguous()
    q, k = q.to(kind), k.to(kind)
    return Drawn(q, k, v.to(kind), index) if case.mass else Drawn(q[..., :128], k[..., :128], v.to(kind), index)


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of a difference, relative to what was expected."""
    size = float(expected.float().square().mean().sqrt())
    return float((found.float() - expected.float()).square().mean().sqrt()) / max(size, 1e-30)


def compare(case: Case, given: Drawn, found: tuple[Tensor, Tensor]) -> dict[str, float]:
    """What a kernel found against the reference with the same casts and against float32."""
    out, lse = found
    assert not out.isnan().any()
    assert not lse.isnan().any()
    expected, expected_lse = attend_coded_plain(*given, TILE)
    assert torch.equal(lse.isneginf(), expected_lse.isneginf()), "rows without keys"
    distance = float((lse - expected_lse).nan_to_num(0.0, 0.0, 0.0).abs().max())
    exact = plain_float32(given)
    return {
        "error": error(out, expected),
        "lse": distance,
        "loss": error(out, exact),
        "expected": error(expected, exact),
    }


def plain_float32(given: Drawn) -> Tensor:
    """Attention without casts; rows without keys are zero."""
    q, k, v, index = given
    fill = -k.shape[1] % TILE
    q, k = (x.float() if x.shape[-1] > 128 else torch.nn.functional.pad(x.float(), (0, 16)) for x in (q, k))
    k, v = (torch.nn.functional.pad(x.float(), (0, 0, 0, fill)) for x in (k, v))
    if fill:
        k[:, -fill:, 128], q[..., 128] = -(2.0**17), 1.0
    if index is None:
        every = torch.arange(k.shape[1] // TILE, device=k.device, dtype=torch.int32)
        index = every.expand(k.shape[0], -(-q.shape[0] // TILE), -1)
    parts = [
        attend_listed_plain_lse(q[:, h : h + 1], k[h : h + 1], v[h : h + 1], index[h : h + 1], TILE)
        for h in range(k.shape[0])
    ]
    out, lse = (torch.cat([part[i] for part in parts], 1) for i in range(2))
    return out.masked_fill((lse < -1000.0)[..., None], 0.0)


def run(given: Drawn, cut: Cut) -> tuple[Tensor, Tensor]:
    """The kernel, coding included."""
    tiles = code_tiles(given.k_NLW, given.v_NLD)
    return attend_coded(code_queries(given.q_QNW), tiles, given.index_NIJ, len(given.q_QNW), cut)


def check_coding(case: Case, device: torch.device) -> dict[str, float]:
    """Codes are those of plain torch, bit for bit."""
    q, k, v, _ = draw(case, device)
    k[..., 0], v[..., 0], q[..., 0] = 1000.0, -1000.0, 200.0  # more than fits
    queries, expected = code_queries_plain(q), code_tiles_plain(k, v)
    for by_cuda in (False, True):
        fp8_tiles.CODED_BY_CUDA = by_cuda
        assert torch.equal(code_queries(q), queries), "queries"
        compare_tiles(code_tiles(k, v), expected)
        both = code_chunk(q, k, v)
        assert torch.equal(both[0], queries), "queries with keys"
        compare_tiles(both[1], expected)
    return {}


def compare_tiles(found: CodedTiles, expected: CodedTiles) -> None:
    """The same bytes, and log m but for rounding."""
    for name, a, b in zip(CodedTiles._fields, found, expected, strict=True):
        assert a.shape == b.shape, name
        if name == "bias_NL":
            assert torch.equal(a.isneginf(), b.isneginf()), name
            assert float((a - b).nan_to_num(0.0).abs().max()) < 1e-5, name
        else:
            assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} bytes differ"


def check(device: torch.device, wanted: str) -> bool:
    """Every case of every variant, a line each."""
    passed = True
    for what, test in list_checks(device, wanted):
        try:
            numbers = test()
            limits = {"error": LARGEST_ERROR, "lse": LARGEST_LSE, "loss": LARGEST_LOSS}
            fine = all(value <= limits.get(name, math.inf) for name, value in numbers.items())
            said = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        except Exception as problem:  # one case's failure leaves the others
            fine, said = False, f"{type(problem).__name__}: {str(problem)[:300]}"
        passed &= fine
        print("PASS" if fine else "FAIL", what, said, flush=True)
    return passed


def list_checks(device: torch.device, wanted: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    for case in CASES:
        yield f"coding | {case.name}", lambda case=case: check_coding(case, device)  # type: ignore[misc]
    for name, cut in VARIANTS.items():
        if wanted not in name:
            continue
        for case in CASES:

            def test(case: Case = case, cut: Cut = cut) -> dict[str, float]:
                given = draw(case, device)
                return compare(case, given, run(given, cut))

            yield f"{name} | {case.name}", test


def milliseconds(call: Callable[[], object], repeats: int = 21, calls: int = 4) -> float:
    """Median of a call in a CUDA graph of several."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times: list[float] = []
    for _ in range(repeats + 3):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended) / calls)
    return statistics.median(times[3:])


def time_all(device: torch.device, wanted: str) -> list[dict[str, Any]]:
    """Rows: what, way, ms, TFLOP/s."""
    rows: list[dict[str, Any]] = []

    def add(what: str, way: str, call: Callable[[], object], keys: float = 0.0) -> None:
        row: dict[str, Any] = {"what": what, "way": way}
        try:
            row["ms"] = milliseconds(call)
            if keys:
                row["TFLOP/s"] = 4 * HEADS * 128 * QUERIES * keys / row["ms"] / 1e9
        except Exception as problem:  # one way's failure leaves the others
            row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
        rows.append(row)
        print(" | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)

    own = draw(Case("own", QUERIES, QUERIES, None, heads=HEADS, mass=False), device)
    kept = draw(Case("kept", QUERIES, KEPT_TILES * TILE, max(SEEN), heads=HEADS), device)
    assert kept.index_NIJ is not None
    lists = {seen: kept.index_NIJ[..., :seen].sort(-1).values.contiguous() for seen in SEEN}
    for way, by_cuda in (("triton", False), ("cuda", True)):
        fp8_tiles.CODED_BY_CUDA = by_cuda
        add("code queries", way, lambda: code_queries(own.q_QNW))
        add("code own tiles", way, lambda: code_tiles(own.k_NLW, own.v_NLD))
        add("code both", way, lambda: code_chunk(*own[:3]))
    q, own_tiles, kept_tiles = code_queries(kept.q_QNW), code_tiles(*own[1:3]), code_tiles(*kept[1:3])
    flash = _load_flash()
    if flash is not None:
        add("own", "FlashAttention-4", lambda: flash[1](own.q_QNW, own.k_NLW, own.v_NLD), QUERIES)
    for name, cut in VARIANTS.items():
        if wanted in name:
            add("own", name, lambda cut=cut: attend_coded(q, own_tiles, None, QUERIES, cut), QUERIES)  # type: ignore[misc]
    for seen, index in lists.items():
        what, keys = f"{seen} tiles", seen * TILE
        if flash is not None:
            add(what, "FlashAttention-4", lambda index=index: flash[0](*kept[:3], index), keys)  # type: ignore[misc]
        for name, cut in VARIANTS.items():
            if wanted in name:
                add(what, name, lambda i=index, cut=cut: attend_coded(q, kept_tiles, i, QUERIES, cut), keys)  # type: ignore[misc]
    return rows


def _load_flash() -> tuple[Callable[..., object], Callable[..., object]] | None:
    """FlashAttention-4 over lists and over all keys."""
    try:
        from workers.kernels.listed_parts import _make_flash_run
        from workers.kernels.listed_tiles import make_attend_lse

        return make_attend_lse("flash-attn-4", TILE), _make_flash_run()
    except ImportError as problem:
        print(f"without FlashAttention-4: {problem}", flush=True)
        return None


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument("--name", default="fp8_attention-h200")
    asked = parser.parse_args()
    device = torch.device("cuda")
    if asked.check:
        print("all passed" if check(device, asked.only) else "SOMETHING FAILED", flush=True)
    if asked.time:
        rows = time_all(device, asked.only)
        try:
            from tests.bench.record import report
        except ImportError as problem:
            print(f"not kept: {problem}")
        else:
            report(asked.name, rows, "Median of 21 CUDA graphs of 4 calls each.")


if __name__ == "__main__":
    main()

"""Attention in 8-bit floats: `python -m tests.bench.fp8_attention --check` says whether the kernel is right,
`--time` how fast it is at the sizes of Wan2.1-1.3B, beside FlashAttention-4 if that is installed.

Needs torch alone; results are kept as JSON where what `tests.bench.record` imports is there too.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers.coded_tiles import CODED_TILE as TILE
from workers.coded_tiles import CodedTiles, code_queries_plain, code_tiles_plain
from workers.kernels.fp8_plain import attend_coded_plain
from workers.kernels.fp8_tiles import attend_coded, code_chunk
from workers.kernels.listed_tiles import attend_listed_plain_lse

HEADS, QUERIES, KEPT_TILES, SEEN = 12, 4680, 1829, (146, 49, 732)
OURS = "8 bits"
LARGEST_ERROR, LARGEST_LOSS, LARGEST_LSE = 0.02, 0.08, 0.06
"""Relative, root mean square: against the same casts, and against float32; and the most of log-sum-exps, against plain
torch, which sums p before the cast. The kernel sums p as cast, so that products and their sum agree; where few keys
have all the mass, the log-sum-exp is off by as much as a cast is, 2^-4."""


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


def run(given: Drawn, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The kernel, coding included."""
    q, tiles = code_chunk(*given[:3])
    return attend_coded(q, tiles, given.index_NIJ, len(given.q_QNW), out)


def room_like_kept(queries: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Results as `KeptHistory` keeps them, no number in any place."""
    out = torch.full((queries, heads, 128), math.nan, dtype=torch.bfloat16, device=device)
    return out, torch.full((heads, queries), math.nan, device=device).T


def check_buffers(case: Case, device: torch.device) -> dict[str, float]:
    """The same bits in buffers of a history that is kept."""
    given = draw(case, device)
    into = room_like_kept(case.queries, case.heads, device)
    assert run(given, into) is into
    for found, expected in zip(into, run(given), strict=True):
        assert torch.equal(found, expected)
    return {}


def check_coding(case: Case, device: torch.device) -> dict[str, float]:
    """Codes are those of plain torch, bit for bit."""
    q, k, v, _ = draw(case, device)
    k[..., 0], v[..., 0], q[..., 0] = 1000.0, -1000.0, 200.0  # more than fits
    queries, tiles = code_chunk(q, k, v)
    assert torch.equal(queries, code_queries_plain(q)), "queries"
    compare_tiles(tiles, code_tiles_plain(k, v))
    return {}


def compare_tiles(found: CodedTiles, expected: CodedTiles) -> None:
    """The same bytes."""
    for name, a, b in zip(CodedTiles._fields, found, expected, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} bytes differ"


def check(device: torch.device) -> bool:
    """Every case, a line for each thing that is checked."""
    passed = True
    for what, test in list_checks(device):
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


def check_attention(case: Case, device: torch.device) -> dict[str, float]:
    given = draw(case, device)
    return compare(case, given, run(given))


def list_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    for what, test in (("coding", check_coding), ("attention", check_attention), ("buffers", check_buffers)):
        for case in CASES:
            yield f"{what} | {case.name}", partial(test, case, device)


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


def time_all(device: torch.device) -> list[dict[str, Any]]:
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
    add("code queries and own tiles", OURS, lambda: code_chunk(*own[:3]))
    q, own_tiles = code_chunk(*own[:3])
    flash = _load_flash()
    if flash is not None:
        add("own", "FlashAttention-4", lambda: flash[1](*own[:3]), QUERIES)
    add("own", OURS, lambda: attend_coded(q, own_tiles, None, QUERIES), QUERIES)
    q, kept_tiles = code_chunk(*kept[:3])
    room = room_like_kept(QUERIES, HEADS, device)
    for seen, index in lists.items():
        what, keys = f"{seen} tiles", seen * TILE
        if flash is not None:
            add(what, "FlashAttention-4", partial(flash[0], *kept[:3], index), keys)
        add(what, OURS, partial(attend_coded, q, kept_tiles, index, QUERIES), keys)
        add(what, f"{OURS}, into buffers", partial(attend_coded, q, kept_tiles, index, QUERIES, room), keys)
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
    parser.add_argument("--name", default="fp8_attention-h200")
    asked = parser.parse_args()
    device = torch.device("cuda")
    if asked.check:
        print("all passed" if check(device) else "SOMETHING FAILED", flush=True)
    if asked.time:
        rows = time_all(device)
        try:
            from tests.bench.record import report
        except ImportError as problem:
            print(f"not kept: {problem}")
        else:
            report(asked.name, rows, "Median of 21 CUDA graphs of 4 calls each.")


if __name__ == "__main__":
    main()

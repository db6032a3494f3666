"""Before anything is timed: do the fast ways give what the plain ones give, on this GPU, at small sizes?

A way that fails or differs is left out with one clear line, and the next one is tried.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from tests.bench.history_engine import Compiled, Variant, make_engine, make_plan
from tests.bench.rollout_rows import Settings
from tests.packed_checks import check_bits
from tests.tables import draw_listed
from workers.attention.tile_choice import ChoiceSettings, TileChoice, TileRuns
from workers.cache.table_layout import MergeRule, TableSettings
from workers.cache.tile_table import TileTable
from workers.kernels.listed_tiles import AttendTable, ListedName, attend_listed_plain, make_attend
from workers.model.rope import grid_positions, make_rotation, rotate
from workers.search.nearest_rows import NearestRows, make_triton_nearest_rows, nearest_rows

_ORDER: dict[str, tuple[ListedName, ...]] = {
    "auto": ("flash-attn-4", "triton", "torch"),
    "flash-attn-4": ("flash-attn-4", "triton", "torch"),
    "triton": ("triton", "torch"),
    "torch": ("torch",),
}
BFLOAT16_ERROR = 0.02
"""Largest root-mean-square difference over the size of the result: bfloat16 rounds inputs and weights to 0.4%."""


def choose_attend(settings: Settings, kernels: str) -> tuple[ListedName, AttendTable, list[str]]:
    """The fastest attention over listed tiles that agrees with the reference."""
    tile = 128 if settings.frame_tokens >= 128 else 16
    lines = []
    names = _ORDER[kernels] if settings.device.type == "cuda" else ("torch",)
    for name in names:
        try:
            attend = make_attend(name, tile)
            error = _attend_error(attend, tile, settings)
        except Exception as problem:
            traceback.print_exc()
            lines.append(f"attention by {name} left out: {type(problem).__name__}: {str(problem)[:200]}.")
            continue
        if error <= BFLOAT16_ERROR:
            lines.append(f"Attention by {name}: differs from the reference by {error:.2e}.")
            return name, attend, lines
        lines.append(f"attention by {name} left out: it differs from the reference by {error:.2e}.")
    raise RuntimeError(" ".join(lines))


def _attend_error(attend: AttendTable, tile: int, settings: Settings) -> float:
    dim, heads, tiles, listed, queries = settings.backbone.head_dim, 3, 11, 5, 2 * tile + 37
    empty = slice(tile, 2 * tile + 50)
    *drawn, index = draw_listed((queries, heads, dim), tile, tiles, listed, most_mass=4 * math.sqrt(dim), empty=empty)
    q, k, v = (x.to(settings.device, settings.dtype) for x in drawn)
    index = index.to(settings.device)
    expected = attend_listed_plain(q.float(), k.float(), v.float(), index, tile)
    found = attend(q, k, v, index).float()
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def choose_nearest(settings: Settings, kernels: str) -> tuple[NearestRows, str]:
    """Triton's, where it agrees with the plain one."""
    if settings.device.type != "cuda" or kernels == "torch":
        return nearest_rows, "Nearest keys by plain torch."
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, num, settings.backbone.head_dim, generator=generator) for num in (300, 417))
    x, y = (F.normalize(part, dim=-1).to(settings.device, settings.dtype) for part in (x, y))
    there = (torch.rand(5, 417, generator=generator) > 0.3).to(settings.device)
    there[0, :200] = False
    try:
        index, cosine = make_triton_nearest_rows()(x, y, there)
        _, expected = nearest_rows(x.float(), y.float(), there)
        at_index = (x.float() * y.float().gather(1, index[..., None].expand_as(x))).sum(-1)
        error = float(torch.maximum((cosine - expected).abs().max(), (at_index - expected).abs().max()))
        is_there = bool(there.gather(1, index).all())
    except Exception as problem:
        traceback.print_exc()
        return (
            nearest_rows,
            f"Nearest keys by plain torch: {type(problem).__name__}: {str(problem)[:99]}.",
        )
    if error > 1e-3 or not is_there:
        return nearest_rows, f"Nearest keys by plain torch: Triton's differ by {error:.2e}."
    return make_triton_nearest_rows(), f"Nearest keys by Triton: cosines differ from the plain ones by {error:.1e}."


def choose_kernels(settings: Settings) -> tuple[tuple[str, ...], list[str]]:
    """Which of our kernels (of the table by either rule or packed; the choice) agree with the plain ways; and words."""
    found, lines = list[str](), list[str]()
    if settings.device.type != "cuda":
        return (), ["Chunks are taken over and tiles chosen by plain torch."]
    checks: dict[str, Callable[[Settings], float]] = {
        "table": partial(_table_differs, rule="chains"),
        "pairs": partial(_table_differs, rule="pairs"),
        "packing": lambda _: check_bits([("int4", settings.backbone.head_dim, 128)]),
        "choice": _choice_differs,
    }
    for name, differs in checks.items():
        try:
            error = differs(settings)
        except Exception as problem:
            traceback.print_exc()
            lines.append(f"Kernels of the {name} left out: {type(problem).__name__}: {str(problem)[:200]}.")
            continue
        found += [name] if error < 0.01 else []
        verdict = "used" if error < 0.01 else "left out"
        lines.append(f"Kernels of the {name} {verdict}: {error:.2%} differ from what the plain way finds.")
    return tuple(found), lines


def _table_differs(settings: Settings, rule: MergeRule) -> float:
    """Share of slots whose key, partner or m is another one, in float32."""
    rows, columns, device = 10, 16, settings.device
    sizes = TableSettings(
        3, 2, settings.backbone.head_dim, 3 * rows * columns, rows * columns, kept_chunks=2, spare_chunks=2, rule=rule
    )
    tables = [TileTable(sizes, torch.float32, device, work=work) for work in ("kernels", "groups")]
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 2, sizes.chunk_tokens, sizes.head_dim)
    kv = torch.randn(shape, generator=generator)
    for index in range(9):
        kv = 0.8 * kv + 0.6 * torch.randn(shape, generator=generator)
        position = grid_positions(torch.arange(3) + 3 * index, rows, columns).to(device)
        rotation = make_rotation(position, sizes.head_dim, sizes.theta)
        for table in tables:
            for layer in range(3):
                k_NTD, v_NTD = table.own(layer)
                k_NTD.copy_(rotate(kv[0, layer].to(device).transpose(0, 1)[None], rotation)[0].transpose(0, 1))
                v_NTD.copy_(kv[1, layer].to(device))
            table.remember_chunk(position)
    worst = 0.0
    for a, b in zip(tables[0].layers, tables[1].layers, strict=True):
        other = (a.m_NC != b.m_NC) | (a.partner_NC != b.partner_NC) | (a.position_NC3 != b.position_NC3).any(-1)
        values = (a.v_NLD - b.v_NLD).abs().amax(-1) > 1e-3
        worst = max(worst, float(other.float().mean()), float(values.float().mean()))
    return worst


def _choice_differs(settings: Settings) -> float:
    """Share of the chosen tiles that the plain way does not choose."""
    dim, heads, tile, tiles, device = settings.backbone.head_dim, 3, 128, 45, settings.device
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(*shape, dim + 16, generator=generator) for shape in ((700, heads), (heads, tiles * tile)))
    q[..., dim:], k[..., dim:] = 0, 0
    q[..., dim : dim + 2] = 1
    q, k = q.to(device), k.to(device)
    lists = []
    for fused in (True, False):
        runs = TileRuns(((0, tiles - 6),), ((tiles - 6, tiles),), tiles)
        chooser = TileChoice(ChoiceSettings(9, estimate="quant", fused=fused), runs, 700, dim, device)
        index = chooser.new_list(heads)
        chooser.choose(q, k, index)
        lists.append(torch.zeros(*index.shape[:2], tiles, device=device).scatter_(2, index.long(), 1.0))
    return float((lists[0] - lists[1]).clamp(min=0).sum() / lists[0].sum())


def check_compiled(
    settings: Settings, attend: AttendTable, nearest: NearestRows, parts: Compiled, kernels: tuple[str, ...]
) -> tuple[bool, str]:
    """Whether a model of two layers gives the same with these parts compiled as without."""
    what = f"Compiling {', '.join(parts)}"
    small = replace(settings, backbone=replace(settings.backbone, num_layers=2))
    variant = Variant("check")  # the sizes of the rows, so that what is compiled here serves them
    try:
        latents = []
        for backend, compiled in ((None, ()), ("inductor", parts)):
            engine = make_engine(variant, small, attend, backend, nearest, compiled, kernels=kernels)
            chunks = [
                chunk.latents_BTCHW for chunk in engine.rollout.run(make_plan(engine, small, engine.chunks_to_fill + 2))
            ]
            latents.append(chunks[-1])
        difference = (latents[0] - latents[1]).square().mean().sqrt() / latents[0].square().mean().sqrt()
    except Exception as problem:
        traceback.print_exc()
        return False, f"{what} left out: {type(problem).__name__}: {str(problem)[:200]}."
    error = float(difference)
    # Which pairs merge and which tiles are chosen may differ where two are near: so more than rounding.
    is_equal = error < 0.1
    verdict = "used" if is_equal else "left out"
    return (
        is_equal,
        f"{what} {verdict}: after {len(chunks)} chunks of 2 layers it differs by {error:.2e} from the plain one.",
    )

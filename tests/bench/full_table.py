"""A packed layer of the policy `fastar-tiles` at the sizes of Wan2.1-1.3B, full, and kernels launched otherwise.

For benches that say what it is made of to merge such a layer, or to let it take over a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workers.cache import triton_collect
from workers.cache.packed_history import PackedLayer
from workers.cache.packed_table import PackedTable
from workers.cache.partners import History
from workers.cache.shrink import Room
from workers.cache.table_layout import MEMBERS_LISTED, TableSettings
from workers.cache.unrotated import TurnBack
from workers.model.rope import grid_positions

ROWS, COLUMNS = 30, 52
SIZES = TableSettings(
    num_layers=1,
    num_heads=12,
    head_dim=128,
    chunk_tokens=3 * ROWS * COLUMNS,
    frame_tokens=ROWS * COLUMNS,
    kept_chunks=43,
    spare_chunks=5,
    rule="pairs",
    storage="int4",
)
Changes = dict[tuple[Any, str], Any]
"""Attribute of a module -> another value; of a kernel, other launch settings."""


class OtherLaunch:
    """A kernel with other settings than its caller's."""

    def __init__(self, kernel: Any, settings: dict[str, Any]) -> None:
        self._kernel, self._settings = kernel, settings

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        launch = self._kernel[grid]
        return lambda *args, **named: launch(*args, **(named | self._settings))


Variants = tuple[tuple[str, str, Changes], ...]
"""What is another, a pattern of the kernels whose time is printed, how it is made another."""


def numbers(module: Any, name: str, kernel: str, values: Iterable[Any]) -> Variants:
    """Variants of one number of a module."""
    return tuple((f"{kernel}: {name} {value}", kernel, {(module, name): value}) for value in values)


def launches(module: Any, kernel: str, *settings: dict[str, Any]) -> Variants:
    """Variants of how a kernel is launched."""
    return tuple((f"{kernel}: {other}", kernel, {(module, kernel): other}) for other in settings)


@contextmanager
def changed(changes: Changes) -> Iterator[None]:
    """With these attributes, then as before."""
    before = {at: getattr(*at) for at in changes}
    for (module, name), value in changes.items():
        setattr(module, name, OtherLaunch(before[module, name], value) if isinstance(value, dict) else value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def variant_rows(variants: Variants, only: str, measure: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures as things are, then with those variants whose name has `only` in it; what fails is a row that says why.

    Args:
        variants: Tried one by one.
        only: Empty for all.
        measure: Given the pattern of the kernels that are other, empty where none is.
    """
    rows: list[dict[str, Any]] = []
    for name, kernel, changes in (("as they are", "", {}), *(made for made in variants if only in made[0])):
        try:
            with changed(changes):
                rows.append({"launch_settings": name} | measure(kernel))
        except Exception as error:
            rows.append({"launch_settings": name, "failed": f"{type(error).__name__}: {str(error)[:120]}"})
    return rows


def ms_of(kernel: str, times: dict[str, tuple[float, float]]) -> float | None:
    """Of the kernels of this pattern together."""
    return round(sum(ms for at, (ms, _) in times.items() if kernel and re.search(kernel, at)), 3) or None


class FullTable:
    """One that stands before its next merge, as often as one likes."""

    def __init__(self) -> None:
        s = self.sizes = SIZES
        device, dtype = torch.device("cuda"), torch.bfloat16
        self.table = PackedTable(s, dtype, device, work="kernels")
        generator = torch.Generator(device=device).manual_seed(0)
        shape = 2, s.num_heads, s.chunk_tokens, s.head_dim
        kv = torch.randn(shape, generator=generator, device=device)
        # Until it is full, and two merges more.
        for index in range(s.sink_chunks + s.recent_chunks + s.kept_chunks + 3 * s.spare_chunks):
            kv = 0.8 * kv + 0.6 * torch.randn(shape, generator=generator, device=device)
            for own, new in zip(self.table.own(0), kv, strict=True):
                own.copy_(new)
            self.table.remember_chunk(grid_positions(torch.arange(3) + 3 * index, ROWS, COLUMNS).to(device))
        layer = self.table.layers[0]
        assert isinstance(layer, PackedLayer)
        assert layer.pointer == s.history_tokens
        self.layer = layer
        self._before = self.tensors()
        self.turn_back = TurnBack(s.head_dim, s.theta, device)
        self.room = Room(s.kept_tokens, s.spare_tokens, s.rule, s.rate, MEMBERS_LISTED[s.rule])

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all that a merge may write."""
        return {name: getattr(self.layer, name).clone() for name in (*self.table.tensors, "apart_NC")}

    def put_back(self) -> None:
        for name, tensor in self._before.items():
            getattr(self.layer, name).copy_(tensor)

    def laid_out(self) -> tuple[History, tuple[Tensor, ...]]:
        """In the workspace, as the table does before it merges."""
        of, stop, start = self.table.lay_out(0), self.sizes.history_tokens, self.sizes.history_start
        history = History(of.k_NLW, start, of.position_NC3[:, :stop], of.m_NC[:, :stop], of.mean_NJD)
        return history, (of.v_NLD, *(x[:, :stop] for x in (of.m_NC, of.weight_NC, of.partner_NC)))

    def merge(self) -> None:
        """As the table does it."""
        triton_collect.merge_into_codes(self.layer, self.turn_back, self.room, self.sizes)

    def merge_again(self) -> None:
        self.put_back()
        self.merge()


def time_rows(
    times: dict[str, tuple[float, float]], least: dict[str, float], before: dict[str, float]
) -> list[dict[str, Any]]:
    """By kernel, the longest first, those below 0.01 ms together; milliseconds all."""
    rest, launched = 0.0, 0.0
    rows: list[dict[str, Any]] = []
    for name, (ms, calls) in sorted(times.items(), key=lambda item: -item[1][0]):
        if ms < 0.01 and name not in least:
            rest, launched = rest + ms, launched + calls
            continue
        figures = {"least_ms": round(least[name], 3) if name in least else None, "before_ms": before.get(name)}
        rows.append({"kernel": name[:60], "calls": round(calls), "ms": round(ms, 3)} | figures)
    rows.append({"kernel": "what takes less than 0.01 each", "calls": round(launched), "ms": round(rest, 3)})
    total = round(sum(ms for ms, _ in times.values()), 3)
    rows.append({"kernel": "sum", "ms": total, "before_ms": before.get("sum")})
    return rows

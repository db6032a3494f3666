"""`python -m tests.bench.merge_parts` on a GPU: what a merge of one packed layer is made of, kernel by kernel.

First kernels against plain torch at small sizes, then one layer of the policy `fastar-tiles` at the sizes of
Wan2.1-1.3B, merged twice before. Beside each kernel stands what its bytes take; then the same merge with other launch
settings, and whether it still writes the same bits. Prints tables; under a minute.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.bench.history_parts import kernel_times
from tests.bench.least_work import BYTES_NOTE, least_of_merge, milliseconds_of
from tests.bench.record import report
from tests.packed_checks import check_merge
from workers.cache import triton_collect, triton_links, triton_pairs
from workers.cache.packed_history import PackedLayer
from workers.cache.packed_table import PackedTable
from workers.cache.partners import History
from workers.cache.shrink import Room
from workers.cache.table_layout import MEMBERS_LISTED, TableSettings
from workers.cache.table_pairs import choose_links, heaviest, pair_loss
from workers.cache.triton_pairs import find_distances
from workers.cache.unrotated import TurnBack
from workers.model.rope import grid_positions

_NOTES = (
    "One merge of one layer: 224,640 slots of 12 heads in int4, keys a random walk, merged twice before. "
    f"{BYTES_NOTE} Launch settings: the whole merge, and the kernel that is launched otherwise."
)
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


VARIANTS: tuple[tuple[str, str, Changes], ...] = (
    *(
        (f"{megabytes} MB of codes move together", "move_codes", {(triton_collect, "_MOVED_BYTES"): megabytes * 10**6})
        for megabytes in (1, 120, 250, 1000)
    ),
    *(
        (f"{num} slots of codes at once", "move_codes", {(triton_collect, "_MOVED_AT_ONCE"): num})
        for num in (32, 128, 256)
    ),
    *(
        (f"means of tiles: {settings}", "average_tiles", {(triton_collect, "average_tiles"): settings})
        for settings in ({"maxnreg": 96}, {"maxnreg": 80}, {"num_warps": 8}, {"M": 16}, {"M": 16, "num_warps": 2})
    ),
    *(
        (f"distances of {of}s: {settings}", f"_{of}_distances", {(triton_pairs, f"_{of}_distances"): settings})
        for of in ("key", "value")
        for settings in ({"maxnreg": 96}, {"maxnreg": 80}, {"num_warps": 8})
    ),
    *(
        (f"{num} records at once", "records", {(triton_collect, "_RECORDS_AT_ONCE"): num})
        for num in (256, 1024)
    ),
    ("8 groups at once", "average_groups", {(triton_collect, "_AVERAGED_AT_ONCE"): 8}),
    ("32 groups at once", "average_groups", {(triton_collect, "_AVERAGED_AT_ONCE"): 32}),
)  # fmt: skip
"""What is another, what is printed of it, how it is made another."""


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
        self._laid_out = self.laid_out()

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
        """As the table does it, what is laid out apart."""
        history, records = self._laid_out
        triton_collect.merge_into_codes(history, records, self.turn_back, self.room, self.layer, self.sizes)

    def merge_again(self) -> None:
        self.put_back()
        self.merge()

    def prepare(self) -> None:
        self.put_back()
        self._laid_out = self.laid_out()


def check_small() -> bool:
    """Merging into codes against merging and packing; whether all is well. `tests.packed_checks` has more."""
    try:
        check_merge("int4", "pairs", 128)
    except Exception:
        traceback.print_exc()
        return False
    print("good: merging into codes at small size", flush=True)
    return True


def check_links(full: FullTable) -> None:
    """Who merges with whom, against plain torch."""
    full.prepare()
    history, (v, m, _, partner) = full.laid_out()
    found = find_distances(history, v, partner, full.turn_back)
    loss = pair_loss(found, m, partner, full.sizes.head_dim)
    expected = choose_links(loss, partner, full.room.num_merges)
    link = triton_links.choose_links(found, m, partner, full.sizes.head_dim, full.room.num_merges)
    num = int((link != expected).sum())
    root, head_of, _ = triton_links.follow(link, m, by_mass=True)
    others = int((head_of.long() != heaviest(root.long(), m)).sum())
    print(
        f"{'BAD' if num or others else 'good'}: links as by plain torch, {num} others; {others} other heads", flush=True
    )


def check_large(full: FullTable) -> dict[str, Tensor]:
    """What the merge writes, after it was compared with merging in the workspace and packing all of it."""
    from workers.cache.table_kernels import merge, pack

    s, layer = full.sizes, full.layer
    full.prepare()
    full.merge()
    found = full.tensors()
    full.put_back()
    history, records = full.laid_out()
    merge(history, records, full.turn_back, full.room, s.num_heads, s.tile)
    pack(layer, full.table.workspace, s, slice(0, s.kept_tokens))
    run = slice(s.history_start, s.history_start + s.history_tokens)
    layer.mass_NC2[:, : s.history_tokens] = history.k_NLW[:, run, s.head_dim : s.head_dim + 2]
    expected = full.tensors()
    other = [name for name in full.table.tensors if not torch.equal(found[name], expected[name])]
    print(f"{'BAD' if other else 'good'}: the same bits as merging in the workspace {other or ''}", flush=True)
    return found


def kernel_rows(full: FullTable) -> list[dict[str, Any]]:
    """Of one merge, beside what bytes take; copies that put the table back are left out."""
    full.prepare()
    once, again = kernel_times(full.put_back, 3), kernel_times(full.merge_again, 5)
    times = {name: (ms - once.get(name, (0, 0))[0], calls) for name, (ms, calls) in again.items()}
    least, rest, launches = least_of_merge(full.sizes, "int4"), 0.0, 0.0
    rows: list[dict[str, Any]] = []
    for name, (ms, calls) in sorted(times.items(), key=lambda item: -item[1][0]):
        if ms < 0.01:
            rest, launches = rest + ms, launches + calls
            continue
        by_bytes = round(milliseconds_of(least[name]), 3) if name in least else None
        rows.append({"kernel": name[:60], "calls": round(calls), "ms": round(ms, 3), "least_ms": by_bytes})
    rows.append({"kernel": "what takes less than 0.01 each", "calls": round(launches), "ms": round(rest, 3)})
    rows.append({"kernel": "sum", "ms": round(sum(ms for ms, _ in times.values()), 3)})
    return rows


def merge_ms(full: FullTable, times: int = 7) -> float:
    """Median, by CUDA events, of merges whose layer is laid out."""
    took = []
    for _ in range(times):
        full.put_back()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        full.merge()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end))
    return statistics.median(took)


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


def variant_rows(full: FullTable, expected: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Of a whole merge and of the kernel that is another."""
    rows: list[dict[str, Any]] = []
    for name, kernel, changes in (("as they are", "", {}), *VARIANTS):
        try:
            with changed(changes):
                full.prepare()
                full.merge()
                same = all(torch.equal(tensor, expected[at]) for at, tensor in full.tensors().items())
                took = merge_ms(full)
                times = kernel_times(full.merge_again, 2)
                of_kernel = sum(ms for at, (ms, _) in times.items() if kernel and kernel in at)
                figures = {"merge_ms": round(took, 3), "ms": round(of_kernel, 3) or None, "same_bits": same}
                rows.append({"launch_settings": name} | figures)
        except Exception as error:
            rows.append({"launch_settings": name, "failed": f"{type(error).__name__}: {str(error)[:120]}"})
    return rows


if __name__ == "__main__":
    if not check_small():
        raise SystemExit(1)
    with torch.no_grad():
        full_table = FullTable()
        check_links(full_table)
        written = check_large(full_table)
        rows = kernel_rows(full_table)
        report("merge_parts", rows, _NOTES)
        report("merge_parts", rows + variant_rows(full_table, written), _NOTES)
    print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")

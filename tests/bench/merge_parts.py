"""`python -m tests.bench.merge_parts` on a GPU: what a merge of one packed layer is made of, kernel by kernel.

First kernels against plain torch at small sizes, then one layer of the policy `fastar-tiles` at the sizes of
Wan2.1-1.3B, merged twice before. Beside each kernel stands what its bytes take, and what a kernel of this name
took when it was last measured; then the same merge with other launch settings, and whether it still writes
the same bits. Then the same of taking over a chunk without a merge (`match_parts.py`). Prints tables; a minute or two,
`--only WORD` tries fewer settings, `--only nothing` none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import traceback
from typing import Any

import torch
from torch import Tensor

from tests.bench.full_table import Changes, FullTable, Variants, launches, ms_of, numbers, time_rows, variant_rows
from tests.bench.history_parts import kernel_times
from tests.bench.least_work import BYTES_NOTE, least_of_merge, milliseconds_of
from tests.bench.match_parts import MATCH_NOTES, match_rows, match_variant_rows
from tests.bench.record import RESULTS, report
from tests.packed_checks import check_merge
from workers.cache import triton_collect, triton_families, triton_links, triton_pairs, triton_ranks, triton_sums
from workers.cache.table_pairs import choose_links, heaviest, pair_loss
from workers.cache.triton_pairs import find_distances
from workers.cache.triton_rows import coded_history

_NOTES = (
    "One merge of one layer: 224,640 slots of 12 heads in int4, keys a random walk, merged twice before. "
    f"{BYTES_NOTE} Launch settings: the whole merge, and the kernel that is launched otherwise."
)


def _fits_none(*_: object) -> bool:
    return False


_MOVED_BY_TRITON: Changes = {(triton_collect, "can_move"): _fits_none}
_BY_TRITON: Changes = _MOVED_BY_TRITON | {
    (module, "fits"): _fits_none for module in (triton_pairs, triton_sums, triton_collect)
}
VARIANTS: Variants = (
    ("merge: by Triton alone", "key_distances|value_distances|_weigh|average_|move_", _BY_TRITON),
    *((f"merge: {num} weighed at once", "_weigh", {(triton_sums, "_WEIGHED_AT_ONCE"): num}) for num in (64, 1024)),
    ("move_history: instead of move_rows", "move_history", _MOVED_BY_TRITON),
    *launches(triton_sums, "_weigh", {"num_warps": 2}),
    *numbers(triton_ranks, "_AT_ONCE", "_count_digits", (2048, 8192)),
    *numbers(triton_pairs, "_WALKED_AT_ONCE", "_walk", (256, 1024)),
    *numbers(triton_ranks, "_FEW", "_count_digits", (0, 32)),
)


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
    full.put_back()
    of = coded_history(full.layer, full.sizes)
    found, m, partner = find_distances(of, full.turn_back), of.m_NC, of.partner_NC
    loss = pair_loss(found, m, partner, full.sizes.head_dim)
    expected = choose_links(loss, partner, full.room.num_merges)
    link = triton_links.choose_links(found, m, partner, full.sizes.head_dim, full.room.num_merges)
    num = int((link != expected).sum())
    root, head_of, *_ = triton_families.follow(link, m, full.room.num_merges, by_mass=True)
    others = int((head_of.long() != heaviest(root.long(), m)).sum())
    print(
        f"{'BAD' if num or others else 'good'}: links as by plain torch, {num} others; {others} other heads", flush=True
    )


def check_large(full: FullTable) -> dict[str, Tensor]:
    """What the merge writes, after it was compared with merging in the workspace and packing all of it."""
    from workers.cache.table_kernels import merge, pack

    s, layer = full.sizes, full.layer
    full.merge_again()
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


def measured_before() -> dict[str, float]:
    """Milliseconds by kernel, as the kept results have them."""
    rows = json.loads((RESULTS / "merge_parts-h200.json").read_text())["rows"]
    return {row["kernel"]: row["ms"] for row in rows if "kernel" in row}


def kernel_rows(full: FullTable) -> list[dict[str, Any]]:
    """Of one merge, beside what bytes take; copies that put the table back are left out."""
    once, again = kernel_times(full.put_back, 3), kernel_times(full.merge_again, 5)
    times = {name: (ms - once.get(name, (0, 0))[0], calls) for name, (ms, calls) in again.items()}
    least = {name: milliseconds_of(gigabytes) for name, gigabytes in least_of_merge(full.sizes, "int4").items()}
    least |= {name.removeprefix("_"): ms for name, ms in least.items()}  # as those by CUDA are called
    return time_rows(times, least, measured_before())


def merge_ms(full: FullTable, times: int = 7) -> float:
    """Median, by CUDA events."""
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


def merge_variant_rows(full: FullTable, expected: dict[str, Tensor], only: str) -> list[dict[str, Any]]:
    """Of a whole merge and of the kernel that is another."""

    def measure(kernel: str) -> dict[str, Any]:
        full.merge_again()
        same = all(torch.equal(tensor, expected[at]) for at, tensor in full.tensors().items())
        took, times = merge_ms(full), kernel_times(full.merge_again, 2)
        return {"merge_ms": round(took, 3), "ms": ms_of(kernel, times), "same_bits": same}

    return variant_rows(VARIANTS, only, measure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="of the other launch settings, those whose name has this in it")
    asked = parser.parse_args()
    if not check_small():
        raise SystemExit(1)
    with torch.no_grad():
        full = FullTable()
        check_links(full)
        written = check_large(full)
        rows = kernel_rows(full)
        report("merge_parts", rows, _NOTES)
        matched = match_rows(full)
        report("match_parts", matched, MATCH_NOTES)
        report("merge_parts", rows + merge_variant_rows(full, written, asked.only), _NOTES)
        report("match_parts", matched + match_variant_rows(full, asked.only), MATCH_NOTES)
    print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

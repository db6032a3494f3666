"""`python -m tests.bench.packed_speed` on a GPU: how near the kernels that pack and unpack a layer come to what memory
can move, at the sizes of Wan2.1-1.3B. Prints a line each; some seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tests.packed_checks import DEVICE, draw_table
from workers.attention.tile_mass import sample_places
from workers.cache.low_bit import Storage
from workers.cache.packed_history import PackedLayer
from workers.cache.table_kernels import pack, unpack, unpack_sample
from workers.cache.table_layout import TableSettings


def seconds(run: Callable[[], object], times: int = 20) -> float:
    """Of one run, by CUDA events."""
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / times / 1e3


def print_speed(storage: Storage, kept_chunks: int = 48, spare_chunks: int = 10) -> None:
    """Of the kernels at Wan2.1-1.3B sizes, one layer; beside what copying as many bytes takes here."""
    s = TableSettings(1, 12, 128, 4680, 1560, kept_chunks=kept_chunks, spare_chunks=spare_chunks, storage=storage)
    table = draw_table(s, torch.bfloat16)
    layer, to = table.layers[0], table.workspace
    assert isinstance(layer, PackedLayer)
    of_keys = sum(x.nbytes for x in (layer.k_code_NCB, layer.k_largest_NCG, layer.mass_NC2, layer.k_NLW, to.k_NLW))
    moved = of_keys + sum(x.nbytes for x in (layer.v_code_NCB, layer.v_largest_NCG, layer.v_NLD, to.v_NLD))
    copy = torch.empty_like(to.k_NLW)
    bandwidth = 2 * copy.nbytes / seconds(lambda: copy.copy_(to.k_NLW))
    print(f"a copy of {copy.nbytes / 1e9:.2f} GB: {bandwidth / 1e12:.2f} TB/s", flush=True)
    for share in (1.0, 0.5, 0.25):
        is_seen = (torch.rand(s.num_heads, s.num_slots // s.tile, device=DEVICE) < share).to(torch.uint8)
        took = seconds(partial(unpack, layer, to, s, is_seen))
        speed = share * moved / took
        say = f"{took * 1e3:.3f} ms, {speed / 1e12:.2f} TB/s, {speed / bandwidth:.0%} of a copy"
        print(f"unpack {storage}, {share:.0%} of tiles: {say}", flush=True)
    slot_R = sample_places(s.num_slots, s.tile, 16, DEVICE)[0]
    took, share = seconds(partial(unpack_sample, layer, to, s, slot_R)), len(slot_R) / s.num_slots
    speed = share * of_keys / took
    say = f"{took * 1e3:.3f} ms, {speed / 1e12:.2f} TB/s, {speed / bandwidth:.0%} of a copy"
    print(f"unpack {storage} keys, {share:.1%} of each tile: {say}", flush=True)
    for name, num in (("a chunk", s.chunk_tokens), ("what is kept", s.kept_tokens)):
        took = seconds(partial(pack, layer, to, s, slice(0, num)))
        speed = moved * num / s.num_slots / took
        print(f"pack {storage} {name}: {took * 1e3:.3f} ms, about {speed / 1e12:.2f} TB/s", flush=True)


if __name__ == "__main__":
    print_speed("int8")
    print_speed("int4")

"""`python -m tests.bench.attention_waves` on a GPU: what the last programs of an attention kernel cost.

Queries of a chunk at Wan2.1-1.3B sizes are 37 tiles of 12 heads, 444 programs on the 132 multiprocessors of an H100 or
H200: three waves and a third, which take as long as four. Timed are attention to the own chunk and to listed tiles of
a history, one after the other and on two streams, and the own chunk with the keys of its last tiles in two halves. All
of it as CUDA graphs over several layers, results compared with the plain order.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.bench.listed_kernels import HEAD_DIM, HEADS, TILE, Case, draw_keys, draw_lists, draw_queries, milliseconds
from tests.bench.record import report
from workers.kernels.listed_parts import make_parted

LAYERS, QUERIES, KEPT_TILES = 6, 4680, 1829
SEEN = (49, 146)
"""Tiles of the history: in a clean pass, in a step."""
_NOTES = (
    "One layer's call, median of a graph over 6 layers. beside: the two on two streams; halves: keys of the last "
    "queries in two halves, composed. error: largest difference from the plain order."
)
Call = Callable[[int], Tensor]


class Layers:
    """Keys and lists of some layers; queries are shared, and two histories by all."""

    def __init__(self, device: torch.device) -> None:
        kind = torch.bfloat16
        self.q = draw_queries(QUERIES, device, kind)
        self.history = [draw_keys(KEPT_TILES * TILE, device, kind) for _ in range(2)]
        self.own = [draw_keys(QUERIES, device, kind) for _ in range(LAYERS)]
        cases = [Case(f"{seen} tiles", QUERIES, KEPT_TILES, seen) for seen in SEEN]
        self.lists = {case.num_listed: draw_lists(case, device, ordered=True) for case in cases}


class Ways:
    """Of computing a layer.

    Args:
        layers: What it is computed of.
    """

    def __init__(self, layers: Layers) -> None:
        self._l = layers
        self._parted = make_parted("flash-attn-4", TILE)
        self._side = {priority: torch.cuda.Stream(priority=priority) for priority in (0, -1)}

    def own(self, layer: int) -> tuple[Tensor, Tensor]:
        assert self._parted.run is not None
        k, v = self._l.own[layer]
        return self._parted.run(self._l.q[..., :HEAD_DIM], k[..., :HEAD_DIM], v)

    def history(self, layer: int, seen: int) -> tuple[Tensor, Tensor]:
        return self._parted.listed(self._l.q, *self._l.history[layer % 2], self._l.lists[seen])

    def own_alone(self, layer: int) -> Tensor:
        return self.own(layer)[0]

    def halves(self, layer: int, num_first: int) -> Tensor:
        """The last queries see the keys in two halves, side by side in a batch."""
        from flash_attn.cute.interface import _flash_attn_fwd

        k, v = self._l.own[layer]
        q, k, scale = self._l.q[..., :HEAD_DIM], k[..., :HEAD_DIM], HEAD_DIM**-0.5
        result = torch.empty(QUERIES, HEADS, HEAD_DIM, dtype=q.dtype, device=q.device)
        whole = (x.transpose(0, 1)[None] for x in (k, v))
        result[:num_first] = _flash_attn_fwd(
            q[None, :num_first], *whole, softmax_scale=scale, num_splits=1, return_lse=True
        )[0][0]
        half = (x.unflatten(1, (2, -1)).permute(1, 2, 0, 3) for x in (k, v))
        last = q[None, num_first:].expand(2, -1, -1, -1)
        out, lse = _flash_attn_fwd(last, *half, softmax_scale=scale, num_splits=1, return_lse=True)[:2]
        result[num_first:] = self._parted.compose(out[0], lse[0].T, out[1], lse[1].T)
        return result

    def in_turn(self, layer: int, seen: int) -> Tensor:
        kept = self.history(layer, seen)
        return self._parted.compose(*kept, *self.own(layer))

    def beside(self, layer: int, seen: int, *, priority: int, own_first: bool) -> Tensor:
        """Both at once, the history on another stream."""
        here, stream = torch.cuda.current_stream(), self._side[priority]
        stream.wait_stream(here)
        own = self.own(layer) if own_first else None
        with torch.cuda.stream(stream):
            kept = self.history(layer, seen)
        own = own or self.own(layer)
        here.wait_stream(stream)
        return self._parted.compose(*kept, *own)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="attention_waves-h200")
    asked = parser.parse_args()
    device = torch.device("cuda")
    torch.manual_seed(0)
    ways = Ways(Layers(device))
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = -(-QUERIES // TILE)
    whole = tiles * HEADS // sms * sms // HEADS * TILE
    groups: dict[str, dict[str, Call]] = {
        "own chunk": {"as it is": ways.own_alone, f"halves from query {whole}": lambda i: ways.halves(i, whole)}
    }
    for seen in SEEN:
        rows: dict[str, Call] = {"in turn": lambda i, s=seen: ways.in_turn(i, s)}  # type: ignore[misc]
        for priority in (0, -1):
            for own_first in (False, True):
                name = f"beside, priority {priority}{', own first' if own_first else ''}"
                rows[name] = lambda i, s=seen, p=priority, f=own_first: ways.beside(i, s, priority=p, own_first=f)  # type: ignore[misc]
        groups[f"own chunk and {seen} tiles"] = rows
    table: list[dict[str, Any]] = []
    for group, calls in groups.items():
        plain: Tensor | None = None
        for name, call in calls.items():
            try:
                found = call(0).float()
                plain = found if plain is None else plain
                ms = milliseconds(lambda c=call: [c(layer) for layer in range(LAYERS)], device, 20) / LAYERS  # type: ignore[misc]
                table.append({"what": group, "way": name, "ms": ms, "error": float((found - plain).abs().max())})
            except Exception as problem:  # one way's failure leaves the others
                table.append({"what": group, "way": name, "failed": f"{type(problem).__name__}: {str(problem)[:200]}"})
            print(table[-1], flush=True)
    report(asked.name, table, _NOTES)


if __name__ == "__main__":
    main()

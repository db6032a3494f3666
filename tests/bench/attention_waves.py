"""`python -m tests.bench.attention_waves` on a GPU: what the last programs of an attention kernel cost.

Queries of a chunk at Wan2.1-1.3B sizes are 37 tiles of 12 heads, 444 programs on the 132 multiprocessors of an H100 or
H200: three waves and a third, which take as long as four. Timed are attention to the own chunk and to listed tiles of
a history, one after the other and on two streams, and the own chunk with the keys of its last tiles in two halves. All
of it as CUDA graphs over several layers, results compared with the plain order.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.bench.record import report
from workers.kernels.listed_parts import make_parted

LAYERS, HEADS, DIM, WIDTH, TILE = 6, 12, 128, 144, 128
QUERIES, KEPT_TILES = 4680, 1829
_NOTES = (
    "One layer's call, median of a graph over 6 layers. beside: the two on two streams; halves: keys of the last "
    "queries in two halves, composed. error: largest difference from the plain order."
)
Call = Callable[[int], Tensor]


class Layers:
    """Keys and lists of some layers; queries are shared."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator).bfloat16()

        self.q = draw(QUERIES, HEADS, WIDTH)
        self.q[..., DIM:] = 0
        self.k = [draw(HEADS, KEPT_TILES * TILE, WIDTH) for _ in range(2)]
        self.v = [draw(HEADS, KEPT_TILES * TILE, DIM) for _ in range(2)]
        self.own_k = [draw(HEADS, QUERIES, WIDTH) for _ in range(LAYERS)]
        self.own_v = [draw(HEADS, QUERIES, DIM) for _ in range(LAYERS)]
        tiles = -(-QUERIES // TILE)
        order = torch.rand(HEADS, tiles, KEPT_TILES, device=device, generator=generator).argsort(-1)
        self.lists = {seen: order[..., :seen].sort(-1).values.int().contiguous() for seen in (49, 146)}


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
        return self._parted.run(self._l.q[..., :DIM], self._l.own_k[layer][..., :DIM], self._l.own_v[layer])

    def history(self, layer: int, seen: int) -> tuple[Tensor, Tensor]:
        at = layer % 2
        return self._parted.listed(self._l.q, self._l.k[at], self._l.v[at], self._l.lists[seen])

    def own_alone(self, layer: int) -> Tensor:
        return self.own(layer)[0]

    def halves(self, layer: int, num_first: int) -> Tensor:
        """The last queries see the keys in two halves, side by side in a batch."""
        from flash_attn.cute.interface import _flash_attn_fwd

        q, k, v = self._l.q[..., :DIM], self._l.own_k[layer][..., :DIM], self._l.own_v[layer]
        result, scale = torch.empty(QUERIES, HEADS, DIM, dtype=q.dtype, device=q.device), DIM**-0.5
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


def graph_ms(call: Call, repeats: int = 20) -> tuple[float, Tensor]:
    """Of one layer, and the first layer's result."""
    for layer in range(LAYERS):
        call(layer)
    torch.cuda.synchronize()
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        found = [call(layer) for layer in range(LAYERS)]
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / LAYERS)
    return statistics.median(times[3:]), found[0].float()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="attention_waves-h200")
    asked = parser.parse_args()
    device = torch.device("cuda")
    ways = Ways(Layers(device))
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = -(-QUERIES // TILE)
    whole = tiles * HEADS // sms * sms // HEADS * TILE
    groups: dict[str, dict[str, Call]] = {
        "own chunk": {"as it is": ways.own_alone, f"halves from query {whole}": lambda i: ways.halves(i, whole)}
    }
    for seen in (49, 146):
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
                ms, found = graph_ms(call)
                plain = found if plain is None else plain
                table.append({"what": group, "way": name, "ms": ms, "error": float((found - plain).abs().max())})
            except Exception as problem:  # one way's failure leaves the others
                table.append({"what": group, "way": name, "failed": f"{type(problem).__name__}: {str(problem)[:200]}"})
            print(table[-1], flush=True)
    report(asked.name, table, _NOTES)


if __name__ == "__main__":
    main()

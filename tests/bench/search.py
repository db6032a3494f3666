"""Recall and time of every search back end on one CPU thread: `OMP_NUM_THREADS=1 python -m tests.bench.search`.

Keys lie around centres that many of them share, as tokens of a video do; queries are near some of them. `recall` is the
share of queries whose nearest key was found, `cosine_loss` how much nearer the true one is on average.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, get_args

import torch
from torch import Tensor

from tests.bench.record import median_and_spread, report
from workers.config import SearchName
from workers.errors import KernelUnavailable
from workers.search.protocol import Search
from workers.search.select import make_search


def draw(num_keys: int, num_queries: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """(query, key): twenty keys to a centre, all with a part in common."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    centre = normal(1, heads, -(-num_keys // 20), head_dim) + normal(1, heads, 1, head_dim)
    key = centre.repeat_interleave(20, 2)[:, :, :num_keys] + 0.4 * normal(1, heads, num_keys, head_dim)
    chosen = torch.randint(num_keys, (num_queries,), generator=generator)
    return key[:, :, chosen] + 0.3 * normal(1, heads, num_queries, head_dim), key


def measure(search: Search, query: Tensor, key: Tensor, repeats: int) -> dict[str, Any]:
    """Median processor time of the three questions in ms, and what was found."""
    found = search.top1(query, key)

    def milliseconds(question: Any) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.thread_time()
            question()
            seconds.append(time.thread_time() - start)
        return 1000 * median_and_spread(seconds)[0]

    truth = make_search("exact").top1(query, key)
    product = query @ key.mT
    error = (search.similarity(query, key) - product).std() / product.std()
    return {
        "recall": (found.index_BNQ == truth.index_BNQ).float().mean().item(),
        "cosine_loss": (truth.cosine_BNQ - found.cosine_BNQ).mean().item(),
        "top1_ms": milliseconds(lambda: search.top1(query, key)),
        "similarity_error": error.item(),
        "similarity_ms": milliseconds(lambda: search.similarity(query, key)),
        "buckets_64_ms": milliseconds(lambda: search.buckets(key, 64, key)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for heads, head_dim, num_queries, num_keys in ((4, 64, 192, 12_000), (2, 128, 1560, 12_000)):
        query, key = draw(num_keys, num_queries, heads, head_dim)
        for name in get_args(SearchName):
            row: dict[str, Any] = {"search": name, "heads": heads, "head_dim": head_dim}
            row |= {"queries": num_queries, "keys": num_keys}
            try:
                row |= measure(make_search(name), query, key, options.repeats)
            except KernelUnavailable as error:
                row["recall"] = str(error)
            rows.append(row)
    report("search", rows, "processor time of one thread; clustered keys, twenty to a centre; faiss-gpu was not run")


if __name__ == "__main__":
    main()

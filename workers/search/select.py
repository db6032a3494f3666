"""The search back end of a name."""

from __future__ import annotations

from workers.config import SearchName
from workers.search.exact import ExactSearch
from workers.search.faiss_index import FaissFlatSearch, FaissLshSearch
from workers.search.lsh import LshSearch
from workers.search.protocol import Search
from workers.search.quant import QuantSearch


def make_search(name: SearchName) -> Search:
    """The back end of that name.

    Raises:
        KernelUnavailable: Its package is not installed; the message says how to get it.
    """
    match name:
        case "exact":
            return ExactSearch()
        case "lsh":
            return LshSearch()
        case "quant":
            return QuantSearch()
        case "faiss-lsh":
            return FaissLshSearch()
        case "faiss-flat":
            return FaissFlatSearch()
        case "faiss-sq8":
            return FaissFlatSearch(is_quantised=True)

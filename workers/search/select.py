"""The search back end of a name."""

from __future__ import annotations

import torch

from workers.config import SearchName
from workers.search.exact import ExactSearch
from workers.search.faiss_index import FaissFlatSearch, FaissLshSearch, require_device
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


def check_search(name: SearchName, device: torch.device) -> None:
    """Refuse at load what would fail at the first search, some chunks later.

    Raises:
        KernelUnavailable: The package is missing, or cannot search on this device.
    """
    if name.startswith("faiss"):
        make_search(name)
        require_device(name, device)

"""Kernels of a packed table, and its rollout in captured calls; `TRITON_INTERPRET=1` runs the former on a CPU.

Where there is no pytest: `python -m tests.packed_checks`.
"""

import pytest
import torch

from tests.packed_checks import (
    INTERPRETED,
    PARTS,
    SHAPES,
    captured_differs,
    check_pack,
    check_unpack,
    check_unpack_sample,
    table_differs,
)
from workers.cache.low_bit import Storage
from workers.cache.packed_history import Part
from workers.cache.table_layout import MergeRule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("storage", "head_dim", "tile"), SHAPES)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("some", [False, True])
def test_unpacking_gives_the_bits_of_the_plain_way_and_leaves_what_nobody_sees(
    storage: Storage, head_dim: int, tile: int, part: Part, some: bool
) -> None:
    pytest.importorskip("triton")
    check_unpack(storage, head_dim, tile, part, some=some)


@pytest.mark.parametrize(("storage", "head_dim", "tile"), SHAPES)
def test_unpacking_a_sample_gives_the_bits_of_the_plain_way(storage: Storage, head_dim: int, tile: int) -> None:
    pytest.importorskip("triton")
    check_unpack_sample(storage, head_dim, tile)


@pytest.mark.parametrize(("storage", "head_dim", "tile"), SHAPES)
def test_packing_gives_the_codes_of_the_plain_way(storage: Storage, head_dim: int, tile: int) -> None:
    pytest.importorskip("triton")
    check_pack(storage, head_dim, tile)


@pytest.mark.parametrize(("storage", "rule"), [("int8", "chains"), ("int4", "pairs")])
def test_kernels_take_over_chunks_as_the_plain_way_does(storage: Storage, rule: MergeRule) -> None:
    pytest.importorskip("triton")
    assert table_differs(storage, rule, num_chunks=7) < 0.01


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("kernels", [(), ("pairs", "packing", "choice")])
def test_captured_calls_give_what_plain_calls_give(kernels: tuple[str, ...]) -> None:
    assert captured_differs(kernels) == 0

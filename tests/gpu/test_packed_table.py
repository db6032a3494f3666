"""Kernels of a packed table, and its rollout in captured calls; `TRITON_INTERPRET=1` runs the former on a CPU.

Where there is no pytest: `python -m tests.packed_checks`.
"""

from dataclasses import replace

import pytest
import torch

from tests.packed_checks import (
    DTYPE,
    FLAGS,
    INTERPRETED,
    MERGED,
    SHAPES,
    SIZES,
    captured_differs,
    check_flags,
    check_known_distances,
    check_merge,
    check_pack,
    check_unpack,
    check_unpack_coded,
    check_unpack_sample,
    fill,
    table_differs,
)
from workers.cache.low_bit import Storage
from workers.cache.packed_history import PackedLayer
from workers.cache.packed_table import PackedTable
from workers.cache.table_layout import MergeRule

HAS_CUDA_KERNELS = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]


def differing(found: PackedTable, expected: PackedTable) -> list[str]:
    """What of their layers, with known distances, is not the same bits."""
    state = found.state()
    names = [name for name, tensor in expected.state().items() if not torch.equal(state[name], tensor)]
    for index, layers in enumerate(zip(found.layers, expected.layers, strict=True)):
        apart = [of.apart_NC for of in layers if isinstance(of, PackedLayer) and of.apart_NC is not None]
        assert len(apart) == 2
        if not torch.equal(*apart):
            names.append(f"{index}.apart_NC")
    return names


@pytest.mark.parametrize(("storage", "head_dim", "tile"), SHAPES)
@pytest.mark.parametrize("some", [False, True])
def test_unpacking_gives_the_bits_of_the_plain_way_and_leaves_what_nobody_sees(
    storage: Storage, head_dim: int, tile: int, some: bool
) -> None:
    pytest.importorskip("triton")
    check_unpack(storage, head_dim, tile, some=some)


@pytest.mark.parametrize(("storage", "head_dim", "tile"), SHAPES)
def test_unpacking_a_sample_gives_the_bits_of_the_plain_way(storage: Storage, head_dim: int, tile: int) -> None:
    pytest.importorskip("triton")
    check_unpack_sample(storage, head_dim, tile)


@pytest.mark.skipif(not HAS_CUDA_KERNELS, reason="needs compute capability 9.0")
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_unpacking_into_8_bit_floats_gives_the_bits_of_the_plain_way(storage: Storage) -> None:
    pytest.importorskip("triton")
    check_unpack_coded(storage)


@pytest.mark.parametrize(("storage", "head_dim", "tile"), SHAPES)
def test_packing_gives_the_codes_of_the_plain_way(storage: Storage, head_dim: int, tile: int) -> None:
    pytest.importorskip("triton")
    check_pack(storage, head_dim, tile)


@pytest.mark.parametrize(
    ("storage", "rule", "head_dim", "otherwise"),
    [*((*sizes, {}) for sizes in MERGED), (*MERGED[0], {"_SUMMED_BYTES": 1})],
)
def test_merging_into_codes_gives_the_bits_of_merging_in_the_workspace_and_packing(
    storage: Storage, rule: MergeRule, head_dim: int, otherwise: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also head by head; on a GPU that is for them, kernels by CUDA against those by Triton."""
    pytest.importorskip("triton")
    for name, value in otherwise.items():
        monkeypatch.setattr(f"workers.cache.triton_collect.{name}", value)
    check_merge(storage, rule, head_dim)


@pytest.mark.skipif(not HAS_CUDA_KERNELS, reason="needs compute capability 9.0")
def test_rows_moved_by_cuda_are_those_moved_by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records, means of tiles and known distances as well."""
    check_merge("int4", "pairs", 128, 128)
    s = replace(SIZES, storage="int4", head_dim=128, tile=128, kept_chunks=9, spare_chunks=3)
    num_chunks = s.kept_chunks + 3 * s.spare_chunks + 3
    with monkeypatch.context() as changed:
        changed.setattr("workers.cache.triton_collect.move_history", None)  # or both would be moved by Triton
        found = fill(s, num_chunks, "kernels", DTYPE)
    monkeypatch.setattr("workers.cache.triton_collect.can_move", lambda *_: False)
    assert not differing(found, fill(s, num_chunks, "kernels", DTYPE))


@pytest.mark.parametrize(("num_tiles", "query_tiles", "listed"), FLAGS)
def test_tiles_that_are_listed_are_flagged(num_tiles: int, query_tiles: int, listed: int) -> None:
    pytest.importorskip("triton")
    check_flags(num_tiles, query_tiles, listed)


def test_distances_that_are_known_are_those_that_are_found_anew() -> None:
    pytest.importorskip("triton")
    check_known_distances()


def test_layers_hold_the_bits_of_chunks_taken_over_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And head by head."""
    pytest.importorskip("triton")
    s = replace(SIZES, storage="int4")
    num_chunks = s.kept_chunks + s.spare_chunks + 3
    expected = fill(s, num_chunks, "kernels", DTYPE)
    monkeypatch.setattr("workers.cache.triton_match.UNIT_BYTES", 1)
    found = fill(s, num_chunks, "kernels", DTYPE, one_by_one=True)
    assert not differing(found, expected)
    assert int(found.state()["0.m_NC"].max()) > 1


@pytest.mark.parametrize(
    ("storage", "rule", "num_chunks"), [("int8", "chains", 7), ("int4", "pairs", 7), ("int4", "pairs", 3)]
)
def test_kernels_take_over_chunks_as_the_plain_way_does(storage: Storage, rule: MergeRule, num_chunks: int) -> None:
    """Also the first chunk of a history, when nothing of it is laid out."""
    pytest.importorskip("triton")
    assert table_differs(storage, rule, num_chunks) < 0.01


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("kernels", [(), ("pairs", "packing", "choice")])
def test_captured_calls_give_what_plain_calls_give(kernels: tuple[str, ...]) -> None:
    assert captured_differs(kernels) == 0

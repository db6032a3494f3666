"""Kernels of a packed table, and its rollout in captured calls; `TRITON_INTERPRET=1` runs the former on a CPU.

Where there is no pytest: `python -m tests.packed_checks`.
"""

from dataclasses import replace

import pytest
import torch

from tests.bench.history_engine import Variant, make_engine, make_plan
from tests.bench.rollout_rows import Settings
from tests.packed_checks import INTERPRETED, PARTS, SHAPES, check_pack, check_unpack, table_differs
from workers.cache.low_bit import Storage
from workers.cache.packed_history import Part
from workers.cache.table_layout import MergeRule
from workers.model.backbones import find_backbone

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
    backbone = replace(find_backbone("wan2.1-t2v-1.3b"), num_layers=2)
    settings = Settings(backbone, 208, 160, torch.device("cuda"), torch.bfloat16, 120)
    variant = Variant("small", kept_chunks=2, spare_chunks=2, density=0.3, rule="pairs", storage="int4")
    latents = []
    for graphs in (True, False):
        engine = make_engine(variant, settings, None, None, kernels=kernels, graphs=graphs)
        latents.append([c.latents_BTCHW.clone() for c in engine.rollout.run(make_plan(engine, settings, 9))][-1])
    assert torch.equal(*latents)

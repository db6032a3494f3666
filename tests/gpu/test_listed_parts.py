"""Attention over a table in two parts and their composition, against the plain ways. `TRITON_INTERPRET=1` runs what is
Triton's without a GPU."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.bench.history_engine import Variant, make_engine, make_plan
from tests.bench.rollout_rows import Settings
from tests.tables import draw_listed
from workers.attention.tile_choice import TileRuns
from workers.kernels.listed_parts import compose_plain, make_parted
from workers.kernels.listed_tiles import ListedName, attend_listed_plain, attend_listed_plain_lse
from workers.model.backbones import find_backbone
from workers.rollouts.kept_history import FreshSlots, KeptHistory, Looked

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="needs a CUDA device")]
DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
LARGEST = 1e-5 if INTERPRETED else 0.02
"""bfloat16 rounds inputs and weights to 0.4%."""


def error(found: Tensor, expected: Tensor) -> float:
    difference = (found.float() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().square().mean().sqrt())


def needs(name: ListedName) -> None:
    package = "flash_attn" if name == "flash-attn-4" else "triton"
    if importlib.util.find_spec(package) is None or (name == "flash-attn-4" and not HAS_GPU):
        pytest.skip(f"needs {package}")


class Layer:
    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k_NLW, self.v_NLD = k, v


@pytest.mark.parametrize(("queries", "heads", "dim"), [(37, 3, 24), (100, 2, 64), (293, 3, 128), (1, 1, 16)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_composition_is_the_plain_one(queries: int, heads: int, dim: int, turned: bool) -> None:
    """Log-sum-exps lie as kernels leave them: queries or heads outside."""
    needs("triton")
    from workers.kernels.triton_compose import compose

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(queries, heads, dim, generator=generator).to(DEVICE, DTYPE) for _ in range(2))
    lse_a, lse_b = (torch.randn(queries, heads, generator=generator) * 6 for _ in range(2))
    lse_a[0], lse_b[-1] = -torch.inf, -torch.inf  # of one query both
    lse_a, lse_b = lse_a.to(DEVICE), lse_b.to(DEVICE)
    lse_a = lse_a.T.contiguous().T if turned else lse_a
    found, expected = compose(a, lse_a, b, lse_b), compose_plain(a, lse_a, b, lse_b)
    torch.testing.assert_close(found, expected, rtol=1e-5 if INTERPRETED else 8e-3, atol=1e-5)
    assert queries == 1 or torch.equal(found[0], b[0])


@pytest.mark.filterwarnings("ignore:cutlass:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.parametrize(("name", "tile"), [("flash-attn-4", 128), ("triton", 128), ("triton", 16)])
def test_lists_come_with_their_log_sum_exp(name: ListedName, tile: int) -> None:
    needs(name)
    dim, queries = min(tile, 128), 2 * tile + 37
    empty = slice(tile, tile + tile // 2)
    *drawn, index = draw_listed((queries, 3, dim), tile, 11, 5, most_mass=4 * math.sqrt(dim), empty=empty)
    q, k, v = (x.to(DEVICE, DTYPE) for x in drawn)
    index = index.to(DEVICE)
    expected, expected_lse = attend_listed_plain_lse(q.float(), k.float(), v.float(), index, tile)
    found, lse = make_parted(name, tile).listed(q, k, v, index)
    assert error(found, expected) < LARGEST
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-4 if INTERPRETED else 0.05)
    into = torch.full_like(out := found.contiguous(), 7.0), torch.full_like(lse.T.contiguous(), 7.0).T
    make_parted(name, tile).listed_into(q, k, v, index, into)
    assert torch.equal(into[0], out)
    assert torch.equal(into[1], lse)


@pytest.mark.filterwarnings("ignore:cutlass:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.parametrize(("name", "tile"), [("flash-attn-4", 128), ("triton", 128), ("triton", 16)])
@pytest.mark.parametrize("always", [((8, 11),), ((6, 8), (8, 11)), ((0, 2), (6, 8), (8, 11))])
@pytest.mark.parametrize("dense", [True, False])
def test_parts_are_attention_over_both(
    name: ListedName, tile: int, always: tuple[tuple[int, int], ...], dense: bool
) -> None:
    """Own chunk of three tiles, the last one not full; with the newest chunk before it; with a sink as well."""
    needs(name)
    dim, queries, tiles = min(tile, 128), 2 * tile + tile // 3, 11
    q, k, v, _ = draw_listed((queries, 3, dim), tile, tiles, 1, most_mass=2.0, empty=slice(5 * tile, 5 * tile + 9))
    own = slice(8 * tile, 8 * tile + queries)
    k[:, own, dim], k[:, own.stop :, dim] = 0, -1e5
    q, k, v = (x.to(DEVICE, DTYPE) for x in (q, k, v))
    free = [tile for tile in range(8) if not any(first <= tile < stop for first, stop in always)]
    listed = torch.tensor(free[1::2], dtype=torch.int32, device=DEVICE).expand(3, 3, -1).contiguous()
    layer, runs = Layer(k, v), TileRuns(((0, 8),), always, tiles)
    kept = KeptHistory(make_parted(name, tile, dense=dense), FreshSlots.of(runs, queries, tile), [layer])
    found = kept.attend(0, q, layer, Looked(layer, listed))
    fresh = [tile for first, stop in always for tile in range(first, stop)]
    whole = torch.cat((listed, torch.tensor(fresh, device=DEVICE).expand(3, 3, -1)), -1).int()
    expected = attend_listed_plain(q.float(), k.float(), v.float(), whole, tile)
    assert error(found, expected) < LARGEST
    assert torch.equal(kept.attend(0, q, layer, None), found), "what was seen is kept"


@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:cutlass:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.parametrize("name", ["torch", "triton", "flash-attn-4"])
@pytest.mark.parametrize(
    "fields", [{"always_recent": True}, {}, {"history_at": (0, 2), "always_sink": True}, {"dense_own": False}]
)
def test_captured_calls_give_what_plain_calls_give(fields: dict[str, object], name: ListedName) -> None:
    if name != "torch":
        needs(name)
    backbone = replace(find_backbone("wan2.1-t2v-1.3b"), num_layers=2)
    settings = Settings(backbone, 208, 160, torch.device("cuda"), torch.bfloat16, 120)
    variant = replace(Variant("small", kept_chunks=2, spare_chunks=2, density=0.3, history_at=(0,)), **fields)
    latents = []
    for graphs, at_once in ((True, True), (False, True), (True, False)):
        engine = make_engine(variant, settings, None, None, graphs=graphs, attend_name=name)
        engine.rollout.attend_at_once(at_once)
        latents.append([c.latents_BTCHW.clone() for c in engine.rollout.run(make_plan(engine, settings, 9))][-1])
    assert all(torch.equal(latents[0], other) for other in latents[1:])

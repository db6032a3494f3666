"""Choosing tiles in fixed shapes: what is estimated, what is always seen, and that the best tiles are found."""

import math
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from workers.attention.tile_choice import ChoiceSettings, Estimate, TileChoice, TileRuns
from workers.kernels.listed_tiles import attend_listed_plain, make_attend
from workers.key_codes import KeyCodes

HEADS, DIM, TILE, QUERIES, TILES = 2, 16, 8, 20, 9
CPU = torch.device("cpu")
RUNS = TileRuns(candidates=((0, 2), (3, 7)), always=((7, 9),), num_tiles=TILES)


def make_table(num_empty: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(QUERIES, HEADS, DIM + 16, generator=generator)
    q[..., DIM:] = 0
    q[..., DIM : DIM + 2] = 1
    k = torch.randn(HEADS, TILES * TILE, DIM + 16, generator=generator)
    k[..., DIM:] = 0
    k[..., DIM] = torch.rand(HEADS, TILES * TILE, generator=generator) * 4  # sqrt(D) log m
    k[:, : num_empty * TILE, DIM] = -1e5
    v = torch.randn(HEADS, TILES * TILE, DIM, generator=generator)
    return q, k, v


def true_mass(q: Tensor, k: Tensor) -> Tensor:
    """[N, I, J] over all keys and queries."""
    share = (q.transpose(0, 1) @ k.mT / math.sqrt(DIM)).softmax(-1).unflatten(-1, (TILES, TILE)).sum(-1)
    return torch.stack([share[:, start : start + TILE].mean(1) for start in range(0, QUERIES, TILE)], 1)


def choose(num_chosen: int, q: Tensor, k: Tensor, estimate: Estimate = "exact") -> Tensor:
    settings = ChoiceSettings(num_chosen, keys_per_tile=TILE, queries_per_tile=TILE, estimate=estimate, tile=TILE)
    chooser = TileChoice(settings, RUNS, QUERIES, DIM, CPU)
    index = chooser.new_list(HEADS)
    chooser.choose(q, k, index)
    return index


def test_with_all_keys_and_queries_the_estimate_is_the_mass() -> None:
    q, k, _ = make_table()
    settings = ChoiceSettings(2, keys_per_tile=TILE, queries_per_tile=TILE, tile=TILE)
    found = TileChoice(settings, RUNS, 2 * TILE, DIM, CPU).mass(q[: 2 * TILE], k)
    torch.testing.assert_close(found, true_mass(q, k)[:, :2])


@pytest.mark.parametrize("estimate", get_args(Estimate))
def test_tiles_always_seen_come_last_and_the_chosen_are_candidates(estimate: Estimate) -> None:
    q, k, _ = make_table()
    index = choose(3, q, k, estimate)
    assert index.shape == (HEADS, 3, 5)
    assert index[..., 3:].flatten().unique().tolist() == [7, 8]
    assert set(index[..., :3].flatten().tolist()) <= {0, 1, 3, 4, 5, 6}
    assert all(len(set(row)) == 5 for row in index.flatten(0, 1).tolist())


def test_tiles_without_keys_are_chosen_last() -> None:
    q, k, _ = make_table(num_empty=2)
    assert choose(4, q, k)[..., :4].sort(-1).values.flatten(0, 1).unique(dim=0).tolist() == [[3, 4, 5, 6]]


@pytest.mark.parametrize("estimate", get_args(Estimate))
def test_a_clean_pass_sees_the_heaviest_of_what_a_step_sees(estimate: Estimate) -> None:
    q, k, _ = make_table()
    settings = ChoiceSettings(
        4, clean_share=0.5, keys_per_tile=TILE, queries_per_tile=TILE, estimate=estimate, tile=TILE
    )
    chooser = TileChoice(settings, RUNS, QUERIES, DIM, CPU)
    index, clean = chooser.new_list(HEADS), chooser.new_list(HEADS, for_clean_pass=True)
    chooser.choose(q, k, index, clean)
    assert clean[..., 2:].flatten().unique().tolist() == [7, 8]
    assert torch.equal(index[..., :4].sort(-1).values, choose(4, q, k, estimate)[..., :4].sort(-1).values)
    assert torch.equal(clean[..., :2].sort(-1).values, choose(2, q, k, estimate)[..., :2].sort(-1).values)


@pytest.mark.parametrize(("estimate", "least"), [("exact", 0.999), ("quant", 0.99), ("lsh", 0.75)])
def test_what_is_chosen_holds_nearly_the_most_mass_that_so_many_tiles_can(estimate: Estimate, least: float) -> None:
    q, k, _ = make_table()
    mass = true_mass(q, k)
    candidates = torch.tensor([0, 1, 3, 4, 5, 6])
    best = mass[..., candidates].topk(3).values.sum()
    found = mass.gather(2, choose(3, q, k, estimate)[..., :3].long()).sum()
    assert float(found / best) >= least


def test_seeing_all_tiles_is_dense_attention_with_log_mass() -> None:
    q, k, v = make_table(num_empty=1)
    every = torch.arange(TILES, dtype=torch.int32).expand(HEADS, -(-QUERIES // TILE), -1)
    found = make_attend("torch", TILE)(q, k, v, every)
    mass = k[..., DIM] / math.sqrt(DIM)
    logit = q[..., :DIM].transpose(0, 1) @ k[..., :DIM].mT / math.sqrt(DIM) + mass[:, None]
    torch.testing.assert_close(found, (logit.softmax(-1) @ v).transpose(0, 1), rtol=1e-4, atol=1e-5)


def test_listed_attention_sees_the_listed_tiles_alone() -> None:
    q, k, v = make_table()
    index = choose(2, q, k)
    found = attend_listed_plain(q, k, v, index, TILE)
    for head in range(HEADS):
        for start in range(0, QUERIES, TILE):
            keys = torch.cat([torch.arange(j * TILE, (j + 1) * TILE) for j in index[head, start // TILE].tolist()])
            logit = q[start : start + TILE, head] @ k[head, keys].mT / math.sqrt(DIM)
            expected = logit.softmax(-1) @ v[head, keys]
            torch.testing.assert_close(found[start : start + TILE, head], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "otherwise",
    [
        {},
        {"bits": torch.int8},
        {"dtype": torch.float32},
        {"is_cuda": False},
        {"compute": (10, 0)},
        {"head_dim": 64},
        {"estimate": "quant"},
        {"fused": False},
    ],
)
def test_codes_are_read_where_they_are_known_to_give_the_same_bits(
    otherwise: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nowhere else: one thing that differs, and keys are unpacked."""
    of: dict[str, Any] = {
        "bits": torch.uint8,
        "dtype": torch.bfloat16,
        "is_cuda": True,
        "compute": (9, 0),
        "head_dim": 128,
        "estimate": "exact",
        "fused": True,
    } | otherwise
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: of["compute"])
    settings = ChoiceSettings(2, keys_per_tile=TILE, tile=TILE, estimate=of["estimate"], fused=of["fused"])
    chooser = TileChoice(settings, RUNS, QUERIES, of["head_dim"], CPU)
    code, end = SimpleNamespace(dtype=of["bits"]), SimpleNamespace(dtype=of["dtype"], is_cuda=of["is_cuda"], device=CPU)
    keys: Any = KeyCodes(code, end, end, end, 0)  # type: ignore[arg-type]
    assert chooser.takes_codes(keys) == (not otherwise)
    assert not chooser.takes_codes(None)

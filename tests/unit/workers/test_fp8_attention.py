"""Attention in 8-bit floats: how tiles lie, what plain torch makes of them, who computes it, and rollouts with it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.tables import draw_listed, make_captured
from tests.unit.workers.rollouts.test_captured import BACKBONE, CPU, SIZE, make_plan
from tests.unit.workers.test_select_listed import AMPERE, BLACKWELL, HOPPER, WAN
from workers.assemble_tiles import size_table
from workers.attention.tile_choice import TileRuns
from workers.coded_tiles import (
    SCALE_QK,
    SCALE_V,
    code_queries_plain,
    code_tiles_plain,
    code_values_plain,
    decode_masses,
    decode_rows,
    decode_values,
    key_of_byte,
    to_e4m3,
)
from workers.config_tiles import Fp8Attention
from workers.kernels import select_fp8
from workers.kernels.fp8_plain import attend_coded_plain, attend_tiles_plain
from workers.kernels.listed_parts import CodedAttention, PartedAttention, make_parted, make_rounded
from workers.kernels.listed_tiles import attend_listed_plain_lse
from workers.kernels.select import Hardware, KernelNeed
from workers.kernels.select_fp8 import Fp8Choice, choose_fp8, with_fp8
from workers.model.dit import CausalDiT
from workers.rollout import CleanChunk
from workers.rollouts.captured import CapturedRollout, CapturedSettings
from workers.rollouts.kept_history import FreshSlots, KeptHistory, Looked

ROUNDED = 0.1
"""Root-mean-square difference over the size of a result: e4m3 rounds inputs and shares by up to 6%, which averages."""


def share_of(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize(("tile", "dim", "queries"), [(8, 12, 37), (16, 64, 64), (128, 128, 200)])
def test_listed_tiles_are_seen_nearly_as_in_full_precision(tile: int, dim: int, queries: int) -> None:
    q, k, v, index = draw_listed((queries, 3, dim), tile, 9, 4, most_mass=5.0, empty=slice(tile, tile + 5))
    index = index[:, : -(-queries // tile)]
    out, lse = attend_coded_plain(q, k, v, index, tile)
    expected, exact_lse = attend_listed_plain_lse(q, k, v, index, tile)
    assert 0 < share_of(out, expected) < ROUNDED
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=0.1)
    every = torch.arange(9, dtype=torch.int32).expand(*index.shape[:2], 9)
    for found, wanted in zip(
        attend_coded_plain(q, k, v, None, tile), attend_coded_plain(q, k, v, every, tile), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_query_that_sees_no_key_has_nothing() -> None:
    q, k, v, index = draw_listed((20, 2, 12), 8, 5, 2, most_mass=0.0, empty=slice(0, 40))
    out, lse = attend_coded_plain(q, k, v, index, 8)
    assert not out.any()
    assert bool(lse.isneginf().all())


def test_what_is_too_large_saturates() -> None:
    assert to_e4m3(torch.tensor([1e4, -200.0, 113.0]), SCALE_QK).float().tolist() == [448.0, -448.0, 448.0]


def test_tiles_lie_as_the_kernel_reads_them() -> None:
    k, v = (torch.randn(2, 200, 128, generator=torch.Generator().manual_seed(i)) for i in range(2))
    tiles = code_tiles_plain(k, v)
    assert tiles.k_NTB.shape == tiles.v_NTB.shape == (2, 2, 16384)
    codes_k, codes_v = (to_e4m3(x, scale).view(torch.uint8) for x, scale in ((k, SCALE_QK), (v, SCALE_V)))
    order = {}
    for group in range(4):
        for quad in range(4):
            for j in range(2):
                for byte, key in ((4 * quad, 2 * quad), (4 * quad + 2, 8 + 2 * quad)):
                    order[32 * group + byte + j] = 32 * group + key + j
                    order[32 * group + 16 + byte + j] = 32 * group + 16 + key + j
    assert key_of_byte().tolist() == [order[byte] for byte in range(128)]
    for row, piece, byte in ((0, 0, 0), (5, 3, 7), (71, 6, 15), (64, 7, 1)):
        place = row * 128 + (piece ^ (row & 7)) * 16 + byte
        assert tiles.k_NTB[1, 1, place] == codes_k[1, 128 + row, 16 * piece + byte]
        assert tiles.v_NTB[1, 0, place] == codes_v[1, order[16 * piece + byte], row]
    assert not tiles.k_NTB[:, 1, 72 * 128 :].any()
    log2 = decode_masses(tiles.mass_NTB, 128).flatten(1)
    assert bool((log2[:, :200] == 0).all())
    assert bool(log2[:, 200:].isneginf().all())
    assert torch.equal(decode_rows(tiles.k_NTB).flatten(1, 2)[:, :200], to_e4m3(k, SCALE_QK).float())
    assert torch.equal(decode_values(tiles.v_NTB).flatten(1, 2)[:, :200], to_e4m3(v, SCALE_V).float())


def test_coded_tiles_are_attended_to_as_keys_that_are_rounded_on_the_way() -> None:
    q, k, v, index = draw_listed((200, 2, 128), 128, 5, 3, most_mass=30.0, empty=slice(130, 300))
    k[..., 128] = k[..., 128].bfloat16().float()  # as it lies in a table: four codes have all of it
    for given in (index, None):
        expected = attend_coded_plain(q, k, v, given, 128)
        found = attend_tiles_plain(code_queries_plain(q), code_tiles_plain(k, v), given, 200)
        torch.testing.assert_close(found[0].float(), expected[0], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(found[1], expected[1])
        into = torch.empty(200, 2, 128, dtype=torch.bfloat16), torch.empty(2, 200).T
        attend_tiles_plain(code_queries_plain(q), code_tiles_plain(k, v), given, 200, into)
        assert all(torch.equal(a, b) for a, b in zip(into, found, strict=True))


@pytest.mark.parametrize(
    ("hardware", "need", "tile", "no_kernels", "lacks", "reason"),
    [
        (HOPPER, WAN, 128, "", "", ""),
        (Hardware("cpu"), WAN, 128, "", "", "its kernel is for cuda, not for cpu"),
        (AMPERE, WAN, 128, "", "", r"needs compute capability 9\.0, this GPU has 8\.0"),
        (BLACKWELL, WAN, 128, "", "", r"needs compute capability 9\.0, this GPU has 10\.0"),
        (HOPPER, replace(WAN, dtype=torch.float32), 128, "", "", "takes bfloat16, not float32"),
        (HOPPER, KernelNeed(torch.bfloat16, 64), 128, "", "", "a head dimension and a tile of 128, not 64 and 128"),
        (HOPPER, WAN, 64, "", "", "not 128 and 64"),
        (HOPPER, WAN, 128, "as attention is", "", "tiles are coded by kernels of the table: as attention is"),
        (HOPPER, WAN, 128, "", "no compiler", "no compiler"),
    ],
)
def test_the_kernel_runs_where_it_can_and_else_torch_rounds_alike(
    hardware: Hardware,
    need: KernelNeed,
    tile: int,
    no_kernels: str,
    lacks: str,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        choice = choose_fp8("steps", hardware, need, tile, no_kernels, lambda: lacks)
    (record,) = caplog.records
    assert (choice.why_plain == "") == (reason == "")
    assert re.search(reason, choice.why_plain)
    message = record.getMessage()
    if reason:
        assert record.levelno == logging.WARNING
        assert re.search(rf"slower here than attention\.fp8: none: .*{reason}", message)
        assert choice.version == ", attention in 8-bit floats in denoising steps (rounded by plain torch)"
    else:
        assert message == "attention.fp8: steps: by a kernel that multiplies 8-bit floats"
        assert choice.version == ", attention in 8-bit floats in denoising steps"


def test_nothing_is_said_where_nothing_is_in_8_bits(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        choice = choose_fp8("none", HOPPER, WAN, 128, "", lambda: "never asked")
    assert (caplog.records, choice.version) == ([], "")


@pytest.mark.parametrize(
    ("which", "rounds"), [("none", (False, False)), ("steps", (True, False)), ("all", (True, True))]
)
def test_clean_passes_round_only_where_all_calls_do(
    which: Fp8Attention, rounds: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = make_parted("torch", 8)
    coded = ways._replace(coded=PLAIN_CODED)
    monkeypatch.setattr(select_fp8, "make_coded", lambda ways: coded)
    assert tuple(way is coded for way in with_fp8(ways, Fp8Choice(which), 8)) == rounds
    plain = with_fp8(ways, Fp8Choice(which, "no GPU"), 8)
    assert tuple(way is not ways for way in plain) == rounds
    assert all(way.coded is None and way.compose is ways.compose for way in plain)


class _Layer:
    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k_NLW, self.v_NLD = k, v


PLAIN_CODED = CodedAttention(
    lambda q, k, v, out=None: (code_queries_plain(q), code_tiles_plain(k, v)),
    attend_tiles_plain,
    lambda v, out: out.copy_(code_values_plain(v)),
)


@pytest.mark.parametrize("way", ["rounded", "coded"])
@pytest.mark.parametrize("always", [((7, 9),), ((4, 7), (7, 9)), ((0, 1), (7, 9))])
def test_parts_in_8_bit_floats_are_near_those_in_full_precision(
    way: Literal["rounded", "coded"], always: tuple[tuple[int, int], ...]
) -> None:
    tile, queries = 128, 200
    q, k, v, _ = draw_listed((queries, 2, 128), tile, 9, 1, most_mass=5.0, empty=slice(7 * tile + queries, 9 * tile))
    k[:, 7 * tile : 7 * tile + queries, 128:] = 0  # own keys, the last two tiles, stand for one each
    index = torch.tensor([[1, 2], [2, 3]], dtype=torch.int32).expand(2, 2, 2).contiguous()
    layer, exact = _Layer(k, v), make_parted("torch", tile)
    fresh = FreshSlots.of(TileRuns(((1, 4),), always, 9), queries, tile)
    parted = make_rounded(exact, tile) if way == "rounded" else exact._replace(coded=PLAIN_CODED)
    tiles = code_tiles_plain(k, v)
    kept = KeptHistory(parted, fresh, [layer], exact, lambda layer_index: tiles)
    assert kept.has_clean_ways
    assert (kept.reads_coded(clean=False), kept.reads_coded(clean=True)) == (way == "coded", False)
    keys = kept.lay_out_coded(0) if way == "coded" else layer
    clean = KeptHistory(exact, fresh, [layer])
    expected = clean.attend(0, q, layer, Looked(layer, index))
    assert 0 < share_of(kept.attend(0, q, layer, Looked(keys, index)).float(), expected) < ROUNDED
    assert 0 < share_of(kept.attend(0, q, layer, None).float(), expected) < ROUNDED
    assert torch.equal(kept.attend(0, q, layer, Looked(layer, index), clean=True), expected)


@pytest.fixture(scope="module")
def wide_model() -> CausalDiT:
    """Heads of 128 channels, in 16 bits."""
    torch.manual_seed(4)
    dit = CausalDiT(replace(BACKBONE, dim=256, num_heads=2))
    dit.reset_parameters(zero_output=False)
    return dit.eval().requires_grad_(False).to(torch.bfloat16)


def roll(
    model: CausalDiT, ways: PartedAttention, clean_ways: PartedAttention, num: int = 8, clean_share: float = 0.5
) -> list[CleanChunk]:
    sizes = size_table(
        model.backbone, SIZE, kept_chunks=2, spare_chunks=2, tile=128, candidate_tiles=2, rule="pairs", storage="int4"
    )
    settings = CapturedSettings(graphs=False, history_at=(0,))
    shared = {"num_chosen": 3, "clean_share": clean_share, "settings": settings}
    rollout = make_captured(model, sizes, SIZE, parted=ways, clean_parted=clean_ways, **shared)
    return list(rollout.run(make_plan(model, num)))


def test_a_rollout_over_coded_tiles_is_near_those_that_round_on_the_way(wide_model: CausalDiT) -> None:
    """The table merges meanwhile, in the memory that tiles are coded in."""
    exact = make_parted("torch", 128)
    coded = exact._replace(coded=PLAIN_CODED)
    plain, found, everywhere, rounded = (
        roll(wide_model, *ways)
        for ways in ((exact, exact), (coded, exact), (coded, coded), (make_rounded(exact, 128), exact))
    )
    for a, b, c, d in zip(plain, found, everywhere, rounded, strict=True):
        spread = a.latents_BTCHW.std()
        for other in (b, c, d):
            assert 0 < float((a.latents_BTCHW - other.latents_BTCHW).square().mean().sqrt()) < 0.1 * spread
    assert not torch.equal(found[-1].latents_BTCHW, everywhere[-1].latents_BTCHW)


@pytest.mark.parametrize("clean_share", [0.5, 1.0])
@pytest.mark.parametrize("cleans_so", [False, True])
def test_codes_written_with_queries_and_keys_are_those_of_codes_written_later(
    wide_model: CausalDiT, clean_share: float, cleans_so: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also where a graph of a step serves clean passes."""
    exact = make_parted("torch", 128)
    coded = exact._replace(coded=PLAIN_CODED)
    ways = coded, coded if cleans_so else exact

    def replay(self: CapturedRollout, choose: bool, look: bool = True, clean: bool = False) -> None:
        self.compute(choose, look=look, clean=clean and self._has_clean_calls)

    monkeypatch.setattr(CapturedRollout, "replay", replay)
    rooms, asked = KeptHistory.rooms_for_codes, []

    def ask(self: KeptHistory, *, clean: bool) -> tuple[Tensor, Tensor] | None:
        asked.append(rooms(self, clean=clean))
        return asked[-1]

    monkeypatch.setattr(KeptHistory, "rooms_for_codes", ask)
    found = roll(wide_model, *ways, clean_share=clean_share)
    assert any(asked)
    monkeypatch.setattr(KeptHistory, "rooms_for_codes", lambda self, *, clean: None)
    for a, b in zip(found, roll(wide_model, *ways, clean_share=clean_share), strict=True):
        assert torch.equal(a.latents_BTCHW, b.latents_BTCHW)


def test_coded_tiles_take_the_memory_of_values(wide_model: CausalDiT) -> None:
    from workers.cache.packed_history import Workspace

    s = size_table(wide_model.backbone, SIZE, kept_chunks=2, spare_chunks=2, tile=128, storage="int4")
    work = Workspace(s, torch.bfloat16, CPU)
    tiles = work.coded(s)
    tiles.k_NTB.fill_(1)
    tiles.v_NTB.fill_(2)
    lie = work.v_NLD.view(torch.uint8).flatten()
    assert lie.unique(return_counts=True)[1].tolist() == [tiles.k_NTB.numel(), tiles.v_NTB.numel()]

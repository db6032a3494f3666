"""Tiles chosen by keys as codes, against unpacking these first; `TRITON_INTERPRET=1` runs the sums on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.packed_checks import DEVICE, DTYPE, INTERPRETED, SIZES, draw_table, fill, sizes_of
from workers.assemble_tiles import tile_runs
from workers.attention.tile_choice import CODES_ON, ChoiceSettings, TileChoice
from workers.attention.tile_mass import sample_places

triton = pytest.importorskip("triton")
tl = triton.language
HAS_GPU = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() == CODES_ON
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="needs compute capability 9.0"),
]


@triton.jit
def two_parts(step: Any) -> Any:
    return step, step * 0.0


@triton.jit
def scaled_codes(code: Any, first: Any, first_rest: Any, second: Any, second_rest: Any) -> Any:
    low, high = (code & 15).to(tl.float32) - 8.0, (code >> 4).to(tl.float32) - 8.0
    return low * (first + first_rest), high * (second + second_rest)


@pytest.fixture(autouse=True)
def _decode_without_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Triton's interpreter does not know: there codes times steps are left as float32."""
    if INTERPRETED:
        monkeypatch.setattr("workers.triton_decode.two_parts", two_parts)
        monkeypatch.setattr("workers.triton_decode.scaled_codes", scaled_codes)


@pytest.mark.parametrize(
    ("head_dim", "tile", "per_tile", "launch"),
    [
        (64, 16, 8, (16, 32, 2, 6, 4, 1)),
        (64, 32, 4, (16, 64, 1, 2, 4, 1)),
        (32, 16, 16, (16, 32, 1, 99, 4, 1)),
        (128, 16, 16, None),
        (128, 128, 16, None),
    ],
)
def test_sums_of_codes_are_those_of_unpacked_keys(
    head_dim: int, tile: int, per_tile: int, launch: tuple[int, ...] | None
) -> None:
    """By the launch in use the same bits; by others also where a step has fewer than eight tiles."""
    from workers.attention.triton_choice import Launch, tile_sums
    from workers.attention.triton_coded_choice import HOPPER, coded_tile_sums

    s, num_queries = sizes_of("int4", head_dim, tile), 5 * tile + 3
    table = draw_table(s)
    place_S = sample_places(num_queries, tile, 16, DEVICE)[0]
    q_QNW = torch.randn(num_queries, s.num_heads, s.width, generator=torch.Generator().manual_seed(3)).to(DEVICE, DTYPE)
    found, expected = (torch.full((s.num_heads, len(place_S), s.num_slots // tile), 7.0, device=DEVICE) for _ in "ab")
    sizes, slot_R = (head_dim, tile, per_tile), sample_places(s.num_slots, tile, per_tile, DEVICE)[0]
    tile_sums(q_QNW, table.lay_out_sample(0, slot_R).k_NLW, place_S, expected, sizes, quant=False)
    of = HOPPER if launch is None else Launch(*launch)
    coded_tile_sums(q_QNW, table.key_codes(0), place_S, found, sizes, of)
    if INTERPRETED or launch is not None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.skipif(INTERPRETED, reason="codes are chosen by where there is such a GPU")
def test_codes_choose_the_tiles_that_unpacked_keys_choose() -> None:
    """Of a table that has merged, and in a graph."""
    s = replace(SIZES, storage="int4", head_dim=128, tile=128, chunk_tokens=3 * 250, frame_tokens=250)
    table = fill(s, s.kept_chunks + s.spare_chunks + 5, "kernels", DTYPE)
    assert table.has_merged
    runs, settings = tile_runs(s), ChoiceSettings(3, fused=True, clean_share=0.5)
    chooser = TileChoice(settings, runs, s.chunk_tokens, s.head_dim, DEVICE)
    q_QNW = torch.randn(s.chunk_tokens, s.num_heads, s.width, device=DEVICE).bfloat16()
    q_QNW[..., s.head_dim :] = 0
    q_QNW[..., s.head_dim : s.head_dim + 2] = 1
    for index in range(s.num_layers):
        codes = table.key_codes(index)
        assert chooser.takes_codes(codes)
        unpacked = table.lay_out_sample(index, chooser.sampled_slot_R).k_NLW
        expected, found, replayed = (
            [chooser.new_list(s.num_heads, for_clean_pass=clean) for clean in (False, True)] for _ in range(3)
        )
        chooser.choose(q_QNW, unpacked, *expected)
        chooser.choose(q_QNW, codes, *found)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chooser.choose(q_QNW, codes, *replayed)
        graph.replay()
        assert all(torch.equal(a, b) for lists in (found, replayed) for a, b in zip(expected, lists, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="CUDA")
@pytest.mark.parametrize("query_tiles", [2, 5, 43])
@pytest.mark.parametrize(("frame_tokens", "multiprocessors"), [(22, 132), (700, 132), (700, 4), (700, 2)])
def test_cuda_finds_the_sums_of_triton(
    query_tiles: int, frame_tokens: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, also where a program has fewer tiles of queries than parts, or not all of them.

    Of five batches groups of four warps get one or none, or two or one, or three or two.
    """
    from workers.attention import coded_choice
    from workers.attention.triton_coded_choice import coded_tile_sums

    monkeypatch.setattr(coded_choice, "_count_multiprocessors", lambda _: multiprocessors)
    s = replace(sizes_of("int4", 128, 128), chunk_tokens=3 * frame_tokens, frame_tokens=frame_tokens)
    num_queries, num_tiles, keys = 128 * query_tiles - 37, s.num_slots // s.tile, draw_table(s).key_codes(0)
    assert keys is not None
    assert coded_choice.fits(keys, (128, 128, 16, 8))
    assert not coded_choice.fits(keys, (128, 128, 8, 8))
    place_S = sample_places(num_queries, 128, 8, DEVICE)[0]
    q_QNW = torch.randn(num_queries, s.num_heads, s.width, device=DEVICE).to(DTYPE)
    expected = torch.empty(s.num_heads, len(place_S), num_tiles, device=DEVICE)
    coded_tile_sums(q_QNW, keys, place_S, expected, (128, 128, 16))
    found = coded_choice.new_sums(s.num_heads, query_tiles, num_tiles, DEVICE)
    coded_choice.sum_tiles(q_QNW, keys, place_S, found)
    sums = found.transpose(3, 4).reshape(expected.shape)
    if len(place_S) > 32:
        assert torch.equal(sums, expected)
    else:  # so few queries Triton multiplies by other instructions, which add up in another order
        torch.testing.assert_close(sums, expected, atol=0, rtol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="CUDA")
@pytest.mark.parametrize(
    ("num", "fewer", "tiles"), [(1, 1, 40), (7, 3, 40), (146, 49, 700), (30, 10, 31), (1097, 366, 1865)]
)
def test_cuda_lists_the_heaviest_and_of_equal_ones_the_first(num: int, fewer: int, tiles: int) -> None:
    """As `test_the_heaviest_are_listed_in_rising_order_and_of_equal_ones_the_first`, whose shares are exact."""
    from workers.attention.coded_choice import list_heaviest
    from workers.attention.triton_choice import write_heaviest

    generator = torch.Generator().manual_seed(tiles)
    sums = 2.0 ** torch.randint(0, 4, (2, 3 * 8, tiles), generator=generator)
    sums[..., 0] += 2.0 ** (10 + sums[..., 1:].sum(-1).log2().ceil()) - sums.sum(-1)
    sums[1] = 0
    sums, may = sums.to(DEVICE), torch.ones(tiles, dtype=torch.int32, device=DEVICE)
    may[5] = 0
    by_half = sums.unflatten(1, (3, 2, 4)).transpose(3, 4).contiguous()
    for counts in ((num,), (num, fewer)):
        found, expected = (
            [torch.full((2, 3, n + 1), -7, dtype=torch.int32, device=DEVICE) for n in counts] for _ in range(2)
        )
        list_heaviest(by_half, may, 1, *found)
        write_heaviest(sums, may, 1, *expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="CUDA")
def test_what_is_no_number_fills_no_list_of_cuda_beyond_its_end() -> None:
    from workers.attention.coded_choice import list_heaviest

    sums, may = torch.full((1, 1, 2, 40, 4), torch.nan, device=DEVICE), torch.ones(40, dtype=torch.int32, device=DEVICE)
    found = torch.full((1, 1, 9), -7, dtype=torch.int32, device=DEVICE)
    list_heaviest(sums, may, 4, found)
    assert found.flatten().tolist() == [0, 1, 2, 3, 4, -7, -7, -7, -7]

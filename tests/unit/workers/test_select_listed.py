"""Who reads a tile table on which hardware, and plain torch against the reference."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import pytest
import torch

from tests.tables import draw_listed
from workers import assemble_tiles
from workers.assemble_tiles import choose_ways, say_fp8
from workers.config import KernelName, RenderConfig
from workers.errors import KernelUnavailable
from workers.kernels import listed_tiles
from workers.kernels.listed_gather import attend_gathered_lse
from workers.kernels.listed_tiles import AttendTable, attend_listed_plain_lse
from workers.kernels.select import Hardware, KernelNeed
from workers.kernels.select_listed import Load, choose_listed
from workers.search.nearest_rows import nearest_rows

CPU, TURING, AMPERE, HOPPER, BLACKWELL = (
    Hardware("cpu"),
    *(Hardware("cuda", compute) for compute in ((7, 5), (8, 0), (9, 0), (10, 0))),
)
WAN, WORLD = KernelNeed(torch.bfloat16, 128), KernelNeed(torch.float32, 64)


def with_packages(*missing: str) -> Load:
    def load(name: KernelName, tile: int) -> AttendTable:
        if name in missing:
            raise ImportError(f"No module named {name!r}")
        return lambda q, k, v, index: q

    return load


@pytest.mark.parametrize(
    ("hardware", "need", "tile", "missing", "expected"),
    [
        (HOPPER, WAN, 128, (), "flash-attn-4"),
        (HOPPER, WAN, 128, ("flash-attn-4",), "triton"),
        (HOPPER, WAN, 64, (), "triton"),
        (HOPPER, WORLD, 128, (), "triton"),
        (HOPPER, WAN, 128, ("flash-attn-4", "triton"), "reference"),
        (BLACKWELL, WAN, 128, (), "triton"),
        (AMPERE, WAN, 128, (), "triton"),
        (TURING, WAN, 128, (), "reference"),
        (CPU, WORLD, 8, (), "reference"),
    ],
)
def test_auto_falls_back_by_capability(
    hardware: Hardware, need: KernelNeed, tile: int, missing: tuple[str, ...], expected: str
) -> None:
    choice = choose_listed("auto", hardware, need, tile, with_packages(*missing))
    assert choice.name == expected
    assert all(f"not {name}: " in choice.line for name, _ in choice.refused)


@pytest.mark.parametrize(
    ("name", "hardware", "tile", "reason"),
    [
        ("flash-attn-4", AMPERE, 128, r"compute capability 9.0 to 11.9, this GPU has 8.0"),
        ("flash-attn-4", HOPPER, 32, r"its tiles hold 128 keys, those of cache.tile 32"),
        ("triton", CPU, 128, r"on cuda, not on cpu"),
    ],
)
def test_a_name_that_cannot_run_is_refused(name: KernelName, hardware: Hardware, tile: int, reason: str) -> None:
    with pytest.raises(KernelUnavailable, match=rf"kernel.name: '{name}' cannot read a tile table here: .*{reason}"):
        choose_listed(name, hardware, WAN, tile, with_packages())


@pytest.mark.parametrize(("hardware", "mode"), [(CPU, "cpu has no CUDA graphs"), (TURING, "captured as CUDA graphs")])
def test_what_runs_is_said_in_one_line(hardware: Hardware, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ways = choose_ways(RenderConfig(policy="fastar-tiles"), hardware, WAN, 128)
    (line,) = [record.getMessage() for record in caplog.records]
    assert mode in line
    assert "chunks taken over by plain torch: " in line
    assert "not flash-attn-4: " in line
    assert "not triton: " in line
    assert ways.graphs == (hardware.device_type == "cuda")


@pytest.mark.parametrize(
    ("hardware", "level", "message"),
    [
        (CPU, logging.WARNING, r"backbone\.fp8: large: cpu has no products .* slower here than backbone\.fp8: none"),
        (AMPERE, logging.WARNING, r"compute capability 8\.0 has no products .*\(they need compute capability 8\.9"),
        (HOPPER, logging.INFO, r"backbone\.fp8: large: these linear layers are products of 8-bit floats"),
    ],
)
def test_whether_8_bit_floats_are_faster_here_is_said_in_one_line(
    hardware: Hardware, level: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        say_fp8("large", hardware)
        say_fp8("none", hardware)
    (record,) = caplog.records
    assert record.levelno == level
    assert re.search(message, record.getMessage())


@pytest.mark.parametrize("num_queries", [48, 37])
def test_gathering_listed_tiles_is_the_reference(num_queries: int) -> None:
    tile, heads, dim, tiles, listed = 8, 3, 12, 9, 4
    empty = slice(tile, tile + 5)
    q, k, v, index = draw_listed((num_queries, heads, dim), tile, tiles, listed, most_mass=5.0, empty=empty)
    found, expected = attend_gathered_lse(q, k, v, index, tile), attend_listed_plain_lse(q, k, v, index, tile)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    logit = torch.einsum("qnw,nkw->qnk", q, k) / math.sqrt(dim)
    seen = torch.zeros(heads, -(-num_queries // tile), tiles).scatter_(2, index.long(), 1).repeat_interleave(tile, 2)
    of_queries = seen.repeat_interleave(tile, 1)[:, :num_queries].transpose(0, 1)
    torch.testing.assert_close(expected[1], logit.masked_fill(of_queries == 0, -torch.inf).logsumexp(-1))


@pytest.mark.parametrize(
    ("hardware", "need", "tile", "fields", "reason"),
    [
        (CPU, WAN, 128, {}, "for cuda, not for cpu"),
        (TURING, WAN, 128, {}, "as attention is"),
        (HOPPER, WORLD, 8, {}, "a tile of 16, 32, 64 or 128, not 64 and 8"),
        (HOPPER, KernelNeed(torch.bfloat16, 40), 128, {}, "not 40 and 128"),
        (HOPPER, WAN, 128, {"attention": {"keys_per_tile": 12}}, "not 12 and 8"),
        (HOPPER, WAN, 128, {"cache": {"candidate_tiles": None}}, r"cache\.candidate_tiles"),
        (HOPPER, WAN, 128, {}, ""),
    ],
)
def test_a_tables_own_kernels_run_where_they_can(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    hardware: Hardware,
    need: KernelNeed,
    tile: int,
    fields: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr(assemble_tiles, "choose_listed", lambda *args: choose_listed(*args, with_packages()))
    monkeypatch.setattr(assemble_tiles, "make_triton_nearest_rows", lambda: nearest_rows)
    monkeypatch.setattr(assemble_tiles.importlib.util, "find_spec", lambda name: name)
    config = RenderConfig.model_validate({"policy": "fastar-tiles", **fields})
    with caplog.at_level(logging.INFO):
        ways = choose_ways(config, hardware, need, tile)
    assert ways.kernels == (reason == "")
    assert re.search(reason or "taken over by kernels of its own", caplog.text)


@pytest.mark.parametrize(("capability", "tile", "expected"), [((9, 0), 128, 1), ((8, 0), 128, 0), ((9, 0), 8, 0)])
def test_triton_on_hopper_is_the_kernel_made_for_tables(
    capability: tuple[int, int], tile: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for which, name in enumerate(("_make_triton", "_make_hopper")):
        monkeypatch.setattr(listed_tiles, name, lambda tile, which=which: made.append(which))
    listed_tiles.make_attend("triton", tile)
    assert made == [expected]

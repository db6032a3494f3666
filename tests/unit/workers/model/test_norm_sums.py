"""What norm_sums.cu computes, step by step, beside the plain norm; and the sums that are written into its source."""

import re

import pytest
import torch
from torch import Tensor

from workers.model.norm_sums import choose_programs, make_source, norm_sums_plain, takes
from workers.model.wan_fast_decode import _norm_into
from workers.model.winograd import FOUR, PAIR, Winograd, transform_frames

WAYS = pytest.mark.parametrize("way", [PAIR, FOUR], ids=["pair", "four"])


@WAYS
@pytest.mark.parametrize("num", [1, 2, 5])
@pytest.mark.parametrize("has_before", [False, True])
def test_norms_are_those_of_the_decoder_but_rounded_once(way: Winograd, num: int, has_before: bool) -> None:
    torch.manual_seed(0)
    x, gamma = torch.randn(num, 3, 4, 96).bfloat16(), torch.randn(96).bfloat16()
    x[0, 0, 0] = 0.0
    before = torch.randn(2, 3, 4, 96).half() if has_before else None
    exact = torch.empty(x.shape)
    _norm_into(exact, x.float(), gamma.float(), silu=True)
    sums, last = norm_sums_plain(x, before, gamma, way)
    frames = torch.cat((torch.zeros(2, 3, 4, 96).half() if before is None else before, exact.half()))
    torch.testing.assert_close(last, frames[-2:], rtol=2**-10, atol=1e-7)
    torch.testing.assert_close(sums, transform_frames(before, exact.half(), way), rtol=4e-3, atol=4e-3)
    rounded = torch.empty_like(x)
    _norm_into(rounded, x, gamma, silu=True)
    assert (frames[2:].float() - exact).std() < 0.2 * (rounded.float() - exact).std()


@WAYS
def test_calls_of_whole_groups_make_what_one_call_makes(way: Winograd) -> None:
    torch.manual_seed(1)
    x, gamma = torch.randn(2 * way.num, 2, 3, 32).bfloat16(), torch.randn(32).bfloat16()
    first, before = norm_sums_plain(x[: way.num], None, gamma, way)
    second, last = norm_sums_plain(x[way.num :], before, gamma, way)
    whole, whole_last = norm_sums_plain(x, None, gamma, way)
    assert torch.equal(torch.cat((first, second)), whole)
    assert torch.equal(last, whole_last)


def read_factors(text: str, taps: int) -> Tensor:
    """Of a written sum of frames, by frame."""
    row = torch.zeros(taps, dtype=torch.float64)
    for factor, frame in re.findall(r"(?:(-?[\d.]+)f(?:, |\) \* ))?d\((\d)\)", text):
        row[int(frame)] += float(factor or 1.0)
    return row


@WAYS
def test_the_source_adds_up_as_the_way_says(way: Winograd) -> None:
    source = make_source(96, way, choose_programs(way))
    rows = []
    for pair in range(len(way.points)):
        found = re.search(rf"float even{pair} = (.*), odd{pair} = (.*);", source)
        assert found is not None
        even, odd = (read_factors(text, way.taps) for text in found.groups())
        assert f"s[{2 * pair}] = even{pair} + odd{pair}, s[{2 * pair + 1}] = even{pair} - odd{pair};" in source
        rows += [even + odd, even - odd]
    texts = re.findall(r" s\[\d\] = (.*d\(.*);", source)
    rows += [read_factors(text, way.taps) for text in texts]
    torch.testing.assert_close(torch.stack(rows), torch.tensor(way.frames, dtype=torch.float64))
    for definition in (f"NUM {way.num}", f"TAPS {way.taps}", "VECTORS 3"):
        assert f"#define {definition}\n" in source


def test_channels_are_a_power_of_two_or_three_times_one() -> None:
    assert all(map(takes, (12, 24, 32, 48, 64, 96, 128, 192, 256, 384)))
    assert not any(map(takes, (6, 8 * 5, 100, 160, 768, 1024)))

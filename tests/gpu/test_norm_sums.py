"""Norms and sums of frames by norm_sums.cu, beside the same in float64."""

import pytest
import torch
from torch import Tensor

from workers.model.norm_sums import Programs, norm_sums, norm_sums_plain
from workers.model.winograd import FOUR, PAIR, Winograd, transform_frames

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs compute capability 9.0",
    ),
]
WAYS = pytest.mark.parametrize("way", [PAIR, FOUR], ids=["pair", "four"])
EXACT = {"rtol": 2**-10, "atol": 2e-6}
"""One step of float16: what float32 rounds may have it rounded the other way. Near zero what float32 leaves."""


def draw(*size: int) -> Tensor:
    return torch.randn(size, device="cuda").bfloat16()


def norm_each(x_THWC: Tensor, gamma_C: Tensor, way: Winograd) -> Tensor:
    """Normed frames as the kernel has them, one by one."""
    return torch.cat([norm_sums(frame[None], None, gamma_C, way)[1][1:] for frame in x_THWC])


@WAYS
@pytest.mark.parametrize("channels", [32, 96, 192, 384])
@pytest.mark.parametrize("num", range(1, 10))
@pytest.mark.parametrize("has_before", [False, True])
def test_sums_of_normed_frames(way: Winograd, channels: int, num: int, has_before: bool) -> None:
    torch.manual_seed(num)
    x, gamma = draw(num, 7, 13, channels) * 3.0, draw(channels)
    x[0, 0, 0] = 0.0
    before = draw(2, 7, 13, channels).half() if has_before else None
    sums, last = norm_sums(x, before, gamma, way)
    frames = norm_each(x, gamma, way)
    _, exact = norm_sums_plain(x.double(), before, gamma, way)
    torch.testing.assert_close(last, exact, **EXACT)
    window = torch.cat((torch.zeros_like(frames[:1]).repeat(2, 1, 1, 1) if before is None else before, frames))
    assert torch.equal(last, window[-2:])
    torch.testing.assert_close(sums, transform_frames(before, frames, way), rtol=2**-10, atol=2e-5)
    assert torch.equal(sums, norm_sums(x, before, gamma, way)[0])


@WAYS
@pytest.mark.parametrize("channels", [96, 384])
@pytest.mark.parametrize("how", [Programs(64, 4), Programs(256, 3)])
def test_how_work_is_cut_changes_nothing(way: Winograd, channels: int, how: Programs) -> None:
    torch.manual_seed(0)
    x, gamma, before = draw(9, 11, 31, channels), draw(channels), draw(2, 11, 31, channels).half()
    for found, expected in zip(norm_sums(x, before, gamma, way, how), norm_sums(x, before, gamma, way), strict=True):
        assert torch.equal(found, expected)


@WAYS
@pytest.mark.parametrize("channels", [96, 192, 384])
def test_calls_of_whole_groups_make_what_one_call_makes(way: Winograd, channels: int) -> None:
    torch.manual_seed(1)
    x, gamma = draw(4 * way.num - 1, 9, 17, channels), draw(channels)
    whole, whole_last = norm_sums(x, None, gamma, way)
    parts, before = [], None
    for piece in (x[: way.num], x[way.num : 3 * way.num], x[3 * way.num :]):
        sums, before = norm_sums(piece, before, gamma, way)
        parts.append(sums)
    assert torch.equal(torch.cat(parts), whole)
    assert before is not None
    assert torch.equal(before, whole_last)


@WAYS
def test_an_infinite_power_leaves_nothing(way: Winograd) -> None:
    x = torch.full((4, 1, 2, 96), -1.0, device="cuda").bfloat16()
    sums, last = norm_sums(x, None, torch.full((96,), 1000.0, device="cuda").bfloat16(), way)
    assert not sums.any()
    assert not last.any()

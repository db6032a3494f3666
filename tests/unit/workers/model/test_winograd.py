"""Several frames at once by fewer products: the algebra, what it rounds, and when it is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.halo_conv import make_source
from workers.model.winograd import (
    FOUR,
    PAIR,
    Winograd,
    choose_cut,
    choose_way,
    convolve_plain,
    fits,
    pack_products,
    transform_frames,
    transform_weight,
)

ways = pytest.mark.parametrize("way", [PAIR, FOUR], ids=["pair", "four"])


def exact(before: Tensor | None, new: Tensor, weight: Tensor) -> Tensor:
    frames = torch.cat((torch.zeros_like(new[:1]).repeat(2, 1, 1, 1) if before is None else before, new))
    return F.conv3d(F.pad(frames.double().movedim(-1, 0)[None], (1, 1, 1, 1)), weight.double())[0].movedim(0, -1)


@ways
def test_products_of_sums_are_the_convolution_in_time(way: Winograd) -> None:
    frames, weights, results = (torch.tensor(rows).double() for rows in (way.frames, way.weights, way.results))
    made = torch.einsum("kp,pf,pt->kft", results, frames, weights)
    expected = torch.zeros(way.num, way.taps, 3, dtype=torch.float64)
    for frame in range(way.num):
        expected[frame, frame : frame + 3] = torch.eye(3)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)


@ways
@pytest.mark.parametrize("num", [1, 2, 5, 8])
@pytest.mark.parametrize("has_before", [False, True])
def test_results_are_those_of_a_causal_convolution(way: Winograd, num: int, has_before: bool) -> None:
    torch.manual_seed(0)
    before = F.silu(torch.randn(2, 6, 7, 32)).half() if has_before else None
    new, weight = F.silu(torch.randn(num, 6, 7, 32)).half(), (torch.randn(8, 32, 3, 3, 3) / 30).bfloat16()
    expected = exact(before, new, weight)
    found = convolve_plain(transform_frames(before, new, way), transform_weight(weight, way), num, way)
    assert found.shape == expected.shape
    error = float((found - expected).std() / expected.std())
    rounding = float((expected.bfloat16() - expected).std() / expected.std())
    assert error < 0.4 * rounding  # of the result to bfloat16, which follows


def test_whole_numbers_come_out_of_pairs_as_they_are() -> None:
    torch.manual_seed(1)
    new, weight = torch.randint(-9, 10, (4, 5, 5, 32)).float(), 2.0 * torch.randint(-3, 4, (8, 32, 3, 3, 3))
    found = convolve_plain(transform_frames(None, new, PAIR), transform_weight(weight, PAIR), 4, PAIR)
    assert torch.equal(found.double(), exact(None, new, weight))


@ways
def test_pieces_of_whole_groups_make_what_the_whole_makes(way: Winograd) -> None:
    torch.manual_seed(2)
    new = torch.randn(8, 3, 3, 32).half()
    first, second = transform_frames(None, new[:4], way), transform_frames(new[2:4], new[4:], way)
    assert torch.equal(torch.cat((first, second)), transform_frames(None, new, way))


def test_norms_whose_sums_may_leave_float16_are_refused() -> None:
    gamma = torch.ones(384)
    assert fits(gamma, PAIR)
    assert fits(gamma, FOUR)
    gamma[7] = -1000.0
    assert fits(gamma, PAIR)
    assert not fits(gamma, FOUR)
    gamma[7] = 1600.0
    assert not fits(gamma, PAIR)


def test_a_way_is_there_for_two_and_four_frames() -> None:
    assert [choose_way(num) for num in (1, 2, 3, 4)] == [None, PAIR, None, FOUR]
    assert (PAIR.num, PAIR.taps, FOUR.num, FOUR.taps) == (2, 4, 4, 6)


@ways
@pytest.mark.parametrize("channels_out", [96, 192, 384])
def test_weights_are_packed_by_product_and_multiplied_in_float16(way: Winograd, channels_out: int) -> None:
    weight = torch.randn(channels_out, 64, 3, 3, 3)
    cut = choose_cut(channels_out, way)
    packed = pack_products(weight, cut, way)
    assert packed.shape == (channels_out // cut.channels, way.taps, 2, 3, 3, cut.channels, 32)
    assert packed.dtype == torch.float16
    image = packed[0, -2, 0, 1, 1]  # the first weights in time, in the middle of a picture
    assert torch.equal(image[0], weight[0, :32, 0, 1, 1].half())
    source = make_source(64, channels_out, cut, frames=way.num)
    assert "f32.f16.f16" in source
    assert f"#define FRAMES {way.num}\n" in source
    assert way.num * cut.rows * cut.columns // 256 * cut.channels <= 192  # totals of a thread

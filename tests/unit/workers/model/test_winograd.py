"""Two frames by four products: the algebra, what it rounds, and when it is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.halo_conv import make_source
from workers.model.pair_conv import (
    choose_cut,
    convolve_plain,
    fits,
    pack_pairs,
    transform_frames,
    transform_weight,
)


def exact(before: Tensor | None, new: Tensor, weight: Tensor) -> Tensor:
    frames = torch.cat((torch.zeros_like(new[:1]).repeat(2, 1, 1, 1) if before is None else before, new))
    return F.conv3d(F.pad(frames.double().movedim(-1, 0)[None], (1, 1, 1, 1)), weight.double())[0].movedim(0, -1)


@pytest.mark.parametrize("num", [1, 2, 5, 6])
@pytest.mark.parametrize("has_before", [False, True])
def test_results_are_those_of_a_causal_convolution(num: int, has_before: bool) -> None:
    torch.manual_seed(0)
    before = torch.randn(2, 6, 7, 32).bfloat16() if has_before else None
    new, weight = torch.randn(num, 6, 7, 32).bfloat16(), (torch.randn(8, 32, 3, 3, 3) / 30).bfloat16()
    expected = exact(before, new, weight)
    found = convolve_plain(transform_frames(before, new), transform_weight(weight), num)
    assert found.shape == expected.shape
    error = float((found - expected).std() / expected.std())
    rounding = float((expected.bfloat16() - expected).std() / expected.std())
    assert error < 0.4 * rounding  # of the result to bfloat16, which follows


def test_whole_numbers_come_out_as_they_are() -> None:
    torch.manual_seed(1)
    new, weight = torch.randint(-9, 10, (4, 5, 5, 32)).float(), 2.0 * torch.randint(-3, 4, (8, 32, 3, 3, 3))
    found = convolve_plain(transform_frames(None, new), transform_weight(weight), 4)
    assert torch.equal(found.double(), exact(None, new, weight))


def test_pieces_of_even_length_make_what_the_whole_makes() -> None:
    torch.manual_seed(2)
    new = torch.randn(8, 3, 3, 32).bfloat16()
    first, second = transform_frames(None, new[:4]), transform_frames(new[2:4], new[4:])
    assert torch.equal(torch.cat((first, second)), transform_frames(None, new))


def test_norms_whose_sums_may_leave_float16_are_refused() -> None:
    gamma = torch.ones(384)
    assert fits(gamma)
    gamma[7] = -1600.0
    assert not fits(gamma)


def test_weights_are_packed_by_input_in_time_and_multiplied_in_float16() -> None:
    weight = torch.randn(192, 64, 3, 3, 3)
    cut = choose_cut(192)
    packed = pack_pairs(weight, cut)
    assert packed.shape == (192 // cut.channels, 4, 2, 3, 3, cut.channels, 32)
    assert packed.dtype == torch.float16
    image = packed[0, 2, 0, 1, 1]  # the first weights in time, in the middle of a picture
    assert torch.equal(image[0], weight[0, :32, 0, 1, 1].half())
    source = make_source(64, 192, cut, pairs=True)
    assert "f32.f16.f16" in source
    assert "#define PAIRS 1\n" in source
    assert cut.rows * cut.columns // 128 * cut.channels <= 192  # totals of a thread, of both frames

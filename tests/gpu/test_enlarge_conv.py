"""Enlargements and doublings by CUDA against plain ones in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.enlarge_conv import Cut, choose_cut, double_frames, enlarge_pictures, pack_phases
from workers.model.wan_decode_weights import fold_enlargement

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9.0")]
ROUNDED = 2e-2
"""Results and folded weights are rounded to bfloat16."""


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


ENLARGED = [
    None,
    Cut(96, 16, 16, 32, 3, 4),
    Cut(96, 24, 16, 32, 3, 6),
    Cut(192, 8, 16, 64, 3, 3),
    Cut(192, 16, 16, 32, 3, 4),
    Cut(192, 16, 8, 32, 4, 6),
]


@pytest.mark.parametrize("cut", ENLARGED)
@pytest.mark.parametrize(("channels", "out_channels"), [(64, 96), (192, 96), (384, 192)])
@pytest.mark.parametrize("size", [(2, 9, 19), (1, 33, 45), (7, 24, 16)])
def test_an_enlargement_is_a_convolution_of_the_enlarged_picture(
    size: tuple[int, int, int], channels: int, out_channels: int, cut: Cut | None
) -> None:
    cut = cut or choose_cut(channels, out_channels)
    if out_channels % cut.channels:
        pytest.skip("a tile of more channels than there are")
    torch.manual_seed(1)
    weight, bias = draw(out_channels, channels, 3, 3) / (9 * channels) ** 0.5, draw(out_channels)
    x, packed = draw(*size, channels), pack_phases(fold_enlargement(weight)[:, :, None], cut)
    out = enlarge_pictures(x, packed, bias.repeat(4), cut)
    large = F.interpolate(x.movedim(-1, 1).double(), scale_factor=2.0, mode="nearest-exact")
    exact = F.conv2d(large, weight.double(), bias.double(), padding=1).movedim(1, -1)
    torch.testing.assert_close(out.double(), exact, atol=ROUNDED, rtol=ROUNDED)
    assert torch.equal(out, enlarge_pictures(x, packed, bias.repeat(4), cut))


@pytest.mark.parametrize("cut", [None, Cut(192, 16, 16, 64, 3, 4), Cut(96, 24, 16, 32, 3, 6), Cut(96, 16, 16, 64)])
@pytest.mark.parametrize("has_before", [False, True])
@pytest.mark.parametrize("num", [1, 3])
def test_frames_are_doubled_causally(num: int, has_before: bool, cut: Cut | None) -> None:
    torch.manual_seed(2)
    channels, height, width = 192, 9, 21
    cut = cut or choose_cut(channels, channels, doubled=True)
    weight, bias = draw(2 * channels, channels, 3, 1, 1) / (3 * channels) ** 0.5, draw(2 * channels)
    before, new = draw(2, height, width, channels) if has_before else None, draw(num, height, width, channels)
    packed = pack_phases(weight, cut)
    out = double_frames(before, new, packed, bias, cut)
    frames = torch.cat((new.new_zeros(2, *new.shape[1:]) if before is None else before, new)).movedim(-1, 0)[None]
    pairs = F.conv3d(frames.double(), weight.double(), bias.double())[0].movedim(0, -1).unflatten(-1, (2, channels))
    exact = pairs.movedim(-2, 1).flatten(0, 1)
    torch.testing.assert_close(out.double(), exact, atol=ROUNDED, rtol=ROUNDED)
    assert torch.equal(out, double_frames(before, new, packed, bias, cut))

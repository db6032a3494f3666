"""A causal convolution over time by sums and differences of frames: four products for two frames instead of six.

Frames d0, d1 before a pair d2, d3 make its two results y0 = d0 g0 + d1 g1 + d2 g2 and y1 = d1 g0 + d2 g1 + d3 g2, where
g0, g1, g2 are the 3x3 weights of each time. With sums and differences (Winograd's F(2, 3), arXiv 1509.09308, section 4)

    A = (d1 + d2) (g0 + g1 + g2) / 2,   B = (d2 - d1) (g0 - g1 + g2) / 2,
    y0 = A + B + (d0 - d2) g0,          y1 = A - B - (d1 - d3) g2.

Sums and differences of bfloat16 are rounded to float16, whose last bit is eight times as fine, and so are weights: next
to rounding the result to bfloat16 that is nothing. halo_conv.cu multiplies; fused_pairs.py writes its inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.halo_conv import Cut, launch_cut, pack_weight

TAPS = 4
"""Inputs in time of a pair of frames."""
_MOST = 60_000.0
"""float16 ends at 65,504."""


def fits(gamma_C: Tensor) -> bool:
    """Whether sums of two frames stay within float16 where these come of a norm with such weights; waits for them."""
    most: float = 2.0 * len(gamma_C) ** 0.5 * float(gamma_C.abs().max())
    return most < _MOST


def choose_cut(channels_out: int) -> Cut:
    # Measured on an H200 (wan_conv-h200): as if 1,000 TFLOP/s at 96 channels, 1,110 at 192, 1,130 at 384.
    return Cut(192, rows=8, slots_a=4, slots_b=4) if channels_out % 384 == 0 else Cut(96, rows=8, columns=32)


def transform_weight(weight_OITHW: Tensor) -> Tensor:
    """[O, I, 4, H, W] in float16, in the order of `transform_frames`."""
    first, middle, last = weight_OITHW.float().unbind(2)
    both = first + last
    return torch.stack(((both + middle) / 2, (both - middle) / 2, first, -last), 2).half()


def pack_pairs(weight_OITHW: Tensor, cut: Cut) -> Tensor:
    """As halo_conv.cu reads them."""
    return pack_weight(transform_weight(weight_OITHW), cut.channels)


def transform_frames(before_THWC: Tensor | None, new_THWC: Tensor) -> Tensor:
    """Of each pair d1 + d2, d2 - d1, d0 - d2, d1 - d3: [4 * pairs, H, W, C], float16; the reference of fused_pairs.py.

    Args:
        before_THWC: The two frames before; None: zeros.
        new_THWC: Any number; where it is odd, zeros end the last pair.
    """
    frames = torch.zeros_like(new_THWC[:1]).repeat(2 + len(new_THWC) + len(new_THWC) % 2, 1, 1, 1).float()
    if before_THWC is not None:
        frames[:2] = before_THWC
    frames[2 : 2 + len(new_THWC)] = new_THWC
    d0, d1, d2, d3 = (frames[start : len(frames) - 3 + start : 2] for start in range(4))
    return torch.stack((d1 + d2, d2 - d1, d0 - d2, d1 - d3), 1).flatten(0, 1).half()


def convolve_plain(inputs_VHWC: Tensor, weight_OIVHW: Tensor, num: int) -> Tensor:
    """Results [num, H, W, O] in float32 of what `transform_frames` and `transform_weight` made, by plain torch."""
    pairs = inputs_VHWC.float().movedim(-1, 1).unflatten(0, (-1, TAPS))
    a, b, c, d = (
        F.conv2d(pairs[:, tap], weight_OIVHW[:, :, tap].float(), padding=weight_OIVHW.shape[3] // 2)
        for tap in range(TAPS)
    )
    return torch.stack((a + b + c, a - b + d), 1).flatten(0, 1)[:num].movedim(1, -1)


def convolve(
    inputs_VHWC: Tensor,
    num: int,
    packed: Tensor,
    bias_O: Tensor,
    beside_THWC: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """Result [num, H, W, O] in bfloat16, plus `beside` if given; pictures are bordered by zeros.

    Args:
        inputs_VHWC: `transform_frames`, float16.
        num: Frames of the result.
        packed: `pack_pairs` for the cut.
        bias_O: Of the convolution, bfloat16.
        beside_THWC: In the shape of the result, bfloat16, which it is added to after rounding.
        cut: How to do it if not as `choose_cut` says. All tensors are contiguous.
    """
    cut = cut or choose_cut(len(bias_O))
    count, height, width, channels = inputs_VHWC.shape
    assert count == TAPS * -(-num // 2)
    assert inputs_VHWC.dtype == packed.dtype == torch.float16
    assert packed.shape == (len(bias_O) // cut.channels, TAPS, channels // 32, 3, 3, cut.channels, 32)
    out = bias_O.new_empty((num, height, width, len(bias_O)))
    assert beside_THWC is None or beside_THWC.shape == out.shape
    for given in (inputs_VHWC, packed):
        assert given.is_contiguous()
    for of_result in (bias_O, beside_THWC):
        assert of_result is None or (of_result.is_contiguous() and of_result.dtype == torch.bfloat16)
    launch_cut(cut, (None, inputs_VHWC, inputs_VHWC), packed, bias_O, beside_THWC, out, pairs=True)
    return out

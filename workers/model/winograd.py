"""Causal convolutions over time for several frames at once, by fewer products (Winograd, arXiv 1509.09308, section 4).

Two frames before a group of m and the group itself, d0 to d(m+1), make its m results from m + 2 products with sums of
frames, where one by one they take 3 m: two thirds for a pair, half for four frames. What a product takes at point x:

    frames by the coefficients of the polynomial whose roots are the other points, weights g0 + x g1 + x^2 g2,

divided by that polynomial at x; at infinity by all points, and g2. Result k is the sum of products times x^k.

Sums are rounded to float16, whose last bit is eight times as fine as bfloat16's, and so are weights. For a pair, points
are 1, -1, 0 and infinity. For four frames they are at roots of 1/2 and of 2, whose sums are the least apart in size:
that rounds half as much as with the usual 1 and 2, a third of rounding the result to bfloat16 (test_winograd.py).
halo_conv.cu multiplies; norm_sums.cu writes its inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.halo_conv import Cut, launch_cut, pack_weight

_MOST = 60_000.0
"""float16 ends at 65,504."""
_ROOT = 0.5**0.5

Rows = tuple[tuple[float, ...], ...]


class Winograd(NamedTuple):
    """F(m, 3). Products that count in every result stand first, in pairs x and -x; the last two are 0 and infinity."""

    points: tuple[float, ...]
    """Those above zero."""
    frames: Rows
    """What each product takes of the two frames before and of the group."""
    weights: Rows
    """What it takes of the three weights in time."""

    @property
    def num(self) -> int:
        """Frames of a group."""
        return len(self.frames) - 2

    @property
    def taps(self) -> int:
        """Products of a group."""
        return len(self.frames)

    @property
    def results(self) -> Rows:
        """What each frame's result takes of the products."""
        last = self.num - 1
        return tuple(
            (*(sign * x**k for x in self.points for sign in (1.0, (-1.0) ** k)), float(k == 0), float(k == last))
            for k in range(self.num)
        )


PAIR = Winograd(
    (1.0,),
    ((0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (1.0, 0.0, -1.0, 0.0), (0.0, -1.0, 0.0, 1.0)),
    ((0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)),
)
FOUR = Winograd(
    (_ROOT, 2.0 * _ROOT),
    (
        (0.0, -2.0 * _ROOT, -2.0, _ROOT, 1.0, 0.0),
        (0.0, 2.0 * _ROOT, -2.0, -_ROOT, 1.0, 0.0),
        (0.0, -_ROOT, -0.5, 2.0 * _ROOT, 1.0, 0.0),
        (0.0, _ROOT, -0.5, -2.0 * _ROOT, 1.0, 0.0),
        (1.0, 0.0, -2.5, 0.0, 1.0, 0.0),
        (0.0, 1.0, 0.0, -2.5, 0.0, 1.0),
    ),
    (
        (-2.0 / 3.0, -2.0 / 3.0 * _ROOT, -1.0 / 3.0),
        (-2.0 / 3.0, 2.0 / 3.0 * _ROOT, -1.0 / 3.0),
        (1.0 / 6.0, 1.0 / 3.0 * _ROOT, 1.0 / 3.0),
        (1.0 / 6.0, -1.0 / 3.0 * _ROOT, 1.0 / 3.0),
        (1.0, 0.0, 0.0),
        (0.0, 0.0, 1.0),
    ),
)


def choose_way(num_frames: int) -> Winograd | None:
    """For as many frames at once; None: one by one."""
    return {2: PAIR, 4: FOUR}.get(num_frames)


def fits(gamma_C: Tensor, way: Winograd) -> bool:
    """Whether sums of frames stay within float16 where these come of a norm with such weights; waits for them."""
    most: float = len(gamma_C) ** 0.5 * float(gamma_C.abs().max())
    return most * max(sum(map(abs, row)) for row in way.frames) < _MOST


def choose_cut(channels_out: int, way: Winograd) -> Cut:
    """Measured on an H200: fours as if at 1,250 and 1,450 TFLOP/s at 96 and 192 channels, pairs at 1,240 at 384."""
    if way is FOUR:
        return Cut(96, rows=8, slots_a=4, slots_b=6)
    return Cut(192, rows=8, slots_a=4, slots_b=3) if channels_out % 384 == 0 else Cut(96, rows=8, columns=32, slots_b=5)


def transform_weight(weight_OITHW: Tensor, way: Winograd) -> Tensor:
    """[O, I, taps, H, W] in float16."""
    rows = torch.tensor(way.weights, dtype=torch.float64, device=weight_OITHW.device)
    return torch.einsum("oithw,pt->oiphw", weight_OITHW.double(), rows).half()


def pack_products(weight_OITHW: Tensor, cut: Cut, way: Winograd) -> Tensor:
    """As halo_conv.cu reads them."""
    return pack_weight(transform_weight(weight_OITHW, way), cut.channels)


def transform_frames(before_THWC: Tensor | None, new_THWC: Tensor, way: Winograd) -> Tensor:
    """Sums of frames of each group, [taps * groups, H, W, C], float16; the reference of norm_sums.cu.

    Args:
        before_THWC: The two frames before; None: zeros.
        new_THWC: Any number; where the last group is not full, zeros follow.
    """
    groups = -(-len(new_THWC) // way.num)
    frames = torch.zeros_like(new_THWC[:1]).repeat(2 + groups * way.num, 1, 1, 1).float()
    if before_THWC is not None:
        frames[:2] = before_THWC
    frames[2 : 2 + len(new_THWC)] = new_THWC
    rows = torch.tensor(way.frames, device=frames.device)
    return torch.einsum("ghwcf,pf->gphwc", frames.unfold(0, way.taps, way.num), rows).flatten(0, 1).half()


def convolve_plain(inputs_VHWC: Tensor, weight_OIVHW: Tensor, num: int, way: Winograd) -> Tensor:
    """Results [num, H, W, O] in float32 of what `transform_frames` and `transform_weight` made, by plain torch."""
    groups = inputs_VHWC.float().movedim(-1, 1).unflatten(0, (-1, way.taps))
    products = torch.stack(
        [
            F.conv2d(groups[:, tap], weight_OIVHW[:, :, tap].float(), padding=weight_OIVHW.shape[3] // 2)
            for tap in range(way.taps)
        ]
    )
    rows = torch.tensor(way.results, device=products.device)
    return torch.einsum("pgohw,kp->gkhwo", products, rows).flatten(0, 1)[:num]


def convolve(
    inputs_VHWC: Tensor,
    num: int,
    packed: Tensor,
    bias_O: Tensor,
    way: Winograd,
    beside_THWC: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """Result [num, H, W, O] in bfloat16, added to `beside` in place if given; pictures are bordered by zeros.

    Args:
        inputs_VHWC: `transform_frames`, float16.
        num: Frames of the result.
        packed: `pack_products` for the cut.
        bias_O: Of the convolution, bfloat16.
        way: How many frames at once.
        beside_THWC: In the shape of the result, bfloat16, which is added after rounding and returned as this.
        cut: How to do it if not as `choose_cut` says. All tensors are contiguous.
    """
    cut = cut or choose_cut(len(bias_O), way)
    count, height, width, channels = inputs_VHWC.shape
    assert count == way.taps * -(-num // way.num)
    assert inputs_VHWC.dtype == packed.dtype == torch.float16
    assert packed.shape == (len(bias_O) // cut.channels, way.taps, channels // 32, 3, 3, cut.channels, 32)
    size = (num, height, width, len(bias_O))
    out = bias_O.new_empty(size) if beside_THWC is None else beside_THWC
    assert out.shape == size
    assert out.dtype == bias_O.dtype == torch.bfloat16
    for given in (inputs_VHWC, packed, bias_O, out):
        assert given.is_contiguous()
    inputs = (None, inputs_VHWC, inputs_VHWC)
    launch_cut(cut, inputs, packed, bias_O, out, adds=beside_THWC is not None, frames=way.num)
    return out

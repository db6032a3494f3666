"""Weights of the fast decoder of Wan's VAE for kernels whose tiles the copy engine brings (compute capability 9.0).

Imported where such a route is asked for, as Triton comes with CUDA builds of torch alone.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from workers.model import enlarge_conv, fused_head, halo_conv, norm_sums, tile_conv, winograd
from workers.model.fused import takes_three_pieces
from workers.model.wan_decode_weights import Conv, Enlarge, Unit, lay_out_places
from workers.model.winograd import Winograd


class TileWeights(NamedTuple):
    """Lays out weights, each for the fastest kernel that takes its channels."""

    has_cuda: bool
    """Whether kernels of CUDA are taken; else Triton's alone."""

    def unit(self, unit: Unit, way: Winograd | None = None) -> Unit:
        """A residual unit; with `way` several frames at once."""
        return unit._replace(
            conv1=self._summed(unit.conv1, unit.gamma1_C, way), conv2=self._summed(unit.conv2, unit.gamma2_C, way)
        )

    def enlarge(self, enlarge: Enlarge) -> Enlarge:
        time = enlarge.time and self._time(enlarge.time)
        if (weight := self._phases(enlarge.weight[:, :, None], doubled=False)) is not None:
            return enlarge._replace(time=time, packed_weight=weight)
        out, channels = enlarge.weight.shape[:2]
        weight = tile_conv.line_up(enlarge.weight[:, :, None]) if tile_conv.takes(channels, out // 4) else None
        return enlarge._replace(time=time, lined_weight=weight)

    def head(self, conv: Conv, gamma_C: Tensor) -> Conv:
        """The last convolution, to three channels, behind a norm."""
        if not (self.has_cuda and takes_three_pieces(conv.weight.shape[1])):
            return conv
        places = lay_out_places(conv.weight[: fused_head.COLORS], gamma_C)
        return conv._replace(places=places) if fused_head.fits(*places) else conv

    def _takes_halos(self, conv: Conv) -> bool:
        out, channels, *size = conv.weight.shape
        return self.has_cuda and size == [3, 3, 3] and halo_conv.takes(channels, out)

    def _summed(self, conv: Conv, gamma_C: Tensor, way: Winograd | None) -> Conv:
        out, channels = conv.weight.shape[:2]
        if way is None or not (self._takes_halos(conv) and norm_sums.takes(channels) and winograd.fits(gamma_C, way)):
            return self._lined(conv)
        weight = winograd.pack_products(conv.weight, winograd.choose_cut(out, way), way)
        return conv._replace(sum_weight=weight, way=way)

    def _lined(self, conv: Conv) -> Conv:
        out, channels = conv.weight.shape[:2]
        if self._takes_halos(conv):
            weight = halo_conv.pack_weight(conv.weight, halo_conv.choose_cut(out).channels)
            return conv._replace(packed_weight=weight)
        return conv._replace(lined_weight=tile_conv.line_up(conv.weight)) if tile_conv.takes(channels, out) else conv

    def _time(self, time: Conv) -> Conv:
        weight = self._phases(time.weight, doubled=True)
        return self._lined(time) if weight is None else time._replace(packed_weight=weight)

    def _phases(self, weight: Tensor, *, doubled: bool) -> Tensor | None:
        out, channels = len(weight) // (2 if doubled else 4), weight.shape[1]
        if not (self.has_cuda and enlarge_conv.takes(channels, out)):
            return None
        return enlarge_conv.pack_phases(weight, enlarge_conv.choose_cut(channels, out, doubled=doubled))

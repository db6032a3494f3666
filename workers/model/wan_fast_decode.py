"""The decoder of Wan's VAE for a GPU: the same pixels as the library's (`WanDecodeStream`) in fewer trips to memory.

What the plain decoder spends its time on besides products: it pads every input by copying it, joins it with the two
inputs before it by copying it again, norms it in five passes, enlarges pictures before it convolves them, and takes
latent frames one by one, which leaves most of a GPU idle where pictures are small. Here channels lie together
throughout, norm and SiLU are one pass that writes to where the convolution reads, behind its two last inputs; pictures
are enlarged by the convolution itself (four of 2x2 in one product instead of one of 3x3 over four times the pixels);
and up to three latent frames go together. The plain operations of each step stand in `_norm_into` for the CPU, where
tests compare with the library.

Operations of one latent frame at 480x832: 12.8 TFLOP (13.5 without the folded enlargement), so three of them cannot
take less than 53 ms at the 727 TFLOP/s that products of large matrices reach on an H100; where two frames are convolved
by four products instead of six and four by six instead of twelve (`winograd.py`), 7.4 TFLOP and 31 ms.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.wan_decode_weights import Conv, DecoderWeights, Enlarge, Middle, Unit

if TYPE_CHECKING:
    from workers.model import tile_conv

_AT_ONCE = 3
"""Latent frames: a chunk. More would need more memory, and fill a GPU no better."""
_HISTORY = 2
"""Inputs that a causal convolution of 3 remembers."""


class FastWanDecoder(DecoderWeights):
    """A decoder; its weights take their memory a second time."""

    def stream(self) -> FastDecoding:
        """For one video."""
        return FastDecoding(self)


class FastDecoding:
    """One video on the way through a decoder; give it latents in order."""

    def __init__(self, decoder: FastWanDecoder) -> None:
        self._decoder = decoder
        self._memory: list[Tensor | None] = [None] * decoder.num_slots
        self._is_first = True

    @torch.inference_mode()
    def decode(self, z_CTHW: Tensor) -> Tensor:
        """Pictures [F, 3, 8 * H, 8 * W], not clamped, of latents that are not normalised; any number of them."""
        pieces = [z_CTHW[:, :1], *z_CTHW[:, 1:].split(_AT_ONCE, 1)] if self._is_first else z_CTHW.split(_AT_ONCE, 1)
        with _tried_algorithms() if self._decoder.route == "cudnn-tried" else contextlib.nullcontext():
            pictures = [self._decode(piece.movedim(0, -1).contiguous()) for piece in pieces if piece.shape[1]]
        return torch.cat(pictures).movedim(-1, 1) if len(pictures) > 1 else pictures[0].movedim(-1, 1)

    @property
    def num_bytes(self) -> int:
        """What it remembers."""
        return sum(slot.nbytes for slot in self._memory if slot is not None)

    def _decode(self, x_THWC: Tensor) -> Tensor:
        """One piece, through the whole network."""
        decoder = self._decoder
        x = self._convolve(decoder.conv_in, _each_frame(decoder.quant, x_THWC))
        x = self._unit(decoder.before, x)
        x = self._unit(decoder.after, _attend(decoder.middle, x, by_tiles=decoder.attends_by_tiles))
        for units, enlarge in decoder.stages:
            for unit in units:
                x = self._unit(unit, x)
            if enlarge is not None:
                x = _enlarge_pictures(enlarge, self._double_frames(enlarge.time, x))
        self._is_first = False
        return self._convolve(decoder.conv_out, x, decoder.gamma_out)[..., :3]

    def _unit(self, unit: Unit, x_THWC: Tensor) -> Tensor:
        beside = x_THWC if unit.shortcut is None else _each_frame(unit.shortcut, x_THWC)
        x = self._convolve(unit.conv1, x_THWC, unit.gamma1_C)
        return self._convolve(unit.conv2, x, unit.gamma2_C, beside)

    def _double_frames(self, time: Conv | None, x_THWC: Tensor) -> Tensor:
        """Two frames for each; the very first latent frame of a video stays one, and the others never see it."""
        if time is None or self._is_first:
            return x_THWC
        if time.packed_weight is not None:
            from workers.model import enlarge_conv

            assert time.bias is not None
            return enlarge_conv.double_frames(self._remember(time, x_THWC), x_THWC, time.packed_weight, time.bias)
        if time.lined_weight is not None:
            return self._convolve_by_tiles(time, x_THWC, result="doubled")
        x = self._convolve(time, x_THWC)
        pairs: Tensor = x.unflatten(-1, (2, -1))
        return pairs.movedim(-2, 1).flatten(0, 1)

    def _convolve(
        self, conv: Conv, x_THWC: Tensor, gamma_C: Tensor | None = None, beside_THWC: Tensor | None = None
    ) -> Tensor:
        """A causal convolution; with gamma, of the norm and SiLU of its input; plus what stands beside it."""
        if conv.places is not None:
            return self._convolve_by_places(conv, x_THWC)
        if conv.sum_weight is not None and gamma_C is not None:
            return self._convolve_by_sums(conv, x_THWC, gamma_C, beside_THWC)
        if conv.packed_weight is not None and gamma_C is not None:
            return self._convolve_by_halos(conv, x_THWC, gamma_C, beside_THWC)
        if conv.lined_weight is not None:
            return self._convolve_by_tiles(conv, x_THWC if gamma_C is None else _norm(x_THWC, gamma_C), beside_THWC)
        num, height, width, channels = x_THWC.shape
        rows, columns = (size // 2 for size in conv.weight.shape[3:])  # margins
        room = x_THWC.new_empty((_HISTORY + num, height + 2 * rows, width + 2 * columns, channels))
        before, new = self._memory[conv.slot], room[_HISTORY:]
        if before is None:
            room[:_HISTORY].zero_()
        else:
            room[:_HISTORY].copy_(before)
        if rows and columns:
            for margin in (new[:, :rows], new[:, -rows:], new[:, :, :columns], new[:, :, -columns:]):
                margin.zero_()
        inside = new[:, rows : rows + height, columns : columns + width]
        if gamma_C is None:
            inside.copy_(x_THWC)
        else:
            _norm_into(inside, x_THWC, gamma_C, silu=True)
        self._memory[conv.slot] = room[-_HISTORY:].clone()  # the room itself is needed for this call alone
        if conv.flat_weight is not None:
            from workers.model import fused_conv  # Triton comes with CUDA builds of torch alone

            assert conv.bias is not None
            product: Tensor = fused_conv.convolve(room, conv.flat_weight, conv.bias, beside_THWC)
            return product
        result_BCTHW = F.conv3d(room.movedim(-1, 0)[None], conv.weight, conv.bias)
        out = result_BCTHW[0].movedim(0, -1).contiguous()
        return out if beside_THWC is None else out.add_(beside_THWC)

    def _convolve_by_tiles(
        self, conv: Conv, x_THWC: Tensor, beside_THWC: Tensor | None = None, result: tile_conv.Result = "plain"
    ) -> Tensor:
        """The same where the frames before are read where they are remembered, and margins are not there at all."""
        from workers.model import tile_conv  # Triton comes with CUDA builds of torch alone

        assert conv.lined_weight is not None
        assert conv.bias is not None
        before, size = self._remember(conv, x_THWC), conv.weight.shape
        return tile_conv.convolve(
            before, x_THWC, conv.lined_weight, conv.bias, beside_THWC, size=(size[2], size[3], size[4]), result=result
        )

    def _remember(self, conv: Conv, x_THWC: Tensor) -> Tensor | None:
        """Keeps the last two inputs, as the others are needed for this call alone; the two before."""
        before, last = self._memory[conv.slot], x_THWC[-_HISTORY:]
        self._memory[conv.slot] = last.clone() if len(last) == _HISTORY else _join(before, last)
        return before

    def _convolve_by_halos(self, conv: Conv, x_THWC: Tensor, gamma_C: Tensor, beside_THWC: Tensor | None) -> Tensor:
        """The same where what is remembered is written apart at once, so nothing is copied."""
        from workers.model import halo_conv

        assert conv.packed_weight is not None
        assert conv.bias is not None
        before, split = self._memory[conv.slot], max(0, len(x_THWC) - _HISTORY)
        pieces = [_norm(piece, gamma_C) for piece in (x_THWC[:split], x_THWC[split:]) if len(piece)]
        last = pieces[-1]
        self._memory[conv.slot] = last if len(last) == _HISTORY else _join(before, last)
        return halo_conv.convolve(before, pieces, conv.packed_weight, conv.bias, beside_THWC)

    def _convolve_by_places(self, conv: Conv, x_THWC: Tensor) -> Tensor:
        """The same to three channels, norm and all."""
        from workers.model import fused_head  # Triton comes with CUDA builds of torch alone

        assert conv.places is not None
        assert conv.bias is not None
        pictures: Tensor
        pictures, self._memory[conv.slot] = fused_head.convolve(
            self._memory[conv.slot], x_THWC, *conv.places, conv.bias
        )
        return pictures

    def _convolve_by_sums(self, conv: Conv, x_THWC: Tensor, gamma_C: Tensor, beside_THWC: Tensor | None) -> Tensor:
        """The same for several frames at once, from sums of frames that the norm writes."""
        from workers.model import norm_sums, winograd

        assert conv.sum_weight is not None
        assert conv.way is not None
        assert conv.bias is not None
        sums, self._memory[conv.slot] = norm_sums.norm_sums(x_THWC, self._memory[conv.slot], gamma_C, conv.way)
        return winograd.convolve(sums, len(x_THWC), conv.sum_weight, conv.bias, conv.way, beside_THWC)


def _join(before_THWC: Tensor | None, last_THWC: Tensor) -> Tensor:
    """The last two frames where only one is new."""
    return torch.cat((torch.zeros_like(last_THWC) if before_THWC is None else before_THWC[-1:], last_THWC))


def _tried_algorithms() -> AbstractContextManager[None]:
    """cuDNN times its algorithms at each new shape."""
    cudnn = torch.backends.cudnn
    return cast(
        AbstractContextManager[None],
        cudnn.flags(enabled=True, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32),
    )


def _enlarge_pictures(enlarge: Enlarge, x_THWC: Tensor) -> Tensor:
    if enlarge.packed_weight is not None:
        from workers.model import enlarge_conv

        return enlarge_conv.enlarge_pictures(x_THWC, enlarge.packed_weight, enlarge.bias)
    if enlarge.lined_weight is not None:
        from workers.model import tile_conv  # Triton comes with CUDA builds of torch alone

        whole: Tensor = tile_conv.convolve(
            None, x_THWC, enlarge.lined_weight, enlarge.bias, size=(1, 2, 2), result="enlarged"
        )
        return whole
    num, height, width, _ = x_THWC.shape
    # One pixel more each way: place (a, b) saw source rows a - 1 and a, and columns b - 1 and b.
    all_phases = F.conv2d(x_THWC.movedim(-1, 1), enlarge.weight, enlarge.bias, padding=1).movedim(1, -1)
    phases = all_phases.unflatten(-1, (2, 2, -1))
    out = x_THWC.new_empty((num, height, 2, width, 2, phases.shape[-1]))
    for row in range(2):
        for column in range(2):
            out[:, :, row, :, column] = phases[:, row : row + height, column : column + width, row, column]
    return out.flatten(1, 2).flatten(2, 3)


def _attend(middle: Middle, x_THWC: Tensor, *, by_tiles: bool) -> Tensor:
    normed = _norm(x_THWC, middle.gamma_C, silu=False)
    qkv = F.linear(normed.flatten(1, 2), *middle.qkv)
    if by_tiles:
        from workers.model import wide_attention  # Triton comes with CUDA builds of torch alone

        out = wide_attention.attend(qkv)
    else:
        q, k, v = qkv[:, None].chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]
    return x_THWC + F.linear(out, *middle.out).view(x_THWC.shape)


def _each_frame(conv: Conv, x_THWC: Tensor) -> Tensor:
    """A convolution of one pixel: a product."""
    return F.linear(x_THWC, conv.weight.flatten(1), conv.bias)


def _norm(x_THWC: Tensor, gamma_C: Tensor, *, silu: bool = True) -> Tensor:
    normed = torch.empty_like(x_THWC)
    _norm_into(normed, x_THWC, gamma_C, silu=silu)
    return normed


def _norm_into(out_THWC: Tensor, x_THWC: Tensor, gamma_C: Tensor, *, silu: bool) -> None:
    """x / |x| * sqrt(C) * gamma over the channels, then SiLU; rounded where the library rounds."""
    if x_THWC.is_cuda:
        from workers.model import fused  # Triton comes with CUDA builds of torch alone

        fused.normalise_into(out_THWC, x_THWC, gamma_C, silu=silu)
        return
    wide = x_THWC.float() if x_THWC.dtype in (torch.bfloat16, torch.float16) else x_THWC
    normed = F.normalize(wide, dim=-1).to(x_THWC.dtype) * x_THWC.shape[-1] ** 0.5 * gamma_C
    out_THWC.copy_(F.silu(normed) if silu else normed)

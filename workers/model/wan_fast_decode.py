"""The decoder of Wan's VAE for a GPU: the same pixels as the library's (`WanDecodeStream`) in fewer trips to memory.

What the plain decoder spends its time on besides products: it pads every input by copying it, joins it with the two
inputs before it by copying it again, norms it in five passes, enlarges pictures before it convolves them, and takes
latent frames one by one, which leaves most of a GPU idle where pictures are small. Here channels lie together
throughout, norm and SiLU are one pass that writes to where the convolution reads, behind its two last inputs; pictures
are enlarged by the convolution itself (four of 2x2 in one product instead of one of 3x3 over four times the pixels);
and up to three latent frames go together. The plain operations of each step stand in `_norm_into` for the CPU, where
tests compare with the library.

Operations of one latent frame at 480x832: 12.8 TFLOP (13.5 without the folded enlargement), so three of them cannot
take less than 53 ms at the 727 TFLOP/s that products of large matrices reach on an H100.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from workers.model import tile_conv

Route = Literal["cudnn", "cudnn-tried", "triton", "tma", "halo"]

_AT_ONCE = 3
"""Latent frames: a chunk. More would need more memory, and fill a GPU no better."""
_HISTORY = 2
"""Inputs that a causal convolution of 3 remembers."""


class _Conv(NamedTuple):
    """A convolution over (time, row, column) whose weights lie as the GPU reads them."""

    weight: Tensor
    bias: Tensor | None
    slot: int
    """Where its last inputs are remembered; -1 where it looks at one frame only."""
    flat_weight: Tensor | None = None
    """For `fused_conv`; None leaves the convolution to cuDNN."""
    lined_weight: Tensor | None = None
    """For `tile_conv`, likewise."""
    packed_weight: Tensor | None = None
    """For `halo_conv`, which goes first."""

    @classmethod
    def of(cls, module: nn.Module, slots: Iterator[int], out_channels: int = 0) -> _Conv:
        """Weights of the library's convolution; with `out_channels`, filled up with zeros to so many."""
        weight, bias = (cast(Tensor, parameter).detach() for parameter in (module.weight, module.bias))
        missing = max(0, out_channels - len(weight))
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, 0, 0, missing))
        slot = next(slots) if weight.shape[2] > 1 else -1
        return cls(weight.contiguous(memory_format=torch.channels_last_3d), F.pad(bias, (0, missing)), slot)


class _Unit(NamedTuple):
    """A residual unit."""

    gamma1_C: Tensor
    conv1: _Conv
    gamma2_C: Tensor
    conv2: _Conv
    shortcut: _Conv | None


class _Middle(NamedTuple):
    """Attention within each latent frame, one head."""

    gamma_C: Tensor
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]


class _Enlarge(NamedTuple):
    """Twice the rows and columns, and twice the frames where there is a convolution over time."""

    time: _Conv | None
    weight: Tensor
    """Of the four phases (row, column) of a 2x2 pixel: [4 * out, in, 2, 2]."""
    bias: Tensor
    lined_weight: Tensor | None = None
    """For `tile_conv`; None leaves the convolution to cuDNN."""


class FastWanDecoder:
    """Weights of a decoder, prepared once; takes their memory a second time.

    Args:
        network: The library's AutoencoderKLWan, in evaluation mode, on its device.
        route: Who convolves. "cudnn" takes the algorithm that cuDNN recommends, "cudnn-tried" the one that wins at each
            new shape, which may differ from run to run and with it the last bits of pixels; "triton" is our own kernel
            where its tiles fit, which are nine tenths of the work; "tma" is the one that needs compute capability 9.0,
            for enlargements and doublings too; "halo" is that with CUDA of our own for the units, in bfloat16.
    Raises:
        ValueError: The route needs another GPU or dtype.
    """

    def __init__(self, network: nn.Module, *, route: Route = "cudnn") -> None:
        self.route = route
        wan = cast(Any, network)
        slots = iter(range(1000))
        decoder, quant = wan.decoder, wan.post_quant_conv
        self.quant = _Conv.of(quant, slots)
        self.conv_in = _Conv.of(decoder.conv_in, slots)
        middle = decoder.mid_block
        self.before, self.middle = _unit(middle.resnets[0], slots), _middle(middle.attentions[0])
        self.after = _unit(middle.resnets[1], slots)
        self.stages = [
            (
                [_unit(unit, slots) for unit in stage.resnets],
                None if stage.upsamplers is None else _enlarge(stage.upsamplers[0], slots),
            )
            for stage in decoder.up_blocks
        ]
        self.gamma_out = decoder.norm_out.gamma.detach().flatten()
        # Three channels are no shape for a tensor core.
        self.conv_out = _Conv.of(decoder.conv_out, slots, out_channels=8)
        self.num_slots = next(slots)
        if route == "triton":
            self._flatten_weights()
        if route in ("tma", "halo"):
            self._line_up_weights()

    def _flatten_weights(self) -> None:
        """Have the units' convolutions computed by our own kernel where it can."""
        from workers.model import fused_conv  # Triton comes with CUDA builds of torch alone

        def flat(conv: _Conv) -> _Conv:
            out, channels, *size = conv.weight.shape
            fits = size == [3, 3, 3] and fused_conv.takes(channels, out)
            return conv._replace(flat_weight=fused_conv.flatten_weight(conv.weight)) if fits else conv

        def flat_unit(unit: _Unit) -> _Unit:
            return unit._replace(conv1=flat(unit.conv1), conv2=flat(unit.conv2))

        self.before, self.after = flat_unit(self.before), flat_unit(self.after)
        self.stages = [([flat_unit(unit) for unit in units], enlarge) for units, enlarge in self.stages]

    def _line_up_weights(self) -> None:
        """Have all convolutions but the first and the last computed by tiles that the copy engine brings."""
        self._refuse_elsewhere()
        from workers.model import halo_conv, tile_conv  # Triton comes with CUDA builds of torch alone

        def packed(conv: _Conv) -> Tensor | None:
            out, channels, *size = conv.weight.shape
            if self.route != "halo" or size != [3, 3, 3] or not halo_conv.takes(channels, out):
                return None
            return halo_conv.pack_weight(conv.weight, halo_conv.choose_cut(out).channels)

        def lined(conv: _Conv) -> _Conv:
            out, channels = conv.weight.shape[:2]
            fits = tile_conv.takes(channels, out)
            lined = tile_conv.line_up(conv.weight) if fits else None
            return conv._replace(lined_weight=lined, packed_weight=packed(conv))

        def lined_unit(unit: _Unit) -> _Unit:
            return unit._replace(conv1=lined(unit.conv1), conv2=lined(unit.conv2))

        def lined_enlarge(enlarge: _Enlarge) -> _Enlarge:
            out, channels = enlarge.weight.shape[:2]
            weight = tile_conv.line_up(enlarge.weight[:, :, None]) if tile_conv.takes(channels, out // 4) else None
            return enlarge._replace(time=enlarge.time and lined(enlarge.time), lined_weight=weight)

        self.before, self.after = lined_unit(self.before), lined_unit(self.after)
        self.stages = [
            ([lined_unit(unit) for unit in units], enlarge and lined_enlarge(enlarge)) for units, enlarge in self.stages
        ]

    def _refuse_elsewhere(self) -> None:
        """Triton's interpreter runs "tma" on a CPU."""
        weight = self.conv_in.weight
        major = torch.cuda.get_device_capability(weight.device)[0] if weight.is_cuda else 0
        if self.route == "halo" and not (major == 9 and weight.dtype == torch.bfloat16):
            raise ValueError("VAE by halo: needs compute capability 9.0 and bfloat16; cudnn and triton run elsewhere")
        if weight.is_cuda and not (major >= 9 and weight.dtype in (torch.bfloat16, torch.float16)):
            raise ValueError("VAE by tma: needs compute capability 9.0 and 16 bits; cudnn and triton run elsewhere")

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
        x = self._unit(decoder.after, _attend(decoder.middle, x))
        for units, enlarge in decoder.stages:
            for unit in units:
                x = self._unit(unit, x)
            if enlarge is not None:
                x = _enlarge_pictures(enlarge, self._double_frames(enlarge.time, x))
        self._is_first = False
        return self._convolve(decoder.conv_out, x, decoder.gamma_out)[..., :3]

    def _unit(self, unit: _Unit, x_THWC: Tensor) -> Tensor:
        beside = x_THWC if unit.shortcut is None else _each_frame(unit.shortcut, x_THWC)
        x = self._convolve(unit.conv1, x_THWC, unit.gamma1_C)
        return self._convolve(unit.conv2, x, unit.gamma2_C, beside)

    def _double_frames(self, time: _Conv | None, x_THWC: Tensor) -> Tensor:
        """Two frames for each; the very first latent frame of a video stays one, and the others never see it."""
        if time is None or self._is_first:
            return x_THWC
        if time.lined_weight is not None:
            return self._convolve_by_tiles(time, x_THWC, result="doubled")
        x = self._convolve(time, x_THWC)
        pairs: Tensor = x.unflatten(-1, (2, -1))
        return pairs.movedim(-2, 1).flatten(0, 1)

    def _convolve(
        self, conv: _Conv, x_THWC: Tensor, gamma_C: Tensor | None = None, beside_THWC: Tensor | None = None
    ) -> Tensor:
        """A causal convolution; with gamma, of the norm and SiLU of its input; plus what stands beside it."""
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
        self, conv: _Conv, x_THWC: Tensor, beside_THWC: Tensor | None = None, result: tile_conv.Result = "plain"
    ) -> Tensor:
        """The same where the frames before are read where they are remembered, and margins are not there at all."""
        from workers.model import halo_conv, tile_conv  # Triton comes with CUDA builds of torch alone

        assert conv.lined_weight is not None
        assert conv.bias is not None
        before, first = self._memory[conv.slot], x_THWC[-_HISTORY:]
        if len(first) < _HISTORY:
            older = torch.zeros_like(first) if before is None else before[-1:]
            self._memory[conv.slot] = torch.cat((older, first))
        else:
            self._memory[conv.slot] = first.clone()  # the others are needed for this call alone
        if conv.packed_weight is not None:
            cut = halo_conv.choose_cut(len(conv.bias))
            return halo_conv.convolve(before, x_THWC, conv.packed_weight, conv.bias, beside_THWC, cut)
        size = conv.weight.shape
        return tile_conv.convolve(
            before, x_THWC, conv.lined_weight, conv.bias, beside_THWC, size=(size[2], size[3], size[4]), result=result
        )


def _tried_algorithms() -> AbstractContextManager[None]:
    """cuDNN times its algorithms at each new shape."""
    cudnn = torch.backends.cudnn
    return cast(
        AbstractContextManager[None],
        cudnn.flags(enabled=True, benchmark=True, deterministic=cudnn.deterministic, allow_tf32=cudnn.allow_tf32),
    )


def _unit(module: Any, slots: Iterator[int]) -> _Unit:
    """A unit of the library; its slots are numbered in the order of use."""
    has_shortcut = not isinstance(module.conv_shortcut, nn.Identity)
    return _Unit(
        module.norm1.gamma.detach().flatten(),
        _Conv.of(module.conv1, slots),
        module.norm2.gamma.detach().flatten(),
        _Conv.of(module.conv2, slots),
        _Conv.of(module.conv_shortcut, slots) if has_shortcut else None,
    )


def _middle(module: Any) -> _Middle:
    pairs = [(part.weight.detach().flatten(1), part.bias.detach()) for part in (module.to_qkv, module.proj)]
    return _Middle(module.norm.gamma.detach().flatten(), pairs[0], pairs[1])


def _enlarge(module: Any, slots: Iterator[int]) -> _Enlarge:
    convolution = module.resample[1]
    time = _Conv.of(module.time_conv, slots) if module.mode == "upsample3d" else None
    return _Enlarge(time, fold_enlargement(convolution.weight.detach()), convolution.bias.detach().repeat(4))


def fold_enlargement(weight_OIHW: Tensor) -> Tensor:
    """Weights [4 * out, in, 2, 2] that do to a picture what 3x3 ones do to it at twice the size (nearest pixel).

    Phase (r, c) makes the pixels at rows 2i + r, columns 2j + c. Even rows see the source rows (i - 1, i, i), odd ones
    (i, i, i + 1): the weights that meet the same source row are added, in float32 at least.
    """
    wide = weight_OIHW if weight_OIHW.dtype == torch.float64 else weight_OIHW.float()
    phases: list[Tensor] = []
    for rows in _fold(wide, 2):
        phases += _fold(rows, 3)
    return torch.cat(phases).to(weight_OIHW.dtype).contiguous(memory_format=torch.channels_last)


def _fold(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The even and the odd phase along one dimension of three."""
    first, second, third = weight.unbind(dim)
    return torch.stack((first, second + third), dim), torch.stack((first + second, third), dim)


def _enlarge_pictures(enlarge: _Enlarge, x_THWC: Tensor) -> Tensor:
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


def _attend(middle: _Middle, x_THWC: Tensor) -> Tensor:
    normed = _norm(x_THWC, middle.gamma_C, silu=False)
    q, k, v = F.linear(normed.flatten(1, 2), *middle.qkv)[:, None].chunk(3, -1)
    out = F.scaled_dot_product_attention(q, k, v)[:, 0]
    return x_THWC + F.linear(out, *middle.out).view(x_THWC.shape)


def _each_frame(conv: _Conv, x_THWC: Tensor) -> Tensor:
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

"""Weights of the fast decoder of Wan's VAE (`wan_fast_decode.py`), laid out once for whoever convolves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from workers.model.winograd import Winograd

Route = Literal["cudnn", "cudnn-tried", "triton", "tma", "halo", "pairs", "fours"]

_FRAMES_AT_ONCE: dict[Route, int] = {"pairs": 2, "fours": 4}
"""Where a latent frame has become as many."""


class Places(NamedTuple):
    """A convolution to three channels as a product with all places of a picture at once, behind a norm."""

    factor_C: Tensor
    """Weights of the norm times sqrt(C), float32."""
    weight_TCN: Tensor
    """[3, C, 32]: columns are row, column, channel out; those past 27 are zeros."""


class Conv(NamedTuple):
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
    """For `halo_conv`, in place of that; for `enlarge_conv` where it doubles frames."""
    sum_weight: Tensor | None = None
    """For `winograd`, in place of that."""
    way: Winograd | None = None
    """By which it is."""
    places: Places | None = None
    """For `fused_head`, in place of that."""

    @classmethod
    def of(cls, module: nn.Module, slots: Iterator[int], out_channels: int = 0) -> Conv:
        """Weights of the library's convolution; with `out_channels`, filled up with zeros to so many."""
        weight, bias = (cast(Tensor, parameter).detach() for parameter in (module.weight, module.bias))
        missing = max(0, out_channels - len(weight))
        weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, 0, 0, missing))
        slot = next(slots) if weight.shape[2] > 1 else -1
        return cls(weight.contiguous(memory_format=torch.channels_last_3d), F.pad(bias, (0, missing)), slot)


class Unit(NamedTuple):
    """A residual unit."""

    gamma1_C: Tensor
    conv1: Conv
    gamma2_C: Tensor
    conv2: Conv
    shortcut: Conv | None


class Middle(NamedTuple):
    """Attention within each latent frame, one head."""

    gamma_C: Tensor
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]


class Enlarge(NamedTuple):
    """Twice the rows and columns, and twice the frames where there is a convolution over time."""

    time: Conv | None
    weight: Tensor
    """Of the four phases (row, column) of a 2x2 pixel: [4 * out, in, 2, 2]."""
    bias: Tensor
    lined_weight: Tensor | None = None
    """For `tile_conv`; None leaves the convolution to cuDNN."""
    packed_weight: Tensor | None = None
    """For `enlarge_conv`, in place of that."""


class DecoderWeights:
    """Weights of a decoder, prepared once; takes their memory a second time.

    Args:
        network: The library's AutoencoderKLWan, in evaluation mode, on its device.
        route: Who convolves. "cudnn" takes the algorithm that cuDNN recommends, "cudnn-tried" the one that wins at each
            new shape, which may differ from run to run and with it the last bits of pixels; "triton" is our own kernel
            where its tiles fit, which are nine tenths of the work; "tma" is the one that needs compute capability 9.0,
            for enlargements and doublings too; "halo" is that with CUDA of our own for the units, in bfloat16; "pairs"
            is that with two thirds of the products where a latent frame has become an even number of frames; "fours" is
            that with half of them where it has become four.
    Raises:
        ValueError: The route needs another GPU or dtype.
    """

    def __init__(self, network: nn.Module, *, route: Route = "cudnn") -> None:
        self.route = route
        wan = cast(Any, network)
        slots = iter(range(1000))
        decoder, quant = wan.decoder, wan.post_quant_conv
        self.quant = Conv.of(quant, slots)
        self.conv_in = Conv.of(decoder.conv_in, slots)
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
        self.conv_out = Conv.of(decoder.conv_out, slots, out_channels=8)
        self.num_slots = next(slots)
        if route == "triton":
            self._flatten_weights()
        if route == "tma" or self._has_halos:
            self._line_up_weights()

    @property
    def _has_halos(self) -> bool:
        """Whether units are convolved by `halo_conv.cu`."""
        return self.route in ("halo", *_FRAMES_AT_ONCE)

    @property
    def attends_by_tiles(self) -> bool:
        """Whether attention is computed by `wide_attention`."""
        if not self._has_halos:
            return False
        from workers.model.fused import takes_three_pieces  # Triton comes with CUDA builds of torch alone

        return takes_three_pieces(len(self.middle.gamma_C))

    def _flatten_weights(self) -> None:
        """Have the units' convolutions computed by our own kernel where it can."""
        from workers.model import fused_conv  # Triton comes with CUDA builds of torch alone

        def flat(conv: Conv) -> Conv:
            out, channels, *size = conv.weight.shape
            fits = size == [3, 3, 3] and fused_conv.takes(channels, out)
            return conv._replace(flat_weight=fused_conv.flatten_weight(conv.weight)) if fits else conv

        def flat_unit(unit: Unit) -> Unit:
            return unit._replace(conv1=flat(unit.conv1), conv2=flat(unit.conv2))

        self.before, self.after = flat_unit(self.before), flat_unit(self.after)
        self.stages = [([flat_unit(unit) for unit in units], enlarge) for units, enlarge in self.stages]

    def _line_up_weights(self) -> None:
        """Have all convolutions but the first computed by tiles that the copy engine brings."""
        self._refuse_elsewhere()
        from workers.model import winograd
        from workers.model.wan_tile_weights import TileWeights  # Triton comes with CUDA builds of torch alone

        tiles = TileWeights(self._has_halos)
        self.conv_out = tiles.head(self.conv_out, self.gamma_out)
        self.before, self.after = tiles.unit(self.before), tiles.unit(self.after)
        num_frames = 1
        for place, (units, enlarge) in enumerate(self.stages):
            # Groups never depend on where a video is cut into pieces, so pixels do not.
            way = winograd.choose_way(min(num_frames, _FRAMES_AT_ONCE.get(self.route, 1)))
            self.stages[place] = [tiles.unit(unit, way) for unit in units], enlarge and tiles.enlarge(enlarge)
            num_frames *= 1 if enlarge is None or enlarge.time is None else 2

    def _refuse_elsewhere(self) -> None:
        """Triton's interpreter runs "tma" on a CPU."""
        weight = self.conv_in.weight
        major = torch.cuda.get_device_capability(weight.device)[0] if weight.is_cuda else 0
        if self._has_halos and not (major == 9 and weight.dtype == torch.bfloat16):
            raise ValueError(
                f"VAE by {self.route}: needs compute capability 9.0 and bfloat16; cudnn and triton run elsewhere"
            )
        if weight.is_cuda and not (major >= 9 and weight.dtype in (torch.bfloat16, torch.float16)):
            raise ValueError("VAE by tma: needs compute capability 9.0 and 16 bits; cudnn and triton run elsewhere")


def lay_out_places(weight_OITHW: Tensor, gamma_C: Tensor) -> Places:
    """Weights of a convolution of 3x3x3 to three channels, and of the norm ahead of it."""
    out, channels = weight_OITHW.shape[:2]
    columns = weight_OITHW.permute(2, 1, 3, 4, 0).reshape(3, channels, 9 * out)
    return Places(gamma_C.float() * channels**0.5, F.pad(columns, (0, 32 - 9 * out)).contiguous())


def _unit(module: Any, slots: Iterator[int]) -> Unit:
    """A unit of the library; its slots are numbered in the order of use."""
    has_shortcut = not isinstance(module.conv_shortcut, nn.Identity)
    return Unit(
        module.norm1.gamma.detach().flatten(),
        Conv.of(module.conv1, slots),
        module.norm2.gamma.detach().flatten(),
        Conv.of(module.conv2, slots),
        Conv.of(module.conv_shortcut, slots) if has_shortcut else None,
    )


def _middle(module: Any) -> Middle:
    pairs = [(part.weight.detach().flatten(1), part.bias.detach()) for part in (module.to_qkv, module.proj)]
    return Middle(module.norm.gamma.detach().flatten(), pairs[0], pairs[1])


def _enlarge(module: Any, slots: Iterator[int]) -> Enlarge:
    convolution = module.resample[1]
    time = Conv.of(module.time_conv, slots) if module.mode == "upsample3d" else None
    return Enlarge(time, fold_enlargement(convolution.weight.detach()), convolution.bias.detach().repeat(4))


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

"""Each convolution of Wan's VAE decoder for a chunk of 3 latent frames at 480x832: cuDNN, our kernels, and how to cut.

`python -m tests.bench.wan_conv` on a CUDA GPU: the best cuts of `tile_conv` first, for each shape; then the decoder by
each route; then where the time of the fastest goes, by kernel.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.record import report
from tests.bench.rollout import machine
from tests.bench.rollout_models import decode_milliseconds, make_vae_network
from tests.bench.rollout_rows import Settings
from workers.model import fused_conv, halo_conv, tile_conv, winograd
from workers.model.backbones import find_backbone
from workers.model.fused import normalise_into
from workers.model.halo_conv import Cut
from workers.model.norm_sums import norm_sums
from workers.model.tile_conv import Result, Tiles
from workers.model.wan_decode_weights import Route
from workers.model.wan_vae import WanVae
from workers.model.winograd import Winograd


class Shape(NamedTuple):
    """One kind of convolution; channels out are those of one phase."""

    count: int
    frames: int
    height: int
    width: int
    channels: int
    out_channels: int
    result: Result = "plain"

    @property
    def size(self) -> tuple[int, int, int]:
        return {"plain": (3, 3, 3), "doubled": (3, 1, 1), "enlarged": (1, 2, 2)}[self.result]

    @property
    def phases(self) -> int:
        return {"plain": 1, "doubled": 2, "enlarged": 4}[self.result]

    @property
    def tera(self) -> float:
        """Operations of one, without what only fills tiles."""
        places = self.size[0] * self.size[1] * self.size[2]
        pixels = self.frames * self.height * self.width
        return 2e-12 * pixels * places * self.channels * self.out_channels * self.phases

    @property
    def name(self) -> str:
        return f"{self.frames} x {self.height}x{self.width}, {self.channels} to {self.out_channels}, {self.result}"


SHAPES = [
    Shape(6, 12, 480, 832, 96, 96),
    Shape(6, 12, 240, 416, 192, 192),
    Shape(5, 6, 120, 208, 384, 384),
    Shape(1, 6, 120, 208, 192, 384),
    Shape(10, 3, 60, 104, 384, 384),
    Shape(1, 12, 240, 416, 192, 96, "enlarged"),
    Shape(1, 12, 120, 208, 384, 192, "enlarged"),
    Shape(1, 6, 60, 104, 384, 192, "enlarged"),
    Shape(1, 6, 120, 208, 384, 384, "doubled"),
    Shape(1, 3, 60, 104, 384, 384, "doubled"),
    Shape(1, 12, 480, 832, 96, 8),
]
"""Of the decoder, most work first. The last makes three channels; eight are what a tensor core can take."""


def cuts(shape: Shape) -> list[Tiles]:
    """Pixels and channels that suit the shape; what does not fit a GPU fails alone."""
    out = shape.out_channels
    if out == 8:
        return [Tiles(1, 8, 32, 16, 0, 32, warps, 6, False) for warps in (4, 8)]
    if out == 96:
        return _cuts_of_96(32 if shape.channels == 96 else 64)
    found = [
        Tiles(1, 8, 32, 128, 64, 64, 8, 3, True),
        Tiles(1, 8, 32, 128, 64, 64, 8, 4, True),
        Tiles(1, 8, 16, 128, 64, 64, 8, 4, True),
        Tiles(1, 8, 16, 128, 64, 64, 8, 3, False),
    ]
    if shape.count == 1:
        return [found[0], *found[2:]]
    if shape.width % 32:
        found += [Tiles(1, 32, 8, 128, 64, 64, 8, 3, True), Tiles(2, 8, 16, 128, 64, 64, 8, 3, True)]
    if out == 384:
        found += [Tiles(1, 32, 8, 128, 0, 64, 8, 4, True), Tiles(1, 8, 16, 128, 0, 64, 4, 3, True)]
    return found


def _cuts_of_96(block_k: int) -> list[Tiles]:
    deep = 64 // block_k
    return [
        Tiles(1, 8, 32, 128, 0, block_k, 8, 3 * deep, True),
        Tiles(1, 8, 16, 128, 0, block_k, 4, 2 * deep, True),
        Tiles(1, 8, 16, 128, 0, block_k, 8, 3 * deep, True),
        Tiles(1, 8, 32, 64, 32, block_k, 8, 2 * deep, False),
        Tiles(1, 8, 16, 64, 32, block_k, 4, 2 * deep, False),
        Tiles(1, 8, 32, 128, 0, block_k, 8, 2 * deep, False),
    ]


def halo_cuts(shape: Shape) -> list[Cut]:
    """Of `halo_conv`."""
    if shape.result != "plain" or not halo_conv.takes(shape.channels, shape.out_channels):
        return []
    if shape.out_channels == 96:
        return [Cut(96, 16, 16, 3, 5), Cut(96, 16, 16, 4, 4), Cut(96, 16, 32, 2, 4), Cut(96, 8, 16, 4, 6)]
    return [Cut(192, 16, 16, 2, 3), Cut(192, 8, 16, 4, 3), Cut(96, 16, 16, 3, 5), Cut(96, 16, 16, 4, 4)]


class Inputs(NamedTuple):
    """Of one shape; `room` holds the frames before and the new ones with margins."""

    room: Tensor
    before: Tensor | None
    new: Tensor
    weight: Tensor
    bias: Tensor
    beside: Tensor | None
    added: Tensor | None
    """A copy of it for who adds in place."""


def draw(shape: Shape) -> Inputs:
    def random(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    kt, kh, kw = shape.size
    weight = random(shape.out_channels * shape.phases, shape.channels, kt, kh, kw)
    weight = (weight * (kt * kh * kw * shape.channels) ** -0.5).contiguous(memory_format=torch.channels_last_3d)
    new = random(shape.frames, shape.height, shape.width, shape.channels)
    before = random(kt - 1, *new.shape[1:]) if kt > 1 else None
    room = F.pad(new if before is None else torch.cat((before, new)), (0, 0, kw // 2, kw // 2, kh // 2, kh // 2))
    is_residual = shape.result == "plain" and shape.out_channels == shape.channels
    beside = random(*new.shape[:3], shape.out_channels) if is_residual else None
    return Inputs(room, before, new, weight, random(len(weight)), beside, None if beside is None else beside.clone())


def by_cudnn(shape: Shape, given: Inputs) -> Tensor:
    """As the decoder does it, interleaving included."""
    out: Tensor = F.conv3d(given.room.movedim(-1, 0)[None], given.weight, given.bias)[0].movedim(0, -1)
    if shape.result == "doubled":
        return out.unflatten(-1, (2, -1)).movedim(-2, 1).flatten(0, 1)
    if shape.result == "plain":
        return out.contiguous() if given.beside is None else out.contiguous().add_(given.beside)
    phases = out.unflatten(-1, (2, 2, -1))
    whole = out.new_empty((shape.frames, shape.height, 2, shape.width, 2, shape.out_channels))
    for row in range(2):
        for column in range(2):
            part = phases[:, row : row + shape.height, column : column + shape.width, row, column]
            whole[:, :, row, :, column] = part
    return whole.flatten(1, 2).flatten(2, 3)


def exact_corner(shape: Shape, given: Inputs, rows: int = 16, columns: int = 40) -> Tensor:
    """The first pixels of all frames in float32."""
    corner = given.room[:, : rows + 2, : columns + 2].float()
    beside = None if given.beside is None else given.beside.float()
    part = given._replace(room=corner, weight=given.weight.float(), bias=given.bias.float(), beside=None)
    height, width = (size - 2 * (kernel // 2) for size, kernel in zip(corner.shape[1:3], shape.size[1:], strict=True))
    out = by_cudnn(shape._replace(height=height, width=width), part)[:, :rows, :columns]
    return out if beside is None else out + beside[:, :rows, :columns]


def milliseconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median; what is measured takes longer than a launch."""
    for _ in range(2):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def ways(shape: Shape, given: Inputs) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Name and call of each."""
    yield "cudnn", lambda: by_cudnn(shape, given)
    if shape.result == "plain" and fused_conv.takes(shape.channels, shape.out_channels):
        flat = fused_conv.flatten_weight(given.weight)
        yield "triton", lambda: fused_conv.convolve(given.room, flat, given.bias, given.beside)
    for cut in halo_cuts(shape):
        packed = halo_conv.pack_weight(given.weight, cut.channels)
        yield (
            "halo " + " ".join(str(int(part)) for part in cut),
            lambda packed=packed, cut=cut: halo_conv.convolve(
                given.before, [given.new], packed, given.bias, given.added, cut
            ),
        )
    yield from sum_ways(shape, given)
    lined = tile_conv.line_up(given.weight)
    for tiles in cuts(shape):
        yield (
            "tma " + " ".join(str(int(part)) for part in tiles),
            lambda tiles=tiles: tile_conv.convolve(
                given.before, given.new, lined, given.bias, given.beside,
                size=shape.size, result=shape.result, tiles=tiles,
            ),
        )  # fmt: skip


def sum_ways(shape: Shape, given: Inputs) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Several frames at once, from sums of frames that a norm has written."""
    found: list[tuple[Winograd, Cut]] = []
    if shape.result == "plain" and shape.out_channels % 96 == 0:
        cuts_of_pairs = [Cut(96, 16, 16, 4, 4), Cut(96, 8, 32, 3, 5)]
        cuts_of_pairs += [Cut(192, 8, 16, 4, 3), Cut(192, 8, 16, 3, 3)] if shape.out_channels % 192 == 0 else []
        found += [(winograd.PAIR, cut) for cut in cuts_of_pairs]
        found += [(winograd.FOUR, cut) for cut in (Cut(96, 8, 16, 4, 6), Cut(96, 8, 16, 3, 7), Cut(96, 16, 8, 4, 6))]
    for way, cut in found:
        if shape.frames % way.num:
            continue
        inputs = winograd.transform_frames(given.before, given.new, way)
        packed = winograd.pack_products(given.weight, cut, way)
        yield (
            f"{'pairs' if way is winograd.PAIR else 'fours'} " + " ".join(str(int(part)) for part in cut),
            lambda inputs=inputs, packed=packed, cut=cut, way=way: winograd.convolve(
                inputs, shape.frames, packed, given.bias, way, given.added, cut
            ),
        )


def measure_shape(shape: Shape, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each way, the fastest first; `kinds` is how names begin, all if empty."""
    torch.manual_seed(0)
    given = draw(shape)
    exact = exact_corner(shape, given)
    whole = by_cudnn(shape, given)
    found = []
    for name, call in ways(shape, given):
        if kinds and name.split()[0] not in kinds:
            continue
        row: dict[str, Any] = {"convolution": shape.name, "count": shape.count, "way": name}
        try:
            if given.beside is not None and given.added is not None:
                given.added.copy_(given.beside)
            out = call()
            row["error"] = ((out[:, :16, :40].float() - exact).std() / exact.std()).item()
            row["from_cudnn"] = ((out - whole).float().std() / exact.std()).item()
            row["ms"] = milliseconds(call)
            row["tflops"] = shape.tera / row["ms"] * 1e3
            row["ms_of_a_chunk"] = row["ms"] * shape.count
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {str(problem).strip()[:100]}"
        found.append(row)
    return sorted(found, key=lambda row: row.get("ms", 1e9))


def measure_norm(shape: Shape) -> dict[str, Any]:
    """Norm and SiLU of what a convolution reads."""
    x = torch.randn(shape.frames, shape.height, shape.width, shape.channels, device="cuda", dtype=torch.bfloat16)
    gamma, out = torch.ones(shape.channels, device="cuda", dtype=torch.bfloat16), torch.empty_like(x)
    taken = milliseconds(lambda: normalise_into(out, x, gamma, silu=True))
    row = {"input": shape.name, "ms": taken, "gb_s": 2e-6 * x.nbytes / taken, "ms_of_a_chunk": taken * shape.count}
    for name, way in (("pairs", winograd.PAIR), ("fours", winograd.FOUR)):
        if shape.frames % way.num == 0:
            row[f"ms_of_{name}"] = milliseconds(lambda way=way: norm_sums(x, None, gamma, way))
            row[f"gb_s_of_{name}"] = (1 + way.taps / way.num) * 1e-6 * x.nbytes / row[f"ms_of_{name}"]
    return row


def profile(vae: WanVae, chunk: Tensor, num_kernels: int = 25) -> list[dict[str, Any]]:
    """Kernels of one chunk in the middle of a video, by time."""
    stream = vae.stream()
    for _ in range(3):
        stream.decode(chunk)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        stream.decode(chunk)
        torch.cuda.synchronize()
    kernels = sorted(seen.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    return [
        {"kernel": kernel.key[:110], "calls": kernel.count, "ms": kernel.self_device_time_total / 1e3}
        for kernel in kernels[:num_kernels]
    ]


def measure_decoders(network: nn.Module, chunk: Tensor, routes: Sequence[Route]) -> list[dict[str, Any]]:
    """A row for each route."""
    rows: list[dict[str, Any]] = []
    for route in routes:
        row: dict[str, Any] = {"decoder": route}
        try:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            row["ms"] = decode_milliseconds(WanVae(network, route=route), chunk)
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {str(problem).strip()[:160]}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=75, help="no further shape is begun after so long")
    parser.add_argument("--ways", nargs="*", default=[], help="these alone, such as halo and pairs; all unless told")
    asked = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    begun = time.monotonic()
    backbone = find_backbone("self-forcing-1.3b")
    device = torch.device("cuda")
    settings = Settings(backbone, backbone.width, backbone.height, device, torch.bfloat16)
    network = make_vae_network(settings)
    chunk = torch.randn(1, 3, 16, *settings.latent_size, device=device)
    routes: tuple[Route, ...] = ("cudnn", "triton", "tma", "halo", "pairs", "fours")
    routes = tuple(route for route in routes if not asked.ways or route in asked.ways)
    report("wan_conv-decoders", measure_decoders(network, chunk, routes), machine(settings))
    for route in routes[-3:]:
        try:
            kernels = profile(WanVae(network, route=route), chunk)
            report(f"wan_conv-kernels-{route}", kernels, f"One chunk by route {route}.")
        except Exception as problem:
            print(f"no profile: {type(problem).__name__}: {problem}")
    report("wan_conv-norms", [measure_norm(shape) for shape in SHAPES[:5]], "Norm and SiLU before convolutions.")
    rows: list[dict[str, Any]] = []
    note = f"Least possible for all: {sum(shape.tera * shape.count for shape in SHAPES):.1f} TFLOP. By numbers: tma "
    note += f"{', '.join(Tiles._fields)}; halo {', '.join(Cut._fields)}."
    for shape in SHAPES:
        if time.monotonic() - begun < asked.seconds:
            rows += measure_shape(shape, asked.ways)
            torch.cuda.empty_cache()
    report("wan_conv", rows, note)
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()

"""Rows of policies whose keys grow with the video: dense full history, and the baselines that choose among all keys.

A chunk is timed at several lengths of the history and the whole rollout is integrated over them. Histories that fit are
real. Beyond, ONE layer's keys are made at that length and every layer reads them (a replayed cache): the same work for
each of the layers in turn, without the memory of all. A row says how far its history was real.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.bench.rollout_models import Stage, fill_cache, make_config, make_dit, make_vae
from tests.bench.rollout_native import measure_bounded
from tests.bench.rollout_rows import BASELINE, RowResult, Settings, is_device_broken, release_memory, row
from workers.assemble import TakeParts
from workers.cache.dense import DenseCache
from workers.config import KernelName, RenderConfig
from workers.contracts import Kernel, KeyValues
from workers.errors import KernelUnavailable
from workers.kernels.select import Hardware, KernelNeed, choose, load_kernel, select_kernel
from workers.metrics import peak_gpu_bytes, reset_peak_gpu_bytes
from workers.model.rope import grid_positions

DENSE_KERNELS: tuple[KernelName, ...] = ("flash-attn-4", "flash-attn-3", "flashinfer", "sdpa")
_SHORT_CHUNKS, _LONG_CHUNKS = 7, 125
_FRAME_OF_PICTURES, _PICTURE_CHUNKS = 400, 4


class ReplayedCache:
    """A long history that every layer reads the same of; it takes nothing over."""

    def __init__(self, settings: Settings, num_chunks: int) -> None:
        self._layers = settings.backbone.num_layers
        self._keys = random_history(settings, num_chunks)

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        """Not remembered: the length is what is measured."""

    def read(self, layer_index: int) -> KeyValues | None:
        return self._keys

    @property
    def num_tokens(self) -> int:
        return self._keys.num_tokens

    @property
    def num_bytes(self) -> int:
        """As if every layer had its own."""
        return self._layers * self._keys.num_bytes

    def state(self) -> Mapping[str, Tensor]:
        raise NotImplementedError("a replayed cache is of no rollout")

    def restore(self, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError("a replayed cache is of no rollout")


def random_history(settings: Settings, num_chunks: int) -> KeyValues:
    """One layer's keys of so many chunks."""
    backbone, device = settings.backbone, settings.device
    num = num_chunks * backbone.chunk_latent_frames
    shape = (1, num * settings.frame_tokens, backbone.num_heads, backbone.head_dim)
    k, v = (torch.empty(shape, dtype=settings.dtype, device=device).normal_() for _ in range(2))
    return KeyValues(k, v, grid_positions(torch.arange(num, device=device), *backbone.token_grid(settings.latent_size)))


@torch.inference_mode()
def fastest_dense(settings: Settings, hardware: Hardware) -> tuple[Kernel, str]:
    """The dense kernel that takes least for a chunk's queries over a long history, and what each took."""
    need = KernelNeed(settings.dtype, settings.backbone.head_dim)
    history = random_history(settings, _LONG_CHUNKS)
    window = history.narrow(0, _SHORT_CHUNKS * settings.backbone.chunk_latent_frames * settings.frame_tokens)
    num_queries = settings.backbone.chunk_latent_frames * settings.frame_tokens
    q = torch.randn_like(history.k_BKND[:, :num_queries])
    taken: dict[str, tuple[float, float]] = {}
    kernels: dict[str, Kernel] = {}
    left_out = []
    for name in DENSE_KERNELS:
        if name == "flashinfer" and not settings.has_flashinfer:
            left_out.append("flashinfer: its kernels were not built")
            continue
        try:
            kernel = choose(name, hardware, need, load_kernel).kernel
            kernels[name] = kernel
            taken[name] = _milliseconds(kernel, q, window, settings), _milliseconds(kernel, q, history, settings)
        except (KernelUnavailable, RuntimeError) as error:
            left_out.append(f"{name}: {str(error)[:120]}")
    if not taken:
        kernel = select_kernel("auto", settings.device, need)
        return kernel, f"{kernel.version}; no other could run: {'; '.join(left_out)}"
    best = min(taken, key=lambda name: taken[name][1])
    each = ", ".join(f"{name} {short:.3g} / {long:.3g} ms" for name, (short, long) in taken.items())
    sizes = f"{num_queries:,} queries over {window.num_tokens:,} / {history.num_tokens:,} keys"
    return kernels[best], f"{kernels[best].version}, the fastest of {each} at {sizes}" + "".join(
        f"; not {reason}" for reason in left_out
    )


def _milliseconds(kernel: Kernel, q: Tensor, keys: KeyValues, settings: Settings) -> float:
    """Least of five, after one that may compile."""
    times = []
    for _ in range(6):
        if settings.device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        kernel.attend(q, (keys,))
        if settings.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
    return min(times[1:])


@dataclass(frozen=True)
class Curve:
    """Seconds of a chunk by the chunks before it."""

    num_chunks: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, chunk: float) -> float:
        """Linear between the lengths measured, and along the last piece beyond them."""
        x, y = np.array(self.num_chunks, float), np.array(self.seconds)
        if len(x) > 1 and chunk > x[-1]:
            return float(y[-1] + (chunk - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]))
        return float(np.interp(chunk, x, y))

    def total(self, num_chunks: int) -> float:
        """Of a whole rollout."""
        return sum(self.at(chunk) for chunk in range(num_chunks))

    def mean(self, chunks: range) -> float:
        return sum(self.at(chunk) for chunk in chunks) / len(chunks)


def measure_growing(stage: Stage, real: Sequence[int], replayed: Sequence[int]) -> tuple[Curve, RowResult, str]:
    """A chunk's time at every length that can be measured, and the figures that follow; pictures near frame 400."""
    settings = stage.settings
    taken: dict[int, float] = {}
    problems, fps_with_vae = [], None
    with_pictures = min(real, key=lambda num: abs(num * settings.chunk_frames - _FRAME_OF_PICTURES))
    peak_600, density, num_keys = None, None, 0
    _warm_up(stage, real[0])
    reset_peak_gpu_bytes(settings.device)
    parts = replace(stage.parts(), cache=DenseCache(settings.backbone.num_layers))
    for num in (*real, *replayed):
        is_real = num in real
        try:
            if is_real:
                filled = parts.cache.num_tokens // (settings.backbone.chunk_latent_frames * settings.frame_tokens)
                fill_cache(parts.cache, settings, range(filled, num))
            else:
                # Lets go of the one before first.
                parts = replace(stage.parts(), cache=DenseCache(settings.backbone.num_layers))
                release_memory(settings.device)
                parts = replace(stage.parts(), cache=ReplayedCache(settings, num))
            num_runs = 2 if num * settings.chunk_frames < 1000 else 1
            taken[num], density = _one_length(stage, parts, num, num_runs)
            num_keys = parts.cache.num_tokens
            if num == with_pictures:
                num_timed = min(_PICTURE_CHUNKS, settings.timed_chunks)
                fps_with_vae = settings.chunk_frames / stage.seconds_with_pictures(parts, num, num_timed)
        except Exception as error:
            if is_device_broken(error):
                raise
            kind = "kept whole" if is_real else "replayed"
            problems.append(f"{num} chunks {kind}: {type(error).__name__}: {str(error).strip()[:80]}")
        release_memory(settings.device)
        if is_real and num in taken and num * settings.chunk_frames >= 600:
            peak_600 = peak_gpu_bytes(settings.device) / 1e9
    if not taken:
        raise RuntimeError("; ".join(problems))
    curve = Curve(tuple(sorted(taken)), tuple(taken[num] for num in sorted(taken)))
    backbone = settings.backbone
    around_300 = range(backbone.chunk_of_frame(300), backbone.chunk_of_frame(400))
    last = range(settings.num_chunks - 9, settings.num_chunks)
    reaches = curve.num_chunks[-1] >= 0.95 * settings.num_chunks - 9
    result = RowResult(
        "",
        fps_300_400=settings.chunk_frames / curve.mean(around_300),
        fps_last_100=settings.chunk_frames / curve.mean(last) if reaches else None,
        fps_with_vae=fps_with_vae,
        peak_gb_600=peak_600,
        seconds_3000_frames=curve.total(settings.num_chunks) if reaches else None,
        cache_keys=num_keys,
        density=density,
    )
    each = ", ".join(f"{num} chunks {seconds:.3g} s" for num, seconds in sorted(taken.items()))
    whole = max((num for num in taken if num in real), default=0) * settings.chunk_frames
    text = (
        f"real cache up to frame {whole}, beyond that layer by layer on a replayed one, which is rotated for RoPE only "
        f"once; all layers' keys would take {parts.cache.num_bytes / 1e9:.0f} GB after {num} chunks; pictures after "
        f"{with_pictures} chunks; a chunk after {each}"
    )
    return curve, result, "; ".join((text, *problems))


def _warm_up(stage: Stage, num: int) -> None:
    """Chunks that are not timed, so that no compilation is: after a history of whole tiles, and after one more chunk.

    Sixteen chunks of any model here are whole tiles of 128 keys; policies that see tiles have a kernel for either case.
    """
    num = max(1, num - 16)
    parts = replace(stage.parts(), cache=DenseCache(stage.settings.backbone.num_layers))
    fill_cache(parts.cache, stage.settings, range(num))
    for _ in islice(stage.chunks(parts, num), 2):
        pass
    del parts
    release_memory(stage.settings.device)


def _one_length(stage: Stage, parts: TakeParts, num: int, num_runs: int) -> tuple[float, float]:
    """Seconds of a chunk after so many, and its density; of several the least, to leave out what is done once."""
    chunks = stage.chunks(parts, num)
    seconds, densities = [], []
    for _ in range(num_runs):
        begun = time.perf_counter()
        densities.append(next(chunks).density)
        seconds.append(time.perf_counter() - begun)
    return min(seconds), densities[0]


@row(BASELINE)
def dense_row(settings: Settings, hardware: Hardware) -> RowResult:
    """Everything before a chunk, with the fastest dense kernel of this run."""
    settings = _chunkwise(settings)
    kernel, said = fastest_dense(settings, hardware)
    release_memory(settings.device)
    stage = Stage.of(
        settings,
        make_dit(settings, compiled=settings.compiled),
        make_config(settings, compiled=settings.compiled),
        kernel,
        make_vae(settings)[0],
    )
    _, result, text = measure_growing(stage, settings.real_chunks, settings.replayed_chunks)
    return replace(result, compression_share=0.0, notes=f"{said}; {text}")


def baseline_row(policy: str, settings: Settings, hardware: Hardware) -> RowResult:
    """A policy that chooses among all keys, through the product's general path."""
    settings = _chunkwise(settings)
    tile = {"attention": {"kind": "svg", "tile": 128}} if policy == "svg" else {}  # tiles of 8 are for small pictures
    config = make_config(settings, compiled=settings.compiled, policy=policy, **tile)
    need = KernelNeed(settings.dtype, settings.backbone.head_dim, tiles=True)
    kernel = select_kernel("auto", settings.device, need)
    vae, _ = make_vae(settings)
    stage = Stage.of(settings, make_dit(settings, compiled=settings.compiled), config, kernel, vae)
    _, result, text = measure_growing(stage, settings.real_chunks[1:], settings.replayed_chunks)
    return replace(result, notes=f"{kernel.version}; {_parts_text(config)}; {text}")


def _parts_text(config: RenderConfig) -> str:
    """Settings of the policy's parts that are not what they are without it."""
    parts = (config.cache, config.attention, config.reuse, config.prompt_attention)
    shown = [f"{part.kind} {part.model_dump(exclude={'kind'}, exclude_none=True)}" for part in parts]
    said = ", ".join(text for text in shown if not text.startswith(("dense", "none"))).replace("'", "")
    return f"{said}; what choosing takes was not timed apart"


for _policy in ("radial", "svg"):
    row(_policy)(partial(baseline_row, _policy))


@row("annca")
def prompt_row(settings: Settings, hardware: Hardware) -> RowResult:
    """AnnCA alone: prompt tokens are pruned, self-attention is the baseline's."""
    settings = _chunkwise(settings)
    config = make_config(settings, compiled=settings.compiled, policy="annca")
    kernel, _ = fastest_dense(settings, hardware)
    release_memory(settings.device)
    vae, _ = make_vae(settings)
    stage = Stage.of(settings, make_dit(settings, compiled=settings.compiled), config, kernel, vae)
    _, result, text = measure_growing(stage, settings.real_chunks[1:], settings.replayed_chunks[-1:])
    said = f"{kernel.version}, the fastest dense one; {_parts_text(config)}; prompt without padding; {text}"
    return replace(result, notes=said)


def _chunkwise(settings: Settings) -> Settings:
    """Histories are measured with the model that goes chunk by chunk."""
    return settings if settings.backbone.rollout == "chunkwise" else settings.of("self-forcing-1.3b")


def flowcache_row(with_radial: bool, settings: Settings, hardware: Hardware) -> RowResult:
    """FlowCache's bounded cache and step reuse; with RadialAttention over it if wanted."""
    settings = _chunkwise(settings)
    # A third of the default budget: what its importance is judged by takes as much memory as the keys.
    parts: dict[str, Any] = {"cache": {"kind": "flow", "budget_latent_frames": settings.flow_latent_frames}}
    if with_radial:
        parts["attention"] = {"kind": "radial"}
    config = make_config(settings, compiled=settings.compiled, policy="flowcache", **parts)
    need = KernelNeed(settings.dtype, settings.backbone.head_dim, tiles=with_radial)
    kernel = select_kernel("auto", settings.device, need)
    vae, _ = make_vae(settings)
    stage = Stage.of(settings, make_dit(settings, compiled=settings.compiled), config, kernel, vae)
    num_fill = settings.flow_latent_frames // settings.backbone.chunk_latent_frames + 2
    result = measure_bounded(stage, with_vae=True, num_fill=num_fill)
    notes = (
        f"{kernel.version}; {_parts_text(config)}; bounded: begun at frames 300, 600 and 2900 with a full cache of "
        f"random keys; which steps are reused follows from random weights; peaks without VAE work, {result.notes}"
    )
    return replace(result, notes=notes)


row("flowcache")(partial(flowcache_row, False))
row("flowcache + radial")(partial(flowcache_row, True))

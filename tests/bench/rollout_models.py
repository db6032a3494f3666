"""Models with random weights at their true sizes, made where they stay, and the product's parts around them.

Weights change neither time nor memory; a cache is filled with random keys as if the video had come so far.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cluster.object_store import open_store
from tests.bench.random_wan import PICTURE_CONTRAST
from tests.bench.rollout_rows import Settings
from workers.assemble import LoadedModel, TakeParts, prepare_take
from workers.assemble_policies import make_attention
from workers.config import BackboneConfig, GuardConfig, RenderConfig, SamplingConfig, VideoConfig
from workers.contracts import Kernel, KeyValues, KVCache, PromptKeys
from workers.denoise import draw_noise, make_schedule
from workers.metrics import Stopwatch
from workers.model.compiled import compile_around_attention
from workers.model.dit import CausalDiT
from workers.model.rope import grid_positions
from workers.model.vae import PictureDecoder, to_pictures
from workers.model.wan_vae import WanVae, make_wan_vae
from workers.rollout import CleanChunk, Rollout, RolloutPlan
from workers.rollouts.beside import work_beside
from workers.rollouts.rolling_window import RollingWindowRollout
from workers.rollouts.select import make_rollout
from workers.video.writer import VideoWriter

SEED = 7
_COMPILED: dict[int, CausalDiT] = {}
_ENDLESS = 100_000
"""Chunks of a plan that is left when enough of it was timed, so that no chunk is a last one, which is cheaper."""


def make_dit(settings: Settings, *, compiled: bool) -> CausalDiT:
    """The transformer, fused and ready; its numbers stay finite over any number of layers."""
    with torch.device("meta"):
        dit = CausalDiT(settings.backbone)
    dit = dit.to(settings.dtype).to_empty(device=settings.device)
    fill_random(dit, settings)
    dit.fuse_projections()
    if compiled:
        dit.share_compiled(_compiled_like(settings))
    return dit


def _compiled_like(settings: Settings) -> CausalDiT:
    """A model without memory whose compiled pieces all models of its width in this process share."""
    key = settings.backbone.dim
    if key not in _COMPILED:
        with torch.device("meta"):
            _COMPILED[key] = CausalDiT(settings.backbone)
        compile_around_attention(_COMPILED[key])
    return _COMPILED[key]


def make_vae_network(settings: Settings) -> nn.Module:
    """Wan's VAE through diffusers; its pictures lie around a middle grey and are about as hard to encode as a film."""
    with torch.device("meta"):
        module = make_wan_vae(settings.backbone)
    module = module.to_empty(device=settings.device)
    fill_random(module, settings)
    # Noise of full contrast takes x264 70 ms a picture: then the encoder would be timed, and nothing else.
    module.get_parameter("decoder.conv_out.weight").data.mul_(PICTURE_CONTRAST)
    return module.to(settings.dtype)


def make_vae(settings: Settings) -> tuple[WanVae, str]:
    """The product's decoder, unless another is asked for; and which it is."""
    vae = WanVae(make_vae_network(settings), route=settings.vae_route)
    return vae, vae.version or "VAE by the library"


def decode_milliseconds(vae: WanVae, latents_BTCHW: Tensor, num_timed: int = 3) -> float:
    """Least of some chunks in the middle of a video, alone on the GPU."""
    stream, times = vae.stream(), []
    for _ in range(2 + num_timed):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        stream.decode(latents_BTCHW)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
    return min(times[2:])


def fill_random(module: nn.Module, settings: Settings) -> None:
    generator = torch.Generator(settings.device).manual_seed(SEED)
    for name, parameter in module.named_parameters():
        is_norm = name.endswith("gamma") or (parameter.dim() == 1 and name.endswith("weight"))
        if is_norm:
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            fan_in = max(1, parameter[0].numel())
            parameter.data.normal_(0.0, fan_in**-0.5, generator=generator)
    module.eval().requires_grad_(False)


def make_config(settings: Settings, *, compiled: bool, **parts: Any) -> RenderConfig:
    """A render of that size with these parts."""
    native = settings.backbone.native
    sampling = SamplingConfig() if native is None else SamplingConfig(num_steps=native.num_steps, shift=native.shift)
    dtype = "bfloat16" if settings.dtype == torch.bfloat16 else "float32"
    return RenderConfig(
        backbone=BackboneConfig(name=settings.backbone.name, dtype=dtype, compiled=compiled),
        sampling=parts.pop("sampling", sampling),
        video=VideoConfig(width=settings.width, height=settings.height, num_frames=settings.num_frames),
        **parts,
    )


@dataclass(frozen=True)
class Stage:
    """A loaded model with the parts of one policy; takes are begun anywhere in the video."""

    settings: Settings
    model: LoadedModel
    prompt: list[PromptKeys]

    @classmethod
    def of(
        cls, settings: Settings, dit: CausalDiT, config: RenderConfig, kernel: Kernel, vae: PictureDecoder | None = None
    ) -> Stage:
        sampling = config.sampling
        model = LoadedModel(
            config=config,
            backbone=settings.backbone,
            device=settings.device,
            dit=dit,
            text_encoder=cast(Any, None),  # the prompt is random
            vae=cast(PictureDecoder, vae),
            kernel=kernel,
            schedule=make_schedule(sampling.num_steps, sampling.shift),
            revision="random",
        )
        generator = torch.Generator(settings.device).manual_seed(SEED + 1)
        shape = (1, settings.backbone.text_tokens, settings.backbone.text_dim)
        text = torch.randn(shape, generator=generator, device=settings.device)
        with torch.inference_mode():
            return cls(settings, model, dit.project_prompt(text))

    def parts(self) -> TakeParts:
        """Fresh, with an empty cache."""
        return prepare_take(self.model, 0)

    def plan(self) -> RolloutPlan:
        backbone = self.settings.backbone
        shape = (1, backbone.chunk_latent_frames, backbone.latent_channels, *self.settings.latent_size)
        return RolloutPlan(
            num_chunks=_ENDLESS,
            latent_size=self.settings.latent_size,
            schedule=self.model.schedule,
            guidance=1.0,
            noise=lambda chunk, step: draw_noise(SEED, chunk, step, shape),
            prompt=lambda index: [self.prompt],
            control=lambda index: None,
        )

    def rollout(self, parts: TakeParts) -> Rollout | RollingWindowRollout:
        attention, _ = make_attention(
            GuardConfig(), self.settings.backbone, parts.cache, parts.policy, self.model.kernel, parts.reindex
        )
        stopwatch = Stopwatch(self.settings.device)
        return make_rollout(self.model.dit, attention, stopwatch, parts.reuse, None, parts.attend_prompt)

    def chunks(self, parts: TakeParts, first_chunk: int) -> Iterator[CleanChunk]:
        """Chunks from there on, without end; the cache must hold what came before."""
        rollout = self.rollout(parts)
        if isinstance(rollout, RollingWindowRollout):
            rollout.restore(_in_flight(self.settings, first_chunk, self.model.schedule.num_steps))
        return rollout.run(self.plan(), first_chunk)

    def seconds(self, parts: TakeParts, first_chunk: int, num_timed: int, *, num_warm: int = 1) -> float:
        """Of one chunk, denoising and clean pass alone, on average."""
        return mean_step(_times(self.chunks(parts, first_chunk), num_warm + num_timed)[num_warm:])

    def seconds_with_pictures(self, parts: TakeParts, first_chunk: int, num_timed: int) -> float:
        """The same with each chunk's pictures decoded beside the next one, encoded and written to a file."""
        return seconds_with_pictures(self.chunks(parts, first_chunk), self.model.vae, self.settings, num_timed)


def seconds_with_pictures(
    chunks: Iterator[CleanChunk], vae: PictureDecoder, settings: Settings, num_timed: int, *, num_warm: int = 3
) -> float:
    """Of one chunk whose pictures are decoded beside the next one, as the product does it, and encoded by its writer.

    Args:
        chunks: More than `num_warm + num_timed`; their latents are not written to again.
        vae: Of the model.
        settings: Size of the pictures.
        num_timed: Chunks that count.
        num_warm: Chunks before them.
    """
    decoder = vae.stream()
    video = VideoConfig(width=settings.width, height=settings.height)
    with tempfile.TemporaryDirectory() as folder:
        writer = VideoWriter(open_store(folder), "video.mp4", "segments", video, {}, _ENDLESS)

        def decode(chunk: CleanChunk) -> NDArray[np.uint8]:
            # Latents of random weights grow over a long rollout until pictures are noise, and x264 would be timed.
            latents_BTCHW = chunk.latents_BTCHW / chunk.latents_BTCHW.std()
            return to_pictures(decoder.decode(latents_BTCHW)[0]).cpu().numpy()

        def written() -> Iterator[None]:
            for _, frames in work_beside(chunks, decode, settings.device, contextlib.nullcontext):
                writer.write(frames)
                yield

        try:
            times = _times(written(), num_warm + num_timed)
            print(
                f"with pictures: {writer.blocked_s:.2f} of {times[-1] - times[0]:.2f} s waited for the encoder",
                flush=True,
            )
            return mean_step(times[num_warm:])
        finally:
            writer.abort()


def _in_flight(settings: Settings, first_chunk: int, num_levels: int) -> dict[str, Tensor]:
    """Chunks of a rolling window that are under way when chunk `first_chunk` is about to be finished."""
    backbone = settings.backbone
    shape = (1, backbone.chunk_latent_frames, backbone.latent_channels, *settings.latent_size)
    generator = torch.Generator(settings.device).manual_seed(SEED + 2)
    return {
        str(first_chunk + i): torch.randn(shape, generator=generator, device=settings.device)
        for i in range(num_levels - 1)
    }


def _times(chunks: Iterator[Any], num: int) -> list[float]:
    """The clock before the first of them and after each; every chunk ends with the device done."""
    times = [time.perf_counter()]
    for _ in islice(chunks, num):
        times.append(time.perf_counter())
    closing = getattr(chunks, "close", None)
    if closing is not None:
        closing()
    return times


def mean_step(times: Sequence[float]) -> float:
    steps = [after - before for before, after in pairwise(times)]
    return sum(steps) / len(steps)


@torch.inference_mode()
def fill_cache(cache: KVCache, settings: Settings, chunks: Iterable[int]) -> None:
    """Give a cache random clean keys of these chunks, as the clean passes would have."""
    backbone, device = settings.backbone, settings.device
    generator = torch.Generator(device).manual_seed(SEED + 3)
    num = backbone.chunk_latent_frames
    shape = (1, num * settings.frame_tokens, backbone.num_heads, backbone.head_dim)
    for chunk in chunks:
        time_T = torch.arange(chunk * num, (chunk + 1) * num, device=device)
        position = grid_positions(time_T, *backbone.token_grid(settings.latent_size))
        for layer in range(backbone.num_layers):
            k, v = (
                torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(settings.dtype)
                for _ in range(2)
            )
            cache.append(layer, KeyValues(k, v, position))

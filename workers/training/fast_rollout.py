"""Many rollouts side by side, for measuring and distilling: chunk by chunk with a cache, as the service does it, but
with keys kept after RoPE in one buffer of known length. The service's own rollout is the plain reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import PromptKeys
from workers.denoise import Schedule, clean_estimate
from workers.model.control import control_maps
from workers.model.rope import Rotation, grid_positions, make_rotation, rotate
from workers.training.sequence import WorldModel

Visible = Callable[[int], Sequence[int]]
"""(chunk index) -> earlier chunks that it may see, ascending."""


def sees_all(chunk: int) -> Sequence[int]:
    """Full history."""
    return range(chunk)


def sees_window(chunk: int) -> Sequence[int]:
    """The first chunk and the last seven: sink 3 and 21 latent frames."""
    return sorted({0, *range(max(0, chunk - 7), chunk)} - {chunk})


def sees_none(chunk: int) -> Sequence[int]:
    """No history at all."""
    return ()


class FastRollout:
    """B rollouts of at most so many chunks.

    Args:
        model: In evaluation, not compiled.
        camera_BTS2: Camera of all latent frames.
        times_BT: Their time indices.
        prompt: Cross-attention keys.
        visible: Which chunks a chunk sees.
    """

    def __init__(
        self,
        model: WorldModel,
        camera_BTS2: Tensor,
        times_BT: Tensor,
        prompt: list[PromptKeys],
        visible: Visible = sees_all,
    ) -> None:
        b = model.backbone
        self.model, self.backbone, self.visible, self.prompt = model, b, visible, prompt
        self.camera, self.times = camera_BTS2, times_BT
        self.frames = b.chunk_latent_frames
        self.latent_h, self.latent_w = b.latent_size(b.width, b.height)
        self.tokens = self.frames * b.tokens_per_latent_frame(b.width, b.height)
        chunks = times_BT.shape[1] // self.frames
        shape = (2, b.num_layers, len(times_BT), b.num_heads, chunks * self.tokens, b.head_dim)
        dtype = torch.bfloat16 if camera_BTS2.is_cuda else torch.float32
        self.keys_values = torch.zeros(shape, dtype=dtype, device=camera_BTS2.device)
        self._gathered: list[tuple[Tensor, Tensor]] | None = None
        self._rotation: Rotation | None = None
        self._chunk = 0

    def enter(self, chunk: int) -> None:
        """Make ready for the passes of this chunk."""
        b, part = self.backbone, slice(chunk * self.frames, (chunk + 1) * self.frames)
        positions = grid_positions(self.times[:, part], self.latent_h // b.patch[1], self.latent_w // b.patch[2])
        self._rotation = make_rotation(positions, b.head_dim, b.rope_theta)
        maps = control_maps(self.camera[:, part], b.width, b.height, b)
        self._control = self.model.dit.embed_control(maps)
        self._chunk = chunk
        seen = list(self.visible(chunk))
        self._gathered = None
        if seen != list(range(chunk)):
            width = self.tokens
            index = [torch.arange(c * width, (c + 1) * width, device=self.camera.device) for c in seen]
            chosen = torch.cat(index) if index else torch.zeros(0, dtype=torch.long, device=self.camera.device)
            self._gathered = [
                (self.keys_values[0, i].index_select(2, chosen), self.keys_values[1, i].index_select(2, chosen))
                for i in range(b.num_layers)
            ]

    def _attend(self, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert self._rotation is not None
        dtype = self.keys_values.dtype
        q = rotate(q, self._rotation).to(dtype).transpose(1, 2)
        k = rotate(k, self._rotation).to(dtype).transpose(1, 2)
        v = v.to(dtype).transpose(1, 2)
        start, end = self._chunk * self.tokens, (self._chunk + 1) * self.tokens
        all_k, all_v = self.keys_values[0, layer_index], self.keys_values[1, layer_index]
        all_k[:, :, start:end], all_v[:, :, start:end] = k, v
        if self._gathered is None:
            k, v = all_k[:, :, :end], all_v[:, :, :end]
        else:
            past_k, past_v = self._gathered[layer_index]
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def flow(self, latents: Tensor, level: float, prompt: list[PromptKeys] | None = None) -> Tensor:
        """Flow of this chunk at a noise level; leaves its keys behind, those of the last call stay."""
        timestep = torch.full(latents.shape[:2], level * 1000, device=latents.device)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
            out = self.model.dit(latents, timestep, prompt or self.prompt, self._attend, control_BQE=self._control)
        assert isinstance(out, Tensor)
        return out.float()

    def write(self, chunk: int, latents: Tensor) -> None:
        """Put a finished chunk into the cache (the clean pass)."""
        self.enter(chunk)
        self.flow(latents, 0.0)

    def denoise(
        self,
        chunk: int,
        schedule: Schedule,
        generator: torch.Generator,
        *,
        renoise: bool,
        guidance: float = 1.0,
        empty: list[PromptKeys] | None = None,
    ) -> Tensor:
        """A new chunk from noise; does not write it."""
        self.enter(chunk)
        shape = (len(self.times), self.frames, self.backbone.latent_channels, self.latent_h, self.latent_w)
        x = torch.randn(shape, device=self.camera.device, generator=generator)
        for index, sigma in enumerate(schedule.sigmas):
            flow = self.flow(x, sigma)
            if guidance != 1.0:
                without = self.flow(x, sigma, empty)
                flow = without + guidance * (flow - without)
            after = schedule.next_sigma(index)
            if renoise:
                fresh = torch.randn(shape, device=x.device, generator=generator)
                x = (1 - after) * clean_estimate(x, flow, sigma) + after * fresh
            else:
                x = x + (after - sigma) * flow
        return x

    @torch.no_grad()
    def run(self, denoise: Callable[[int], Tensor], given_BTCHW: Tensor | None = None, first_free: int = 0) -> Tensor:
        """Latents of all chunks, each written before the next.

        Args:
            denoise: Makes the chunk of this index.
            given_BTCHW: What the chunks before ``first_free`` are.
            first_free: From this chunk on they are made.
        """
        chunks = self.times.shape[1] // self.frames
        made = []
        for index in range(chunks):
            if index >= first_free:
                made.append(denoise(index))
            else:
                assert given_BTCHW is not None
                made.append(given_BTCHW[:, index * self.frames : (index + 1) * self.frames])
            if index + 1 < chunks:
                self.write(index, made[-1])
        return torch.cat(made, 1)

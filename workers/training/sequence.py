"""One parallel pass over [clean chunks | noisy chunks]: what a rollout does chunk by chunk, for all chunks at once.

Clean chunk i sees clean chunks up to i; noisy chunk i sees clean chunks before i and itself. That is teacher forcing
without ever running a cache, and equal to a cached rollout (tested). The memory stage asks for other noisy chunks than
the next ones: then each of them says how many clean chunks it sees (`cuts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.contracts import PromptKeys
from workers.model.backbones import Backbone
from workers.model.control import control_maps
from workers.model.dit import CausalDiT
from workers.model.rope import Rotation, grid_positions, make_rotation, rotate
from workers.model.text_encoder import EncodedText, TextEncoder, fold_padding
from workers.training.feed import Batch


class WorldModel(nn.Module):
    """DiT and text encoder, which are trained together and saved together."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.dit = CausalDiT(backbone)
        self.text_encoder = TextEncoder(backbone)

    def prompt_keys(self, rows_BPF: Tensor, num_tokens_B: Tensor) -> list[PromptKeys]:
        """Cross-attention keys of tokenized prompts."""
        encoded: EncodedText = self.text_encoder(rows_BPF, num_tokens_B)
        folded = fold_padding(encoded, self.backbone.text_tokens)
        return self.dit.project_prompt(folded.text_BPE, folded.log_mass_BP)


class ParallelAttention:
    """Masked self-attention over clean and noisy chunks; one object a run, so that compiled code stays valid.

    Args:
        backbone: Sizes of tokens and heads.
        chunks: Clean chunks.
        device: Of everything.
        cuts: For each noisy chunk the number of clean chunks that it sees; chunk i sees the i before it if not given.
        plain: Use a dense mask, as without a GPU, instead of a compiled kernel that leaves out what is hidden.
    """

    def __init__(
        self,
        backbone: Backbone,
        chunks: int,
        device: torch.device,
        cuts: Sequence[int] | None = None,
        *,
        plain: bool = False,
    ) -> None:
        self.backbone, self.chunks, self.cuts = backbone, chunks, cuts
        frame_tokens = backbone.tokens_per_latent_frame(backbone.width, backbone.height)
        self.chunk_tokens = backbone.chunk_latent_frames * frame_tokens
        self.half = self.chunk_tokens * chunks
        self.block_mask: Any = None
        self.mask_QK: Tensor | None = None
        length = self.half + (chunks if cuts is None else len(cuts)) * self.chunk_tokens
        index = torch.arange(length, device=device)
        if device.type == "cuda" and not plain:
            from torch.nn.attention.flex_attention import create_block_mask

            self.block_mask = create_block_mask(
                lambda b, h, q, k: self.sees(q, k), None, None, length, length, device="cuda", BLOCK_SIZE=128
            )
        else:
            self.mask_QK = self.sees(index[:, None], index[None, :])
        self.cos: Tensor | None = None
        self.sin: Tensor | None = None

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query token sees a key token, by their places in the doubled sequence."""
        query_chunk, key_chunk = query // self.chunk_tokens, key // self.chunk_tokens
        noisy_query, noisy_key = query >= self.half, key >= self.half
        own = noisy_query & noisy_key & (query_chunk == key_chunk)
        past = noisy_query & ~noisy_key & (key_chunk < self._cut(query_chunk - self.chunks))
        clean = ~noisy_query & ~noisy_key & (key_chunk <= query_chunk)
        return own | past | clean

    def _cut(self, noisy_chunk: Tensor) -> Tensor:
        """How many clean chunks a noisy chunk sees; sums of comparisons, because the mask is compiled into kernels."""
        if self.cuts is None:
            return noisy_chunk
        cut = (noisy_chunk >= 0) * self.cuts[0]
        for index in range(1, len(self.cuts)):
            if self.cuts[index] != self.cuts[index - 1]:
                cut = cut + (noisy_chunk >= index) * (self.cuts[index] - self.cuts[index - 1])
        return cut

    def place(self, times_BT: Tensor, noisy_times_BT: Tensor | None = None) -> None:
        """Set the positions of the tokens of the next passes; noisy chunks stand where clean ones do if not told."""
        b = self.backbone
        latent_h, latent_w = b.latent_size(b.width, b.height)
        times = torch.cat([times_BT, times_BT if noisy_times_BT is None else noisy_times_BT], 1)
        positions = grid_positions(times, latent_h // b.patch[1], latent_w // b.patch[2])
        cos, sin = make_rotation(positions, b.head_dim, b.rope_theta)
        if self.cos is None or self.sin is None or self.cos.shape != cos.shape:
            self.cos, self.sin = cos, sin
        else:
            self.cos.copy_(cos)
            self.sin.copy_(sin)

    def __call__(self, layer_index: int, q_BQND: Tensor, k_BQND: Tensor, v_BQND: Tensor) -> Tensor:
        assert self.cos is not None
        assert self.sin is not None
        rotation = Rotation(self.cos, self.sin)
        q = rotate(q_BQND, rotation).to(v_BQND.dtype).transpose(1, 2)
        k = rotate(k_BQND, rotation).to(v_BQND.dtype).transpose(1, 2)
        v = v_BQND.transpose(1, 2)
        if self.block_mask is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask_QK).transpose(1, 2)
        from torch.nn.attention.flex_attention import flex_attention

        out = flex_attention(q, k, v, block_mask=self.block_mask)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)


@dataclass
class Pass:
    """What stays the same in all passes over one batch."""

    clean_BTCHW: Tensor
    clean_level_BT: Tensor
    control_BTCHW: Tensor
    rows_BPF: Tensor
    num_tokens_B: Tensor


def prepare(batch: Batch, attention: ParallelAttention, context_noise: Tensor, level_BT: Tensor) -> Pass:
    """Place the tokens, make control maps and put noise on the context.

    Args:
        batch: Clips.
        attention: Gets the positions.
        context_noise: Standard normal numbers, shaped as the latents.
        level_BT: Noise level of each context frame.
    """
    backbone = attention.backbone
    attention.place(batch.times_BT)
    level = level_BT[..., None, None, None]
    clean = batch.latents_BTCHW * (1 - level) + context_noise * level
    control = control_maps(batch.camera_BTS2, backbone.width, backbone.height, backbone)
    return Pass(clean, level_BT, control, batch.rows_BPF, batch.num_tokens_B)


def predict_flow(
    model: WorldModel,
    fixed: Pass,
    noisy_BTCHW: Tensor,
    level_BT: Tensor,
    attention: ParallelAttention,
    *,
    prompt: bool = True,
) -> Tensor:
    """Flow of the noisy chunks, float32; without ``prompt`` as if all captions were empty."""
    tokens = fixed.num_tokens_B if prompt else torch.zeros_like(fixed.num_tokens_B)
    keys = model.prompt_keys(fixed.rows_BPF, tokens)
    control = model.dit.embed_control(fixed.control_BTCHW)
    flow = model.dit(
        torch.cat([fixed.clean_BTCHW, noisy_BTCHW], 1),
        torch.cat([fixed.clean_level_BT, level_BT], 1) * 1000,
        keys,
        attention,
        control_BQE=torch.cat([control, control], 1),
    )
    assert isinstance(flow, Tensor)
    return flow[:, noisy_BTCHW.shape[1] :].float()

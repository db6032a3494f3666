"""The causal video DiT: one class for the bundled model and for Wan checkpoints (parameter names are Wan's).

Self-attention is handed in: `attend` gets queries and keys BEFORE RoPE, because caches keep keys so. Training passes a
masked attention over the whole sequence, a rollout passes cache, policy and kernel. Causality is not in the weights.
Reference for shapes and formulas: Wan2.1 (Apache-2.0); the per-frame timestep is that of its causal variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.contracts import PromptKeys, StepReuse
from workers.model.backbones import Backbone
from workers.model.gelu import TanhGelu

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer_index, q_BQND, k_BQND, v_BQND) -> out_BQND, with q and k before RoPE."""

AttendPrompt = Callable[[int, Tensor, PromptKeys], Tensor]
"""(layer_index, q_BQND, keys) -> out_BQND."""

AddAfterLayer = Callable[[int, Tensor, Tensor], Tensor]
"""(layer_index, x_BQE, time_BT6E) -> x_BQE: what a control branch adds to the tokens that leave a layer."""


def attend_prompt_dense(layer_index: int, q_BQND: Tensor, keys: PromptKeys) -> Tensor:
    """Every query sees every prompt row; image tokens, if any, are a second softmax whose result is added."""
    bias = None if keys.log_mass_BP is None else keys.log_mass_BP[:, None, None, :].to(q_BQND.dtype)
    q = q_BQND.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, keys.k_BPND.transpose(1, 2), keys.v_BPND.transpose(1, 2), attn_mask=bias)
    if keys.k_image_BPND is not None and keys.v_image_BPND is not None:
        out = out + F.scaled_dot_product_attention(
            q, keys.k_image_BPND.transpose(1, 2), keys.v_image_BPND.transpose(1, 2)
        )
    return out.transpose(1, 2)


class RmsNorm(nn.Module):
    """Root-mean-square norm over the WHOLE width, before the split into heads."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), None, self.eps) * self.weight.to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        dim = backbone.dim
        self.num_heads = backbone.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RmsNorm(dim, backbone.eps), RmsNorm(dim, backbone.eps)
        self._fused: tuple[Tensor, Tensor] | None = None

    def fuse(self) -> tuple[Tensor, Tensor]:
        """Queries, keys and values by one product; their weights become views of one, under the names they had."""
        parts = (self.q, self.k, self.v)
        weight = torch.cat([part.weight.detach() for part in parts])
        bias = torch.cat([part.bias.detach() for part in parts])
        for part, w, b in zip(parts, weight.chunk(3), bias.chunk(3), strict=True):
            part.weight.data, part.bias.data = w, b
        self._fused = weight, bias
        return self._fused

    @property
    def fused(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one product; fuses first."""
        return self._fused or self.fuse()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._fused = None  # the parameters move apart
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def project(self, x_BQE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, Q, N, D], before RoPE."""
        if self._fused is None:
            q, k, v = self.q(x_BQE), self.k(x_BQE), self.v(x_BQE)
        else:
            q, k, v = F.linear(x_BQE, *self._fused).chunk(3, dim=-1)
        heads = (self.num_heads, -1)
        return self.norm_q(q).unflatten(-1, heads), self.norm_k(k).unflatten(-1, heads), v.unflatten(-1, heads)

    def forward(self, x_BQE: Tensor, layer_index: int, attend: Attend) -> Tensor:
        return cast(Tensor, self.o(attend(layer_index, *self.project(x_BQE)).flatten(-2)))


class CrossAttention(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        dim = backbone.dim
        self.num_heads = backbone.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RmsNorm(dim, backbone.eps), RmsNorm(dim, backbone.eps)
        self.takes_image = backbone.image_dim > 0
        if self.takes_image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RmsNorm(dim, backbone.eps)

    def project(self, text_BPE: Tensor, log_mass_BP: Tensor | None, image_BPE: Tensor | None) -> PromptKeys:
        """Keys and values of a prompt, to be computed once and reused in every step."""
        heads = (self.num_heads, -1)
        k = self.norm_k(self.k(text_BPE)).unflatten(-1, heads)
        v = self.v(text_BPE).unflatten(-1, heads)
        if image_BPE is None:
            return PromptKeys(k, v, log_mass_BP)
        k_image = self.norm_k_img(self.k_img(image_BPE)).unflatten(-1, heads)
        return PromptKeys(k, v, log_mass_BP, k_image, self.v_img(image_BPE).unflatten(-1, heads))

    def project_queries(self, x_BQE: Tensor) -> Tensor:
        return cast(Tensor, self.norm_q(self.q(x_BQE)).unflatten(-1, (self.num_heads, -1)))

    def forward(self, x_BQE: Tensor, keys: PromptKeys, layer_index: int, attend: AttendPrompt) -> Tensor:
        return cast(Tensor, self.o(attend(layer_index, self.project_queries(x_BQE), keys).flatten(-2)))


class Layer(nn.Module):
    """One transformer layer: self-attention and feed-forward modulated by the timestep of each token's latent frame."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        dim = backbone.dim
        self.eps = backbone.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = SelfAttention(backbone)
        self.norm3 = nn.LayerNorm(dim, backbone.eps)
        self.cross_attn = CrossAttention(backbone)
        self.ffn = nn.Sequential(nn.Linear(dim, backbone.ffn_dim), TanhGelu(), nn.Linear(backbone.ffn_dim, dim))

    def forward(
        self,
        x_BQE: Tensor,
        time_BT6E: Tensor,
        keys: PromptKeys,
        layer_index: int,
        attend: Attend,
        attend_prompt: AttendPrompt,
    ) -> Tensor:
        m = (self.modulation + time_BT6E).unsqueeze(3).unbind(2)  # six of [B, T, 1, E]: the 1 spans a frame's tokens
        h = self.self_attn(modulate(x_BQE, m[0], m[1], self.eps), layer_index, attend)
        x_BQE = add_gated(x_BQE, h, m[2])
        x_BQE = x_BQE + self.cross_attn(self.norm3(x_BQE), keys, layer_index, attend_prompt)
        h = self.ffn(modulate(x_BQE, m[3], m[4], self.eps))
        return add_gated(x_BQE, h, m[5])

    def modulate_input(self, x_BQE: Tensor, time_BT6E: Tensor) -> Tensor:
        """What self-attention gets of this input, with its timestep."""
        shift, scale = (self.modulation + time_BT6E)[:, :, :2].unsqueeze(3).unbind(2)
        return modulate(x_BQE, shift, scale, self.eps)


class Head(nn.Module):
    """From tokens back to latent patches; modulated by the time embedding itself, before its projection."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.eps = backbone.eps
        self.head = nn.Linear(backbone.dim, math.prod(backbone.patch) * backbone.latent_channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, backbone.dim))

    def forward(self, x_BQE: Tensor, time_BTE: Tensor) -> Tensor:
        shift, scale = (self.modulation + time_BTE.unsqueeze(2)).unsqueeze(3).unbind(2)
        return cast(Tensor, self.head(modulate(x_BQE, shift, scale, self.eps)))


class ImageProjection(nn.Module):
    """Image tokens to the model's width (I2V only)."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, image_BPE: Tensor) -> Tensor:
        return cast(Tensor, self.proj(image_BPE))


class CausalDiT(nn.Module):
    """Flow `noise - clean` of noisy latents, with one timestep per latent frame.

    A fresh model returns zero (its head is zero); `reset_parameters` says how the rest begins.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        b, dim = backbone, backbone.dim
        self.backbone = backbone
        self.patch_embedding = nn.Conv3d(b.in_channels, dim, b.patch, b.patch)
        self.text_embedding = nn.Sequential(nn.Linear(b.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(b.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Layer(b) for _ in range(b.num_layers))  # Wan's key for layers
        self.head = Head(b)
        if b.image_dim:
            self.img_emb = ImageProjection(b.image_dim, dim)
        if b.control_channels:
            self.control_embedding = nn.Conv3d(b.control_channels, dim, b.patch, b.patch)
        self._run_layer: Callable[..., Tensor] = _run_layer
        self._is_compiled = False
        self.reset_parameters()

    def reset_parameters(self, *, zero_output: bool = True) -> None:
        """Start values from torch's global generator.

        Each layer begins as the identity with open gates (outputs of attention and feed-forward are zero, gates one),
        and the head returns zero; with `zero_output=False` these are random too, which tests need: zeros hide errors.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(cast(Tensor, module.bias))
        for linear in (self.time_embedding[0], self.time_embedding[2], self.time_projection[1]):
            nn.init.normal_(cast(nn.Linear, linear).weight, std=0.02)
        outputs = [self.head.head]
        for layer in self.layers:
            nn.init.zeros_(layer.modulation)
            nn.init.ones_(layer.modulation[:, 2::3])
            outputs += [layer.self_attn.o, layer.cross_attn.o, cast(nn.Linear, layer.ffn[2])]
        nn.init.zeros_(self.head.modulation)
        if zero_output:
            for linear in outputs:
                nn.init.zeros_(linear.weight)

    @property
    def layers(self) -> Sequence[Layer]:
        return cast(Sequence[Layer], self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        return self.head.modulation.dtype

    def fuse_projections(self) -> None:
        """For rendering, once all weights are where they stay: fewer and larger products; moving undoes it."""
        for layer in self.layers:
            layer.self_attn.fuse()

    def run_layers_by(self, run_layer: Callable[..., Tensor]) -> None:
        """Have another function run each layer, with the arguments of `_run_layer`."""
        self._run_layer = run_layer

    def compile_layers(self) -> None:
        """Compile one function that serves all layers, for fixed shapes.

        From then on `attend` and `attend_prompt` get layer_index -1: a number that changes would compile each layer
        anew. So this is for training, where all layers attend alike.
        """
        self._run_layer = torch.compile(_run_layer, dynamic=False)
        self._is_compiled = True

    def share_compiled(self, other: CausalDiT) -> None:
        """Run the function that another model of the same sizes has compiled, instead of compiling once more."""
        self._run_layer, self._is_compiled = other._run_layer, other._is_compiled

    def embed_control(self, control_BTCHW: Tensor) -> Tensor:
        """Control maps on the latent grid as tokens, to be added in `forward`; once per chunk is enough."""
        return _embed_patches(control_BTCHW.to(self.dtype), self.control_embedding)

    def embed_patches(self, latents_BTCHW: Tensor) -> Tensor:
        """Latents [B, T, in channels, H, W] as tokens, in the order (latent frame, row, column)."""
        return _embed_patches(latents_BTCHW.to(self.dtype), self.patch_embedding)

    def embed_prompt(self, text_BPE: Tensor, image_BPE: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Rows of the prompt and image tokens at the width of the model: what all layers project their keys from."""
        text = self.text_embedding(text_BPE.to(self.dtype))
        return text, None if image_BPE is None else self.img_emb(image_BPE.to(self.dtype))

    def project_prompt(
        self, text_BPE: Tensor, log_mass_BP: Tensor | None = None, image_BPE: Tensor | None = None
    ) -> list[PromptKeys]:
        """Cross-attention keys of all layers.

        Args:
            text_BPE: Encoded prompt with zero rows as padding; padding IS attended (the models are trained so).
            log_mass_BP: Weight of each row when equal rows were folded into one (`fold_padding`).
            image_BPE: Image tokens of I2V models, before their projection.
        """
        text, image = self.embed_prompt(text_BPE, image_BPE)
        return [layer.cross_attn.project(text, log_mass_BP, image) for layer in self.layers]

    def forward(
        self,
        latents_BTCHW: Tensor,
        timestep_BT: Tensor,
        prompt: Sequence[PromptKeys],
        attend: Attend,
        *,
        control_BQE: Tensor | None = None,
        attend_prompt: AttendPrompt = attend_prompt_dense,
        add_after_layer: AddAfterLayer | None = None,
        reuse: StepReuse | None = None,
    ) -> Tensor:
        """Flow [B, T, latent channels, H, W] of latents [B, T, in channels, H, W], in the dtype of the model.

        Args:
            latents_BTCHW: H and W divide by the patch; float of any width.
            timestep_BT: 0 (clean) to 1000 (noise) per latent frame, float32.
            prompt: `project_prompt` of this prompt.
            attend: Self-attention; tokens are in the order (latent frame, row, column).
            control_BQE: `embed_control` of these latent frames.
            attend_prompt: Cross-attention.
            add_after_layer: A control branch; None for models without.
            reuse: May have all layers skipped; None never does.
        """
        height, width = latents_BTCHW.shape[-2:]
        x = self.embed_patches(latents_BTCHW)
        if control_BQE is not None:
            x = x + control_BQE
        x = x.to(self.dtype)  # under autocast the residual stream stays in the dtype of the weights
        time_BTE, time_BT6E = self.embed_time(timestep_BT)
        residual = None if reuse is None else reuse.recall(x, self.layers[0].modulate_input(x, time_BT6E))
        if residual is not None:
            return self.read_out(x + residual, time_BTE, (height, width))
        start = x
        for index, (layer, keys) in enumerate(zip(self.layers, prompt, strict=True)):
            layer_index = -1 if self._is_compiled else index
            x = self._run_layer(layer, x, time_BT6E, keys, layer_index, attend, attend_prompt)
            if add_after_layer is not None:
                x = add_after_layer(index, x, time_BT6E)
        if reuse is not None:
            reuse.learn(x - start)
        return self.read_out(x, time_BTE, (height, width))

    def embed_time(self, timestep_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What the head and what the layers are modulated by, time_BTE and time_BT6E."""
        time_BTE = self.time_embedding(_sinusoid(timestep_BT, self.backbone.freq_dim).to(self.dtype))
        return time_BTE, self.time_projection(time_BTE).unflatten(-1, (6, -1))

    def read_out(self, x_BQE: Tensor, time_BTE: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """Flow [B, T, latent channels, H, W] of the tokens that leave the last layer."""
        return self._unpatch(self.head(x_BQE, time_BTE), *latent_size)

    def _unpatch(self, patches_BQE: Tensor, height: int, width: int) -> Tensor:
        """Patches hold (offset in time, row, column, channel), channel fastest."""
        _, p, q = self.backbone.patch
        batch, channels = patches_BQE.shape[0], self.backbone.latent_channels
        x = patches_BQE.view(batch, -1, height // p, width // q, p, q, channels)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, -1, channels, height, width)


def _run_layer(
    layer: Layer,
    x_BQE: Tensor,
    time_BT6E: Tensor,
    keys: PromptKeys,
    layer_index: int,
    attend: Attend,
    attend_prompt: AttendPrompt,
) -> Tensor:
    return cast(Tensor, layer(x_BQE, time_BT6E, keys, layer_index, attend, attend_prompt))


def modulate(x_BQE: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Norm without weights, then scale and shift of each token's latent frame ([B, T, 1, E])."""
    h = F.layer_norm(x_BQE, (x_BQE.shape[-1],), None, None, eps)
    h = h.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.to(h.dtype), h, 1 + scale.to(h.dtype)).flatten(1, 2)


def add_gated(x_BQE: Tensor, h_BQE: Tensor, gate: Tensor) -> Tensor:
    frames = (gate.shape[1], -1)
    x = x_BQE.unflatten(1, frames)
    return torch.addcmul(x, h_BQE.unflatten(1, frames).to(x.dtype), gate.to(x.dtype)).flatten(1, 2)


def _embed_patches(maps_BTCHW: Tensor, embedding: nn.Conv3d) -> Tensor:
    """The patch convolution as one matrix product (kernel equals stride, one latent frame deep)."""
    _, p, q = embedding.kernel_size
    x = maps_BTCHW.unflatten(-1, (-1, q)).unflatten(-3, (-1, p))  # [B, T, C, h, p, w, q]
    x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(-3).flatten(1, 3)
    return F.linear(x, embedding.weight.flatten(1), embedding.bias)


def _sinusoid(timestep_BT: Tensor, freq_dim: int) -> Tensor:
    """Cosines, then sines, of the timestep on its scale of 0 to 1000; made in float64, returned in float32."""
    half = freq_dim // 2
    index = torch.arange(half, dtype=torch.float64, device=timestep_BT.device)
    angle = timestep_BT.double()[..., None] * torch.pow(10000.0, -index / half)
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float()

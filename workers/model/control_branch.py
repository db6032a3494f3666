"""LongVie 2's control module: two stacks of narrow layers, for dense maps (depth) and sparse ones (tracked points).

The stacks run beside the first layers of the DiT on tokens of their own; after each of these layers the DiT's clip
tokens get the sum of both. Parameter names are those of the published file, without its prefix. The maps go through
the DiT's own patch embedding, and depend on nothing of the noisy latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from workers.contracts import Kernel, KeyValues, PromptKeys
from workers.model.backbones import Backbone
from workers.model.dit import CausalDiT, Layer, attend_prompt_dense
from workers.model.rope import grid_positions, make_rotation, rotate


class ControlMaps(NamedTuple):
    """Maps of one clip as tokens of the control layers, and where they stand."""

    dense_BQE: Tensor
    sparse_BQE: Tensor
    position_Q3: Tensor
    """Latent frames count from 0: these tokens never meet those of the DiT in attention."""


@dataclass(frozen=True)
class ControlPrompt:
    """Cross-attention keys of the control layers, made once per prompt."""

    dense: Sequence[PromptKeys]
    sparse: Sequence[PromptKeys]


class ControlBranch(nn.Module):
    """Weights of the control module.

    Args:
        backbone: Of the DiT that it belongs to; its `control_branch` gives the sizes.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        sizes = backbone.control_branch
        assert sizes is not None, f"{backbone.name} has no control branch"
        self.backbone = replace(
            backbone,
            dim=sizes.dim,
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            ffn_dim=sizes.ffn_dim,
            control_branch=None,
        )
        dim, inner, num_layers = backbone.dim, sizes.dim, sizes.num_layers
        self.control_blocks_dense = nn.ModuleList(Layer(self.backbone) for _ in range(num_layers))
        self.control_blocks_sparse = nn.ModuleList(Layer(self.backbone) for _ in range(num_layers))
        self.control_initial_combine_linear_dense = nn.Linear(dim, inner)
        self.control_initial_combine_linear_sparse = nn.Linear(dim, inner)
        self.control_text_linear = nn.Linear(dim, inner)
        self.control_t_mod = nn.Linear(dim, inner)
        self.control_combine_linears = nn.ModuleList(nn.Linear(inner, dim) for _ in range(num_layers))

    @property
    def num_layers(self) -> int:
        return self.backbone.num_layers

    def embed_maps(self, dit: CausalDiT, dense_BTCHW: Tensor, sparse_BTCHW: Tensor) -> ControlMaps:
        """Tokens of a clip's maps [B, T, in channels of the DiT, H, W]; once per clip is enough."""
        grid = dit.backbone.token_grid((dense_BTCHW.shape[-2], dense_BTCHW.shape[-1]))
        dense = self.control_initial_combine_linear_dense(dit.embed_patches(dense_BTCHW))
        sparse = self.control_initial_combine_linear_sparse(dit.embed_patches(sparse_BTCHW))
        return ControlMaps(
            dense, sparse, grid_positions(torch.arange(dense_BTCHW.shape[1], device=dense.device), *grid)
        )

    def project_prompt(self, text_BPE: Tensor, log_mass_BP: Tensor | None, image_BPE: Tensor | None) -> ControlPrompt:
        """Keys of all control layers from what `CausalDiT.embed_prompt` returned."""
        text = self.control_text_linear(text_BPE)
        image = None if image_BPE is None else self.control_text_linear(image_BPE)

        def project(layers: nn.ModuleList) -> list[PromptKeys]:
            return [cast(Layer, layer).cross_attn.project(text, log_mass_BP, image) for layer in layers]

        return ControlPrompt(project(self.control_blocks_dense), project(self.control_blocks_sparse))

    def follow(self, maps: ControlMaps, prompt: ControlPrompt, kernel: Kernel) -> ControlWalk:
        """The branch for the calls of one clip and prompt: an `add_after_layer` of the DiT."""
        return ControlWalk(self, maps, prompt, kernel)


class ControlWalk:
    """One walk through the control layers per call of the DiT; starts anew with its first layer."""

    def __init__(self, branch: ControlBranch, maps: ControlMaps, prompt: ControlPrompt, kernel: Kernel) -> None:
        self._branch, self._maps, self._prompt, self._kernel = branch, maps, prompt, kernel
        backbone = branch.backbone
        self._rotation = make_rotation(maps.position_Q3, backbone.head_dim, backbone.rope_theta)
        self._dense = self._sparse = maps.dense_BQE
        self._time = maps.dense_BQE

    def __call__(self, layer_index: int, x_BQE: Tensor, time_BT6E: Tensor) -> Tensor:
        """Add to the newest tokens of the DiT, those of the clip; history before them gets nothing."""
        branch, maps = self._branch, self._maps
        if layer_index >= branch.num_layers:
            return x_BQE
        if layer_index == 0:
            frames = maps.dense_BQE.shape[1] * time_BT6E.shape[1] // x_BQE.shape[1]
            self._dense, self._sparse = maps.dense_BQE, maps.sparse_BQE
            self._time = branch.control_t_mod(time_BT6E[:, -frames:])
        self._dense = self._run(branch.control_blocks_dense, layer_index, self._dense, self._prompt.dense)
        self._sparse = self._run(branch.control_blocks_sparse, layer_index, self._sparse, self._prompt.sparse)
        added = branch.control_combine_linears[layer_index](self._dense + self._sparse)
        x_BQE[:, -added.shape[1] :] += added
        return x_BQE

    def _run(self, layers: nn.ModuleList, index: int, x_BQE: Tensor, prompt: Sequence[PromptKeys]) -> Tensor:
        layer = cast(Layer, layers[index])
        return cast(Tensor, layer(x_BQE, self._time, prompt[index], index, self._attend, attend_prompt_dense))

    def _attend(self, layer_index: int, q_BQND: Tensor, k_BQND: Tensor, v_BQND: Tensor) -> Tensor:
        q, k = rotate(q_BQND, self._rotation), rotate(k_BQND, self._rotation)
        return self._kernel.attend(q, (KeyValues(k, v_BQND, self._maps.position_Q3),))[0]

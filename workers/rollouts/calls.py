"""Calls of the DiT in a rollout: guidance, prompts that differ from chunk to chunk, positions of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.contracts import Moment, PromptKeys
from workers.model.attend import RolloutAttention
from workers.model.dit import AddAfterLayer, AttendPrompt, CausalDiT, attend_prompt_dense
from workers.model.rope import grid_positions
from workers.rollout import RolloutPlan

PromptLayers = Sequence[PromptKeys]
"""Cross-attention keys of all layers."""


@dataclass(frozen=True)
class CallExtras:
    """What a call carries besides latents and prompts."""

    control_BQE: Tensor | None = None
    add_after_layer: AddAfterLayer | None = None
    attend_prompt: AttendPrompt = attend_prompt_dense


class ModelCalls:
    """A model and its self-attention.

    Args:
        model: In evaluation mode.
        attention: Told of every call before it happens.
    """

    def __init__(self, model: CausalDiT, attention: RolloutAttention) -> None:
        self.model, self.attention = model, attention
        self.device = model.head.modulation.device

    def flow(
        self,
        latents_BTCHW: Tensor,
        timestep_BT: Tensor,
        moment: Moment,
        keys: PromptLayers,
        extras: CallExtras,
        remembered: slice | None = None,
    ) -> Tensor:
        """Predicted flow under one prompt, float32; a clean pass may remember part of its tokens only."""
        self.attention.begin_call(moment, remembered)
        flow: Tensor = self.model(
            latents_BTCHW,
            timestep_BT,
            keys,
            self.attention,
            control_BQE=extras.control_BQE,
            attend_prompt=extras.attend_prompt,
            add_after_layer=extras.add_after_layer,
        )
        return flow.float()

    def positions(self, plan: RolloutPlan, chunks: range) -> Tensor:
        """(latent frame, row, column) of the tokens of these chunks."""
        backbone, device = self.model.backbone, self.device
        num = backbone.chunk_latent_frames
        origin = None
        if plan.world_origin is not None:
            origin = torch.cat([plan.world_origin(index) for index in chunks]).to(device)
        time = torch.arange(chunks.start * num, chunks.stop * num, device=device)
        return grid_positions(time, *backbone.token_grid(plan.latent_size), origin)

    def embed_control(self, plan: RolloutPlan, index: int) -> Tensor | None:
        """Camera maps of a chunk as tokens."""
        maps = plan.control(index)
        return None if maps is None else self.model.embed_control(maps.to(self.device))


def guide(flows: Sequence[Tensor], guidance: float) -> Tensor:
    """From the flow under the negative prompt through that under the prompt; alone it stays as it is."""
    return flows[0] if len(flows) == 1 else torch.lerp(flows[1], flows[0], guidance)


def join_prompts(prompts: Sequence[PromptLayers], attend: AttendPrompt) -> AttendPrompt:
    """Cross-attention of a call over several chunks of which each has its own prompt.

    Args:
        prompts: Keys of all layers, chunk by chunk.
        attend: Computes for the queries of one chunk.
    """
    if all(keys is prompts[0] for keys in prompts):
        return attend

    def attend_by_chunk(layer_index: int, q_BQND: Tensor, keys: PromptKeys) -> Tensor:
        parts = q_BQND.chunk(len(prompts), dim=1)
        return torch.cat([attend(layer_index, q, own[layer_index]) for q, own in zip(parts, prompts, strict=True)], 1)

    return attend_by_chunk

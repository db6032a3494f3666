"""Our DiT against the public implementation, diffusers' `WanTransformer3DModel`, with the same random weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from workers.model.backbones import Backbone, find_backbone
from workers.model.dit import CausalDiT
from workers.model.rope import grid_positions, make_rotation, rotate

FRAMES, ROWS, COLUMNS = 4, 3, 5  # not square, and odd
TEXT_ROWS = 512  # diffusers takes the last 512 rows of the context as text
IMAGE_TOKENS = 257

# Wan's name -> diffusers' name, in the order in which they are looked for; written here from the published layouts,
# apart from the loader, so that neither vouches for the other.
RENAMES = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    (".modulation", ".scale_shift_table"),
    (".self_attn.", ".attn1."),
    (".cross_attn.", ".attn2."),
    (".norm_k_img.", ".norm_added_k."),
    (".k_img.", ".add_k_proj."),
    (".v_img.", ".add_v_proj."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    (".norm3.", ".norm2."),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
)


def rename(name: str) -> str:
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    return name


def make_pair(backbone: Backbone) -> tuple[CausalDiT, torch.nn.Module]:
    """Both models with the same weights, none of which is zero or one."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(3)
    ours = CausalDiT(backbone)
    ours.reset_parameters(zero_output=False)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith("bias") or "norm" in name or "modulation" in name or "proj.0" in name or "proj.4" in name:
                p.add_(torch.randn_like(p) * 0.3)
    theirs = WanTransformer3DModel(
        num_attention_heads=backbone.num_heads,
        attention_head_dim=backbone.head_dim,
        in_channels=backbone.in_channels,
        out_channels=backbone.latent_channels,
        text_dim=backbone.text_dim,
        freq_dim=backbone.freq_dim,
        ffn_dim=backbone.ffn_dim,
        num_layers=backbone.num_layers,
        cross_attn_norm=True,
        eps=backbone.eps,
        rope_max_seq_len=1024,
        image_dim=backbone.image_dim or None,
        added_kv_proj_dim=backbone.dim if backbone.image_dim else None,
    )
    theirs.load_state_dict({rename(name): p for name, p in ours.state_dict().items()}, strict=True)
    return ours.eval(), theirs.eval()


def attend_all(backbone: Backbone):
    position = grid_positions(torch.arange(FRAMES), ROWS, COLUMNS)
    rotation = make_rotation(position, backbone.head_dim, backbone.rope_theta)

    def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (rotate(q, rotation), rotate(k, rotation), v))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2)

    return attend


@pytest.mark.parametrize("timesteps", [(833.3333, 833.3333), (1000.0, 0.0)], ids=["one", "per-frame"])
@pytest.mark.parametrize("image_dim", [0, 32], ids=["t2v", "i2v"])
def test_forward_equals_diffusers(image_dim: int, timesteps: tuple[float, float]) -> None:
    backbone = replace(
        find_backbone("tiny-test"), control_octaves=0, image_dim=image_dim, in_channels=36 if image_dim else 16
    )
    ours, theirs = make_pair(backbone)
    x = torch.randn(1, FRAMES, backbone.in_channels, 2 * ROWS, 2 * COLUMNS)
    t = torch.linspace(*timesteps, FRAMES)[None]
    text = torch.randn(1, TEXT_ROWS, backbone.text_dim)
    text[:, 90:] = 0.0  # padding is attended
    image = torch.randn(1, IMAGE_TOKENS, image_dim) if image_dim else None
    with torch.no_grad():
        out = ours(x, t, ours.project_prompt(text, None, image), attend_all(backbone))
        per_token = t.repeat_interleave(ROWS * COLUMNS, dim=1)
        timestep = t[:, 0] if timesteps[0] == timesteps[1] else per_token
        expected = theirs(x.transpose(1, 2), timestep, text, image, return_dict=False)[0].transpose(1, 2)
    assert expected.std() > 0.5
    assert (out - expected).abs().max() <= 1e-4

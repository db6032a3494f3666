"""The control module against a plain walk through its layers, and the published number of its parameters."""

from dataclasses import replace

import torch
from torch import Tensor

from workers.kernels.reference import ReferenceKernel
from workers.model.backbones import Backbone, ControlBranchSizes, find_backbone
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT, attend_prompt_dense
from workers.model.rope import grid_positions, make_rotation, rotate

ROWS, COLUMNS, FRAMES = 2, 3, 4
TINY = replace(
    find_backbone("tiny-test"),
    in_channels=36,
    image_dim=32,
    control_octaves=0,
    num_layers=4,
    control_branch=ControlBranchSizes(dim=40, num_layers=2, num_heads=1, ffn_dim=48),
)


def make_models() -> tuple[CausalDiT, ControlBranch]:
    torch.manual_seed(8)
    dit, branch = CausalDiT(TINY), ControlBranch(TINY)
    dit.reset_parameters(zero_output=False)
    with torch.no_grad():
        for p in [*dit.parameters(), *branch.parameters()]:
            p.add_(torch.randn_like(p) * 0.1)
    return dit.eval().requires_grad_(False), branch.eval().requires_grad_(False)


def attend_alone(backbone: Backbone, frames: range):
    rotation = make_rotation(grid_positions(torch.tensor(frames), ROWS, COLUMNS), backbone.head_dim, 10000.0)

    def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, rotation), rotate(k, rotation)
        weights = torch.einsum("bqnd,bknd->bnqk", q, k).div(backbone.head_dim**0.5).softmax(-1)
        return torch.einsum("bnqk,bknd->bqnd", weights, v)

    return attend


def test_a_call_with_control_and_history_equals_a_plain_walk() -> None:
    dit, branch = make_models()
    history = 2
    latents = torch.randn(1, history + FRAMES, 36, 2 * ROWS, 2 * COLUMNS)
    dense, sparse = torch.randn(2, 1, FRAMES, 36, 2 * ROWS, 2 * COLUMNS).unbind(0)
    text, image = torch.randn(1, 9, TINY.text_dim), torch.randn(1, 7, 32)
    t = torch.full((1, history + FRAMES), 700.0)
    rows = dit.embed_prompt(text, image)
    keys = dit.project_prompt(text, None, image)
    attend = attend_alone(TINY, range(history + FRAMES))

    maps = branch.embed_maps(dit, dense, sparse)
    walk = branch.follow(maps, branch.project_prompt(rows[0], None, rows[1]), ReferenceKernel())
    out = dit(latents, t, keys, attend, add_after_layer=walk)

    # Plainly: all sums of the branch first, whole and in lists, then the model with its layers one by one.
    inner = branch.backbone
    own = attend_alone(inner, range(FRAMES))
    context = [branch.control_text_linear(x) for x in rows]
    sums = []
    streams = [
        (branch.control_blocks_dense, branch.control_initial_combine_linear_dense(dit.embed_patches(dense))),
        (branch.control_blocks_sparse, branch.control_initial_combine_linear_sparse(dit.embed_patches(sparse))),
    ]
    seen: list[Tensor] = []
    dit(latents, t, keys, attend, add_after_layer=lambda i, x, time: seen.append(time) or x)
    time = torch.stack([branch.control_t_mod(seen[0][:, history:, i]) for i in range(6)], dim=2)
    for i in range(inner.num_layers):
        for s, (layers, x) in enumerate(streams):
            prompt = layers[i].cross_attn.project(context[0], None, context[1])
            streams[s] = (layers, layers[i](x, time, prompt, i, own, attend_prompt_dense))
        sums.append(branch.control_combine_linears[i](streams[0][1] + streams[1][1]))

    def add(index: int, x: Tensor, time: Tensor) -> Tensor:
        start = history * ROWS * COLUMNS
        return torch.cat((x[:, :start], x[:, start:] + sums[index]), 1) if index < inner.num_layers else x

    expected = dit(latents, t, keys, attend, add_after_layer=add)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert (out - dit(latents, t, keys, attend)).abs().max() > 0.1
    again = dit(latents, t, keys, attend, add_after_layer=walk)
    assert torch.equal(out, again)


def test_the_module_has_the_published_number_of_tensors_and_parameters() -> None:
    with torch.device("meta"):
        state = ControlBranch(find_backbone("longvie2-14b")).state_dict()
    assert len(state) == 800
    assert sum(p.numel() for p in state.values()) == 2_633_637_888
    assert state["control_combine_linears.11.weight"].shape == (5120, 2560)
    assert state["control_blocks_sparse.11.cross_attn.norm_k_img.weight"].shape == (2560,)

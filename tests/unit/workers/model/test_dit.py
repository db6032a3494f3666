"""The DiT against a plain float64 reference written from Wan's formulas, and its causal use."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from workers.model.backbones import BACKBONES, Backbone, find_backbone
from workers.model.compiled import compile_around_attention
from workers.model.dit import CausalDiT
from workers.model.gelu import TanhGelu
from workers.model.rope import grid_positions, make_rotation, rotate

ROWS, COLUMNS = 3, 5  # not square, and both odd


def make_model(backbone: Backbone, seed: int = 0) -> CausalDiT:
    torch.manual_seed(seed)
    model = CausalDiT(backbone)
    model.reset_parameters(zero_output=False)
    with torch.no_grad():
        for name, p in model.named_parameters():  # nothing may be zero or one, or it would hide errors
            if name.endswith("bias") or "norm" in name or "modulation" in name:
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def attend_masked(position: Tensor, backbone: Backbone, is_visible_QQ: Tensor | None):
    rotation = make_rotation(position, backbone.head_dim, backbone.rope_theta)

    def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, rotation), rotate(k, rotation)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=is_visible_QQ)
        return out.transpose(1, 2)

    return attend


def reference_forward(model: CausalDiT, x: Tensor, t: Tensor, text: Tensor, image: Tensor | None) -> Tensor:
    """Wan's forward in float64 from the state dict, sample by sample, with loops where they are clearest."""
    b = model.backbone
    w = {name: p.double() for name, p in model.state_dict().items()}

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + b.eps).sqrt()

    def rms(name: str, h: Tensor) -> Tensor:
        return h / (h.pow(2).mean(-1, keepdim=True) + b.eps).sqrt() * w[f"{name}.weight"]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty(q.shape[0], b.dim, dtype=torch.float64)
        for n in range(b.num_heads):
            part = slice(n * b.head_dim, (n + 1) * b.head_dim)
            weights = (q[:, part] @ k[:, part].T / math.sqrt(b.head_dim)).softmax(-1)
            out[:, part] = weights @ v[:, part]
        return out

    frames = x.shape[0]
    tokens = torch.empty(frames * ROWS * COLUMNS, b.dim, dtype=torch.float64)
    for i in range(len(tokens)):
        f, r, c = i // (ROWS * COLUMNS), i // COLUMNS % ROWS, i % COLUMNS
        patch = x[f, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].double()
        kernel = w["patch_embedding.weight"][:, :, 0]
        tokens[i] = torch.einsum("dcpq,cpq->d", kernel, patch) + w["patch_embedding.bias"]
    wave = 10000.0 ** (-torch.arange(b.freq_dim // 2, dtype=torch.float64) / (b.freq_dim // 2))
    angle = t.double()[:, None] * wave
    e = linear("time_embedding.0", torch.cat((angle.cos(), angle.sin()), -1))
    e = linear("time_embedding.2", F.silu(e))
    e0 = linear("time_projection.1", F.silu(e)).view(frames, 6, b.dim)
    context = linear("text_embedding.2", F.gelu(linear("text_embedding.0", text.double()), approximate="tanh"))
    if image is not None:
        h = norm_affine("img_emb.proj.0", image.double(), w)
        h = linear("img_emb.proj.3", F.gelu(linear("img_emb.proj.1", h)))
        image = norm_affine("img_emb.proj.4", h, w)
    position = grid_positions(torch.arange(frames), ROWS, COLUMNS)
    frame_of = torch.arange(len(tokens)) // (ROWS * COLUMNS)

    def turn(h: Tensor) -> Tensor:
        rotation = make_rotation(position, b.head_dim, b.rope_theta)
        return rotate(h.view(1, -1, b.num_heads, b.head_dim), rotation).view(-1, b.dim)

    for i in range(b.num_layers):
        p = f"blocks.{i}"
        m = (w[f"{p}.modulation"] + e0)[frame_of]
        h = norm(tokens) * (1 + m[:, 1]) + m[:, 0]
        a = f"{p}.self_attn"
        q, k = turn(rms(f"{a}.norm_q", linear(f"{a}.q", h))), turn(rms(f"{a}.norm_k", linear(f"{a}.k", h)))
        tokens = tokens + m[:, 2] * linear(f"{a}.o", attention(q, k, linear(f"{a}.v", h)))
        a = f"{p}.cross_attn"
        h = norm(tokens) * w[f"{p}.norm3.weight"] + w[f"{p}.norm3.bias"]
        q = rms(f"{a}.norm_q", linear(f"{a}.q", h))
        out = attention(q, rms(f"{a}.norm_k", linear(f"{a}.k", context)), linear(f"{a}.v", context))
        if image is not None:
            out = out + attention(q, rms(f"{a}.norm_k_img", linear(f"{a}.k_img", image)), linear(f"{a}.v_img", image))
        tokens = tokens + linear(f"{a}.o", out)
        h = norm(tokens) * (1 + m[:, 4]) + m[:, 3]
        h = linear(f"{p}.ffn.2", F.gelu(linear(f"{p}.ffn.0", h), approximate="tanh"))
        tokens = tokens + m[:, 5] * h
    m = (w["head.modulation"] + e[:, None])[frame_of]
    y = linear("head.head", norm(tokens) * (1 + m[:, 1]) + m[:, 0])
    out = torch.empty(frames, b.latent_channels, 2 * ROWS, 2 * COLUMNS, dtype=torch.float64)
    for i in range(len(tokens)):
        f, r, c = i // (ROWS * COLUMNS), i // COLUMNS % ROWS, i % COLUMNS
        for offset_r in range(2):
            for offset_c in range(2):
                first = (2 * offset_r + offset_c) * b.latent_channels
                out[f, :, 2 * r + offset_r, 2 * c + offset_c] = y[i, first : first + b.latent_channels]
    return out


def norm_affine(name: str, h: Tensor, w: dict[str, Tensor]) -> Tensor:
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return h * w[f"{name}.weight"] + w[f"{name}.bias"]


@pytest.mark.parametrize("image_dim", [0, 32])
def test_forward_equals_plain_reference(image_dim: int) -> None:
    backbone = replace(find_backbone("tiny-test"), control_octaves=0, image_dim=image_dim, in_channels=20)
    model = make_model(backbone)
    x, t = torch.randn(2, 4, 20, 2 * ROWS, 2 * COLUMNS), torch.tensor([[1000.0, 833.3333, 0.0, 625.0]] * 2)
    t[1] = t[1].flip(0)
    text = torch.randn(2, 9, backbone.text_dim)
    image = torch.randn(2, 7, image_dim) if image_dim else None
    attend = attend_masked(grid_positions(torch.arange(4), ROWS, COLUMNS), backbone, None)
    with torch.no_grad():
        out = model(x, t, model.project_prompt(text, None, image), attend)
        for b in range(2):
            expected = reference_forward(model, x[b], t[b], text[b], None if image is None else image[b])
            assert expected.std() > 0.3
            torch.testing.assert_close(out[b].double(), expected, atol=1e-4, rtol=0)


def test_cached_chunks_equal_the_whole_sequence_under_a_chunk_causal_mask() -> None:
    backbone = find_backbone("tiny-test")
    model = make_model(backbone)
    chunk, num_chunks = backbone.chunk_latent_frames, 4
    frames, tokens = chunk * num_chunks, chunk * ROWS * COLUMNS
    x = torch.randn(1, frames, 16, 2 * ROWS, 2 * COLUMNS)
    t = torch.zeros(1, frames)
    control = model.embed_control(torch.randn(1, frames, backbone.control_channels, 2 * ROWS, 2 * COLUMNS))
    prompt = model.project_prompt(torch.randn(1, 5, backbone.text_dim))
    position = grid_positions(torch.arange(frames), ROWS, COLUMNS)
    chunk_of = torch.arange(len(position)) // tokens
    whole = attend_masked(position, backbone, chunk_of[:, None] >= chunk_of[None])
    cache: dict[int, tuple[Tensor, Tensor]] = {}

    def cached_attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        old = cache.get(layer_index)
        keys, values = (k, v) if old is None else (torch.cat((old[0], k), 1), torch.cat((old[1], v), 1))
        cache[layer_index] = keys, values
        end = keys.shape[1]
        q = rotate(q, make_rotation(position[end - tokens : end], backbone.head_dim, backbone.rope_theta))
        keys = rotate(keys, make_rotation(position[:end], backbone.head_dim, backbone.rope_theta))
        return F.scaled_dot_product_attention(*(h.transpose(1, 2) for h in (q, keys, values))).transpose(1, 2)

    with torch.no_grad():
        expected = model(x, t, prompt, whole, control_BQE=control)
        for c in range(num_chunks):
            part = slice(c * chunk, (c + 1) * chunk)
            add = control[:, c * tokens : (c + 1) * tokens]
            out = model(x[:, part], t[:, part], prompt, cached_attend, control_BQE=add)
            torch.testing.assert_close(out, expected[:, part], atol=1e-4, rtol=0)


def test_control_maps_change_the_flow_of_their_own_cells_first() -> None:
    backbone = replace(find_backbone("tiny-test"), num_layers=0)
    model = make_model(backbone)
    x, t = torch.randn(1, 3, 16, 4, 6), torch.zeros(1, 3)
    control = torch.zeros(1, 3, backbone.control_channels, 4, 6)
    control[0, 1, :, 2:, 4:] = 1.0
    attend = attend_masked(torch.zeros(18, 3), backbone, None)
    with torch.no_grad():
        outs = [model(x, t, [], attend, control_BQE=model.embed_control(c)) for c in (control, control * 0)]
    changed = (outs[0] - outs[1]).abs().amax(2)[0] > 0
    assert changed[1, 2:, 4:].all()
    assert changed.sum() == 4


def test_log_mass_of_a_row_equals_that_many_equal_rows() -> None:
    backbone = find_backbone("tiny-test")
    model = make_model(backbone)
    x, t = torch.randn(1, 3, 16, 4, 6), torch.full((1, 3), 500.0)
    text = torch.cat((torch.randn(1, 3, backbone.text_dim), torch.zeros(1, 61, backbone.text_dim)), 1)
    folded = torch.tensor([[0.0, 0.0, 0.0, math.log(61), -math.inf]])
    attend = attend_masked(grid_positions(torch.arange(3), 2, 3), backbone, None)
    with torch.no_grad():
        expected = model(x, t, model.project_prompt(text), attend)
        out = model(x, t, model.project_prompt(text[:, :5], folded), attend)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_fresh_model_returns_zero_and_trains_in_every_part() -> None:
    torch.manual_seed(0)
    backbone = find_backbone("tiny-test")
    model = CausalDiT(backbone)
    x, t = torch.randn(2, 3, 16, 4, 6), torch.rand(2, 3) * 1000
    attend = attend_masked(grid_positions(torch.arange(3), 2, 3), backbone, None)
    control = torch.randn(2, 3, backbone.control_channels, 4, 6)
    text = torch.randn(2, 5, backbone.text_dim)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(3):
        optimizer.zero_grad()
        out = model(x, t, model.project_prompt(text), attend, control_BQE=model.embed_control(control))
        if step == 0:
            assert out.abs().max() == 0
        (out - x).square().mean().backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [name for name in still if not name.endswith("attn.k.bias")] == []


def test_bfloat16_stays_near_float32() -> None:
    backbone = find_backbone("tiny-test")
    model = make_model(backbone)
    x, t = torch.randn(1, 3, 16, 4, 6), torch.full((1, 3), 937.5)
    text = torch.randn(1, 5, backbone.text_dim)
    attend = attend_masked(grid_positions(torch.arange(3), 2, 3), backbone, None)
    with torch.no_grad():
        expected = model(x, t, model.project_prompt(text), attend)
        model.to(torch.bfloat16)
        out = model(x, t, model.project_prompt(text), attend)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.1 * expected.std()


def test_fused_projections_change_neither_result_nor_names_nor_memory() -> None:
    backbone = find_backbone("tiny-test")
    model = make_model(backbone).requires_grad_(False)
    x, t = torch.randn(1, 3, 16, 4, 6), torch.full((1, 3), 500.0)
    attend = attend_masked(grid_positions(torch.arange(3), 2, 3), backbone, None)
    prompt = model.project_prompt(torch.randn(1, 5, backbone.text_dim))
    expected = model(x, t, prompt, attend)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.fuse_projections()
    torch.testing.assert_close(model(x, t, prompt, attend), expected, atol=1e-5, rtol=0)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], p) for name, p in before.items())
    attention = model.layers[0].self_attn
    assert len({part.weight.untyped_storage().data_ptr() for part in (attention.q, attention.k, attention.v)}) == 1
    model.load_state_dict({name: p * 0.5 for name, p in before.items()})  # other weights reach the one product
    halved = model(x, t, prompt, attend)
    assert (halved - expected).abs().max() > 1e-2
    moved = model.double().float()(x, t, prompt, attend)
    torch.testing.assert_close(moved, halved, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_parameters"),
    [
        ("wan2.1-t2v-1.3b", 825, 1_418_996_800),
        ("wan2.1-t2v-14b", 1095, 14_288_491_584),
        ("wan2.1-i2v-14b", 1303, 16_394_878_784),
    ],
)
def test_wan_sizes_have_the_published_number_of_parameters(name: str, num_tensors: int, num_parameters: int) -> None:
    with torch.device("meta"):
        state = CausalDiT(BACKBONES[name]).state_dict()
    assert len(state) == num_tensors
    assert sum(p.numel() for p in state.values()) == num_parameters


def test_gelu_by_a_sigmoid_equals_that_by_a_tanh() -> None:
    x = torch.cat((torch.linspace(-50, 50, 4001), torch.tensor([-1e20, 1e20, 0.0, -0.0])))
    want = F.gelu(x.double(), approximate="tanh").float()
    with torch.inference_mode():
        torch.testing.assert_close(TanhGelu()(x), want, atol=1e-6, rtol=1e-6)
        assert bool(TanhGelu()(torch.tensor([math.nan])).isnan().all())


def test_one_compilation_serves_all_layers() -> None:
    backbone = replace(find_backbone("tiny-test"), num_layers=10)
    model = make_model(backbone)
    x, t = torch.randn(1, 3, 16, 4, 6), torch.full((1, 3), 500.0)
    with torch.no_grad():
        prompt = model.project_prompt(torch.randn(1, 5, backbone.text_dim))
    attend = attend_masked(grid_positions(torch.arange(3), 2, 3), backbone, None)
    num_graphs = 0

    def count(graph, inputs):
        nonlocal num_graphs
        num_graphs += 1
        return graph.forward

    with torch.no_grad():
        expected = model(x, t, prompt, attend)
        torch._dynamo.reset()
        original = torch.compile

        def compile_counted(function, **options):
            return original(function, backend=count, fullgraph=True, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", compile_counted)
            model.compile_layers()
        out = model(x, t, prompt, attend)
    assert num_graphs == 1
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def count_graphs(counts: list[int]):
    def backend(graph, inputs):
        counts.append(1)
        return graph.forward

    return backend


@pytest.mark.parametrize("is_fused", [False, True])
def test_pieces_around_attention_compile_once_for_all_layers(is_fused: bool) -> None:
    backbone = replace(find_backbone("tiny-test"), num_layers=9)
    model = make_model(backbone).requires_grad_(False)
    if is_fused:
        model.fuse_projections()
    x, t = torch.randn(1, 3, 16, 4, 6), torch.tensor([[500.0, 0.0, 900.0]])
    prompt = model.project_prompt(torch.randn(1, 5, backbone.text_dim))
    attend = attend_masked(grid_positions(torch.arange(3), 2, 3), backbone, None)
    layers: list[int] = []

    def attend_noting(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers.append(layer_index)
        return attend(layer_index, q, k, v)

    expected = model(x, t, prompt, attend)
    counts: list[int] = []
    torch._dynamo.reset()
    compile_around_attention(model, count_graphs(counts))
    with torch.inference_mode():
        out = model(x, t, prompt, attend_noting)
    assert len(counts) == 3
    assert layers == list(range(9))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_the_compiler_may_not_choose_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda piece, **how: asked.append(how["options"]) or piece)
    compile_around_attention(make_model(find_backbone("tiny-test")))
    assert asked == 3 * [{"deterministic": True}]


@pytest.mark.slow
def test_really_compiled_pieces_give_the_plain_result() -> None:
    backbone = find_backbone("tiny-test")
    model = make_model(backbone).requires_grad_(False)
    x, t = torch.randn(1, 3, 16, 4, 6), torch.full((1, 3), 500.0)
    prompt = model.project_prompt(torch.randn(1, 5, backbone.text_dim))
    attend = attend_masked(grid_positions(torch.arange(3), 2, 3), backbone, None)
    expected = model(x, t, prompt, attend)
    torch._dynamo.reset()
    compile_around_attention(model)
    torch.testing.assert_close(model(x, t, prompt, attend), expected, atol=1e-5, rtol=0)

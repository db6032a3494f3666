"""Slow, plain rollouts written from the published schedules: what `workers/rollouts` must equal.

No cache, policy or kernel of ours is in here: keys of finished chunks lie in a dictionary, and every call says frame by
frame what is seen and at which time. Only the DiT's layers (checked against diffusers) and the rotation are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from workers.contracts import PromptKeys
from workers.model.backbones import Backbone, find_backbone
from workers.model.control_branch import ControlBranch
from workers.model.dit import CausalDiT, attend_prompt_dense
from workers.model.rope import grid_positions, make_rotation, rotate

ROWS, COLUMNS, FRAMES = 2, 3, 3  # tokens of a latent frame, not square; latent frames of a chunk
TOKENS = ROWS * COLUMNS
TINY = replace(find_backbone("tiny-test"), control_octaves=0, sampler="renoise")
SIGMAS = (1.0, 0.95238104, 0.88235291, 0.76923077, 0.55555560)


@dataclass
class Seen:
    """What a call sees of the past: one latent frame of a finished chunk, rotated at this time."""

    frame: int
    time: float


@dataclass
class PlainAttention:
    """Attention over listed frames and the call's own tokens."""

    backbone: Backbone
    own_times: list[float] = field(default_factory=list)
    past: list[Seen] = field(default_factory=list)
    store: dict[int, int] = field(default_factory=dict)
    """Which latent frames of the call have their keys kept: place in the call -> latent frame of the video."""
    keys: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(layer, latent frame) -> keys before RoPE and values."""

    def turn(self, x: Tensor, times: list[float]) -> Tensor:
        position = grid_positions(torch.tensor(times), ROWS, COLUMNS)
        return rotate(x, make_rotation(position, self.backbone.head_dim, self.backbone.rope_theta))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        old = [self.keys[layer, seen.frame] for seen in self.past]
        all_k = torch.cat([*(pair[0] for pair in old), k], 1)
        all_v = torch.cat([*(pair[1] for pair in old), v], 1)
        all_k = self.turn(all_k, [seen.time for seen in self.past] + self.own_times)
        logits = torch.einsum("bqnd,bknd->bnqk", self.turn(q, self.own_times), all_k)
        weights = (logits / self.backbone.head_dim**0.5).softmax(-1)
        for place, frame in self.store.items():
            part = slice(place * TOKENS, (place + 1) * TOKENS)
            self.keys[layer, frame] = k[:, part], v[:, part]
        return torch.einsum("bnqk,bknd->bqnd", weights, all_v)


def make_model(backbone: Backbone, seed: int = 21) -> CausalDiT:
    """Random weights without zeros: they would hide errors."""
    torch.manual_seed(seed)
    model = CausalDiT(backbone)
    model.reset_parameters(zero_output=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "modulation" in name:
                p.add_(torch.randn_like(p) * 0.2)
            elif name.startswith("time_"):
                torch.nn.init.xavier_normal_(p)  # the usual start hardly feels the timestep
    return model.eval().requires_grad_(False)


Noise = Callable[[int, int], Tensor]
SeesPast = Callable[[int, int, bool], list[Seen]]
"""(first latent frame of the call, its latent frames, is clean pass) -> what it sees of the past."""


def native_past(start: int, num: int, is_clean_pass: bool) -> list[Seen]:
    """Rolling-Forcing: never more than 21 latent frames, the sink moved up to the recent ones."""
    if is_clean_pass:
        return [Seen(f, f) for f in range(max(0, start + FRAMES - 21), start)]
    if start == 0:
        return []
    recent = min(start - 3, 21 - 3 - num)
    sink = [Seen(f, start - recent - 3 + f) for f in range(3)]
    return sink + [Seen(f, f) for f in range(start - recent, start)]


def full_past(start: int, num: int, is_clean_pass: bool) -> list[Seen]:
    """Every finished frame where it was made."""
    return [Seen(f, f) for f in range(start)]


def roll_windows(
    model: CausalDiT, num_chunks: int, noise: Noise, prompt: list[PromptKeys], past: SeesPast = native_past
) -> list[Tensor]:
    """Rolling-Forcing's schedule, window by window; chunks of clean latents."""
    num_levels = len(SIGMAS)
    attention = PlainAttention(model.backbone)
    working = {c: noise(c, 0) for c in range(num_chunks)}
    output: dict[int, Tensor] = {}
    for w in range(num_chunks + num_levels - 1):
        oldest, newest = max(0, w - num_levels + 1), min(num_chunks - 1, w)
        chunks = list(range(oldest, newest + 1))
        sigma = torch.tensor([SIGMAS[w - c] for c in chunks]).repeat_interleave(FRAMES)[None]
        start, num = oldest * FRAMES, len(chunks) * FRAMES
        attention.own_times = [float(f) for f in range(start, start + num)]
        attention.past, attention.store = past(start, num, False), {}
        x = torch.cat([working[c] for c in chunks], 1)
        clean = x - sigma[..., None, None, None] * model(x, 1000 * sigma, prompt, attention)
        for c, x0 in zip(chunks, clean.split(FRAMES, 1), strict=True):
            output[c] = x0
            if w - c < num_levels - 1:
                level = SIGMAS[w - c + 1]
                working[c] = (1 - level) * x0 + level * noise(c, w - c + 1)
        # As published the clean pass runs in every window; in the first four it is overwritten before it is read.
        attention.own_times = attention.own_times[:FRAMES]
        attention.past, attention.store = past(start, FRAMES, True), {i: start + i for i in range(FRAMES)}
        model(output[oldest], torch.zeros(1, FRAMES), prompt, attention)
    return [output[c] for c in range(num_chunks)]


def roll_chunks(
    model: CausalDiT, num_chunks: int, noise: Noise, prompt: list[PromptKeys], window: int, sink: int
) -> list[Tensor]:
    """Self-Forcing's schedule with a buffer of `window` latent frames whose first `sink` ones stay."""
    levels = (1.0, 0.9375, 0.83333331, 0.625)
    attention = PlainAttention(model.backbone)
    output: list[Tensor] = []
    for c in range(num_chunks):
        start = c * FRAMES
        attention.own_times = [float(f) for f in range(start, start + FRAMES)]
        kept = range(min(sink, start)), range(max(min(sink, start), start - (window - sink - FRAMES)), start)
        attention.past, attention.store = [Seen(f, f) for part in kept for f in part], {}
        x = noise(c, 0)
        for k, level in enumerate(levels):
            clean = x - level * model(x, torch.full((1, FRAMES), 1000 * level), prompt, attention)
            if k + 1 < len(levels):
                x = (1 - levels[k + 1]) * clean + levels[k + 1] * noise(c, k + 1)
        output.append(clean)
        attention.store = {i: start + i for i in range(FRAMES)}
        model(clean, torch.zeros(1, FRAMES), prompt, attention)
    return output


def roll_masked(model: CausalDiT, num_chunks: int, noise: Noise, prompt: list[PromptKeys]) -> list[Tensor]:
    """Self-Forcing without any memory: every call runs over the whole video so far under a chunk-causal mask."""
    levels = (1.0, 0.9375, 0.83333331, 0.625)
    output: list[Tensor] = []
    for c in range(num_chunks):
        position = grid_positions(torch.arange((c + 1) * FRAMES), ROWS, COLUMNS)
        rotation = make_rotation(position, model.backbone.head_dim, model.backbone.rope_theta)
        chunk_of = torch.arange(len(position)) // (FRAMES * TOKENS)
        hidden = chunk_of[:, None] < chunk_of[None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotation=rotation, hidden=hidden) -> Tensor:
            logits = torch.einsum("bqnd,bknd->bnqk", rotate(q, rotation), rotate(k, rotation)) / q.shape[-1] ** 0.5
            return torch.einsum("bnqk,bknd->bqnd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)

        x = noise(c, 0)
        for k, level in enumerate(levels):
            t = torch.zeros(1, (c + 1) * FRAMES)
            t[:, -FRAMES:] = 1000 * level
            clean = x - level * model(torch.cat((*output, x), 1), t, prompt, attend)[:, -FRAMES:]
            if k + 1 < len(levels):
                x = (1 - levels[k + 1]) * clean + levels[k + 1] * noise(c, k + 1)
        output.append(clean)
    return output


@dataclass
class PlainClip:
    """One clip of LongVie 2 as the model gets it, one row of prompt and image for each branch of guidance."""

    noise: Tensor
    condition: Tensor
    dense: Tensor
    sparse: Tensor
    text: list[Tensor]
    image: Tensor
    history: Tensor | None = None


def sum_control(model: CausalDiT, branch: ControlBranch, clip: PlainClip, text: Tensor, time: Tensor) -> list[Tensor]:
    """What each of the first layers gets added; `time` are the six vectors of the clip's frames."""
    rows = [branch.control_text_linear(x) for x in model.embed_prompt(text, clip.image)]
    attention = PlainAttention(branch.backbone, [float(i) for i in range(clip.noise.shape[1])])
    time = torch.stack([branch.control_t_mod(time[:, :, i]) for i in range(6)], dim=2)
    dense = branch.control_initial_combine_linear_dense(model.embed_patches(clip.dense))
    sparse = branch.control_initial_combine_linear_sparse(model.embed_patches(clip.sparse))
    sums = []
    for i in range(branch.num_layers):
        for name in ("dense", "sparse"):
            layer = getattr(branch, f"control_blocks_{name}")[i]
            prompt = layer.cross_attn.project(rows[0], None, rows[1])
            x = dense if name == "dense" else sparse
            x = layer(x, time, prompt, i, attention, attend_prompt_dense)
            dense, sparse = (x, sparse) if name == "dense" else (dense, x)
        sums.append(branch.control_combine_linears[i](dense + sparse))
    return sums


def roll_clips(
    model: CausalDiT, branch: ControlBranch, clips: list[PlainClip], sigmas: list[float], guidance: float, keeps: int
) -> list[Tensor]:
    """LongVie 2's loop; with `keeps` > 0 the first so many latent frames of a clip stay visible to all later ones."""
    attention = PlainAttention(model.backbone)
    output: list[Tensor] = []
    for j, clip in enumerate(clips):
        num = clip.noise.shape[1]
        num_history = 0 if clip.history is None else clip.history.shape[1]
        start = (num - 1) * j
        attention.own_times = [float(f) for f in range(start - num_history, start + num)]
        attention.past = [Seen((num - 1) * i + f, (num - 1) * i + f) for i in range(j) for f in range(keeps)]

        def call(latents: Tensor, t: float, b: int, clip=clip, num_history=num_history) -> Tensor:
            x = torch.cat((latents, clip.condition), 2)
            if clip.history is not None:
                ones = torch.ones(1, num_history, 20, *latents.shape[3:])
                x = torch.cat((torch.cat((ones, clip.history), 2), x), 1)
            keys = model.project_prompt(clip.text[b], None, clip.image)
            sums: list[Tensor] = []

            def add(index: int, h: Tensor, time: Tensor) -> Tensor:
                if index == 0:
                    sums.extend(sum_control(model, branch, clip, clip.text[b], time[:, num_history:]))
                if index >= len(sums):
                    return h
                return h + torch.cat((torch.zeros_like(h[:, : num_history * TOKENS]), sums[index]), 1)

            return model(x, torch.full((1, x.shape[1]), t), keys, attention, add_after_layer=add)[:, num_history:]

        attention.store = {}
        x = clip.noise.clone()
        if clip.history is not None:
            x[:, 0] = (1 - 0.925926) * clip.history[:, -1] + 0.925926 * x[:, 0]
        for step, sigma in enumerate(sigmas):
            flow = call(x, 1000 * sigma, 0)
            if guidance != 1.0:
                negative = call(x, 1000 * sigma, 1)
                flow = negative + guidance * (flow - negative)
            x = x + ((sigmas[step + 1] if step + 1 < len(sigmas) else 0.0) - sigma) * flow
        output.append(x)
        if keeps:
            attention.store = {num_history + f: start + f for f in range(keeps)}
            call(x, 0.0, 0)
    return output

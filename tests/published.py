"""The published models and loops once more, from their formulas alone: nothing of `workers/` is in here.

Plain functions of a state dict in Wan's own names, rotations in complex128, key buffers with the slots and counters of
the published loops (keys cached after RoPE at absolute positions, the rolling window's sink before it). Every call is
written down under the names of a recording, so that `workers/rollouts/replay.py` can be held against each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v), [Q, N, D] each and before RoPE -> what the queries get, [Q, N, D]."""
Context = tuple[Tensor, Tensor | None]
"""Rows of the prompt and, for I2V, image tokens; both at the width of the model, [P, d]."""

CHUNK = 3


def rope_table(frames: Sequence[int], rows: int, columns: int, head_dim: int) -> Tensor:
    """exp(i * position * frequency) of every token, complex128 [Q, D / 2]; time takes what two thirds leave."""
    side = 2 * (head_dim // 6)
    position = [(f, r, c) for f in frames for r in range(rows) for c in range(columns)]
    angles = []
    for axis, size in enumerate((head_dim - 2 * side, side, side)):
        frequency = torch.tensor([10000.0 ** (-2 * j / size) for j in range(size // 2)], dtype=torch.float64)
        angles.append(torch.outer(torch.tensor([p[axis] for p in position], dtype=torch.float64), frequency))
    angle = torch.cat(angles, 1)
    return torch.polar(torch.ones_like(angle), angle)


def turn(x_QND: Tensor, table: Tensor) -> Tensor:
    """Neighbouring channels are one complex number."""
    pairs = torch.view_as_complex(x_QND.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).float()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense, [Q, N, D] over [K, N, D]."""
    logits = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("nqk,knd->qnd", logits.softmax(-1), v)


@dataclass
class Wan:
    """Layers of a Wan transformer (or of LongVie 2's control module, whose layers are built alike)."""

    state: State
    num_heads: int
    eps: float = 1e-6

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x: Tensor, eps: float | None = None, affine: str | None = None) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + (eps or self.eps)).sqrt()
        return x if affine is None else x * self.state[f"{affine}.weight"] + self.state[f"{affine}.bias"]

    def rms(self, name: str, x: Tensor) -> Tensor:
        """Over the whole width, then heads."""
        x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.state[f"{name}.weight"]
        return x.unflatten(-1, (self.num_heads, -1))

    def heads(self, name: str, x: Tensor) -> Tensor:
        return self.linear(name, x).unflatten(-1, (self.num_heads, -1))

    def read(self, text: Tensor, image: Tensor | None) -> Context:
        """Prompt rows, padding included, and image tokens through their own projections."""
        rows = self.linear("text_embedding.2", F.gelu(self.linear("text_embedding.0", text[0]), approximate="tanh"))
        if image is None:
            return rows, None
        tokens = F.gelu(self.linear("img_emb.proj.1", self.norm(image[0], 1e-5, "img_emb.proj.0")))
        return rows, self.norm(self.linear("img_emb.proj.3", tokens), 1e-5, "img_emb.proj.4")

    def patches(self, x_TCHW: Tensor) -> Tensor:
        """Tokens [Q, d] in the order (frame, row, column)."""
        weight, bias = self.state["patch_embedding.weight"], self.state["patch_embedding.bias"]
        return F.conv3d(x_TCHW.transpose(0, 1)[None], weight, bias, stride=(1, 2, 2))[0].flatten(1).T

    def times(self, t_T: Tensor) -> tuple[Tensor, Tensor]:
        """e [T, d] and e0 [T, 6, d]."""
        wave = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
        angle = t_T.double()[:, None] * wave
        e = self.linear("time_embedding.0", torch.cat((angle.cos(), angle.sin()), 1).float())
        e = self.linear("time_embedding.2", F.silu(e))
        return e, self.linear("time_projection.1", F.silu(e)).unflatten(-1, (6, -1))

    def layer(self, name: str, index: int, x: Tensor, e0_Q6d: Tensor, context: Context, attend: Attend) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.state[f"{name}.modulation"] + e0_Q6d).unbind(1)
        h, own = self.norm(x) * (1 + scale1) + shift1, f"{name}.self_attn"
        q, k = (self.rms(f"{own}.norm_{p}", self.linear(f"{own}.{p}", h)) for p in "qk")
        x = x + gate1 * self.linear(f"{own}.o", attend(index, q, k, self.heads(f"{own}.v", h)).flatten(1))
        h, cross, (text, image) = self.norm(x, affine=f"{name}.norm3"), f"{name}.cross_attn", context
        q = self.rms(f"{cross}.norm_q", self.linear(f"{cross}.q", h))
        k = self.rms(f"{cross}.norm_k", self.linear(f"{cross}.k", text))
        out = attention(q, k, self.heads(f"{cross}.v", text))
        if image is not None:
            k = self.rms(f"{cross}.norm_k_img", self.linear(f"{cross}.k_img", image))
            out = out + attention(q, k, self.heads(f"{cross}.v_img", image))
        x = x + self.linear(f"{cross}.o", out.flatten(1))
        h = self.linear(f"{name}.ffn.0", self.norm(x) * (1 + scale2) + shift2)
        return x + gate2 * self.linear(f"{name}.ffn.2", F.gelu(h, approximate="tanh"))

    def forward(
        self,
        x_TCHW: Tensor,
        t_T: Tensor,
        context: Context,
        attend: Attend,
        add: Callable[[int, Tensor, Tensor], Tensor] | None = None,
        skipped_frames: int = 0,
    ) -> Tensor:
        """Flow [T, 16, H, W].

        Args:
            add: (layer, x, e0 of the tokens) -> x, after each layer.
            skipped_frames: First frames, which leave before the head.
        """
        num_frames, _, height, width = x_TCHW.shape
        rows, columns = height // 2, width // 2
        x, (e, e0) = self.patches(x_TCHW), self.times(t_T)
        e, e0 = (y.repeat_interleave(rows * columns, 0) for y in (e, e0))
        for index in range(1 + max(int(key.split(".")[1]) for key in self.state if key.startswith("blocks."))):
            x = self.layer(f"blocks.{index}", index, x, e0, context, attend)
            if add is not None:
                x = add(index, x, e0)
        first = skipped_frames * rows * columns
        shift, scale = (self.state["head.modulation"] + e[first:, None]).unbind(1)
        y = self.linear("head.head", self.norm(x[first:]) * (1 + scale) + shift)
        y = y.view(num_frames - skipped_frames, rows, columns, 2, 2, 16)
        return torch.einsum("fhwqrc->fchqwr", y).reshape(-1, 16, height, width)


@dataclass
class Keys:
    """Own keys alone: what a bidirectional call sees."""

    rows: int
    columns: int
    frames: Sequence[int] = ()

    @property
    def frame_tokens(self) -> int:
        return self.rows * self.columns

    def table(self, frames: Sequence[int], head_dim: int) -> Tensor:
        return rope_table(frames, self.rows, self.columns, head_dim)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table = self.table(self.frames, q.shape[-1])
        return attention(turn(q, table), turn(k, table), v)


@dataclass
class ChunkBuffer(Keys):
    """Self-Forcing's: keys after RoPE, every call writes its own, two counters; frames behind the sink go out first."""

    size_frames: int = 21
    sink_frames: int = 0
    written: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    """(end of what was ever written, end within the buffer) in tokens."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size, sink = self.size_frames * self.frame_tokens, self.sink_frames * self.frame_tokens
        table = self.table(self.frames, q.shape[-1])
        q, k = turn(q, table), turn(k, table)
        if layer not in self.written:
            self.written[layer] = (
                torch.full((size, *k.shape[1:]), torch.nan),
                torch.full((size, *v.shape[1:]), torch.nan),
            )
            self.ends[layer] = 0, 0
        ever, local = self.ends[layer]
        now = (self.frames[-1] + 1) * self.frame_tokens
        new_local = local + now - ever
        if new_local > size:
            lost = new_local - size
            for buffer in self.written[layer]:
                buffer[sink : local - lost] = buffer[sink + lost : local].clone()
            new_local = size
        for buffer, own in zip(self.written[layer], (k, v), strict=True):
            buffer[new_local - len(own) : new_local] = own
        self.ends[layer] = now, new_local
        k, v = (buffer[:new_local] for buffer in self.written[layer])
        return attention(q, k, v)


@dataclass
class RollingBuffer(Keys):
    """Rolling-Forcing's: 24 latent frames, the first chunk before RoPE, the others after it; the clean pass writes."""

    is_clean_pass: bool = False
    written: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    full_for: dict[int, int] = field(default_factory=dict)
    """Oldest chunk for which room was made."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens, dim = self.frame_tokens, q.shape[-1]
        p, m = self.frames[0], len(self.frames)
        oldest = p // CHUNK
        slot = CHUNK * min(oldest, 7)  # in frames
        own = self.table(self.frames, dim)
        if layer not in self.written:
            self.written[layer] = torch.full((2, 24 * tokens, *k.shape[1:]), torch.nan).unbind(0)
            self.full_for[layer] = 7
        keys, values = self.written[layer]
        if oldest > self.full_for[layer]:  # the chunk after the sink is dropped
            for buffer in (keys, values):
                buffer[3 * tokens : 21 * tokens] = buffer[6 * tokens :].clone()
            self.full_for[layer] = oldest
        if self.is_clean_pass:
            here = slice(slot * tokens, (slot + 3) * tokens)
            keys[here], values[here] = (k if oldest == 0 else turn(k, own)), v
            first = max(0, slot + 3 - 21)
            seen_k, seen_v = keys[first * tokens : here.stop].clone(), values[first * tokens : here.stop]
            if first == 0:
                seen_k[: 3 * tokens] = turn(seen_k[: 3 * tokens], self.table(range(3), dim))
            return attention(turn(q, own), seen_k, seen_v)
        seen = [(turn(k, own), v)]
        if oldest > 0:
            recent = min(p - 3, 21 - 3 - m)
            before = slice((slot - recent) * tokens, slot * tokens)
            sink = turn(keys[: 3 * tokens], self.table(range(p - recent - 3, p - recent), dim))
            seen = [(sink, values[: 3 * tokens]), (keys[before], values[before]), *seen]
        return attention(turn(q, own), torch.cat([s[0] for s in seen]), torch.cat([s[1] for s in seen]))


def level_table(shift: float = 5.0) -> tuple[Tensor, Tensor]:
    """1000 sigmas and timesteps, float32."""
    u = torch.linspace(1, 0, 1001)[:-1]
    sigma = shift * u / (1 + (shift - 1) * u)
    return sigma, sigma * 1000


@dataclass
class Record:
    """Outputs of a run under the names of a recording."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def call(self, name: str, x: Tensor, t: Tensor, flow: Tensor) -> None:
        self.tensors |= {
            f"call.{name}.latents": x[None].clone(),
            f"call.{name}.timestep": t[None].clone(),
            f"call.{name}.flow": flow[None],
        }


def self_forcing(wan: Wan, tensors: State, num_chunks: int, steps: Sequence[int], buffer: ChunkBuffer) -> State:
    """Section by section: each chunk's denoising calls, then its clean pass; starts from `latents.initial` if given."""
    sigmas, times = level_table()
    record, context = Record(), wan.read(tensors["prompt.text"], tensors.get("prompt.image"))
    given = tensors.get("latents.initial", tensors["noise.initial"][:, :0])[0]
    num_given = len(given) // CHUNK
    for c in range(num_chunks):
        buffer.frames = range(c * CHUNK, (c + 1) * CHUNK)
        if c >= num_given:
            x = tensors["noise.initial"][0, (c - num_given) * CHUNK :][:CHUNK]
            for k, step in enumerate(steps):
                t = times[1000 - step].expand(CHUNK)
                flow = wan.forward(x, t, context, buffer)
                record.call(f"{c}.{k}.0", x, t, flow)
                clean = (x.double() - sigmas[1000 - step].double() * flow.double()).float()
                if k + 1 < len(steps):
                    level = sigmas[1000 - steps[k + 1]]
                    x = (1 - level) * clean + level * tensors[f"noise.{c}.{k + 1}"][0]
            record.tensors[f"chunk.{c}"] = clean[None]
        else:
            clean = given[c * CHUNK : (c + 1) * CHUNK]
        if c + 1 < num_chunks:
            flow = wan.forward(clean, torch.zeros(CHUNK), context, buffer)
            record.call(f"{c}.clean.0", clean, torch.zeros(CHUNK), flow)
    return record.tensors


def rolling_forcing(wan: Wan, tensors: State, num_chunks: int, steps: Sequence[int], buffer: RollingBuffer) -> State:
    """Window by window, both calls in each; a chunk's working latents lie in one tensor of the whole video."""
    sigmas, times = level_table()
    record, context = Record(), wan.read(tensors["prompt.text"], None)
    working, num_levels = tensors["noise.initial"][0].clone(), len(steps)
    for w in range(num_chunks + num_levels - 1):
        chunks = list(range(max(0, w - num_levels + 1), min(num_chunks - 1, w) + 1))
        frames = range(chunks[0] * CHUNK, (chunks[-1] + 1) * CHUNK)
        place = torch.tensor([1000 - steps[w - c] for c in chunks]).repeat_interleave(CHUNK)
        buffer.frames, buffer.is_clean_pass = frames, False
        x = working[frames.start : frames.stop].clone()
        flow = wan.forward(x, times[place], context, buffer)
        record.call(f"{chunks[0]}.{w - chunks[0]}.0", x, times[place], flow)
        clean = x - sigmas[place][:, None, None, None] * flow
        for i, c in enumerate(chunks):
            own = clean[i * CHUNK : (i + 1) * CHUNK]
            record.tensors[f"chunk.{c}"] = own[None]
            if w - c + 1 < num_levels:
                level = sigmas[1000 - steps[w - c + 1]]
                working[c * CHUNK : (c + 1) * CHUNK] = (1 - level) * own + level * tensors[f"noise.{c}.{w - c + 1}"][0]
        buffer.frames, buffer.is_clean_pass = frames[:CHUNK], True
        flow = wan.forward(clean[:CHUNK], torch.zeros(CHUNK), context, buffer)
        record.call(f"{chunks[0]}.clean.0", clean[:CHUNK], torch.zeros(CHUNK), flow)
    return record.tensors


def control_sums(
    wan: Wan, control: Wan, maps: tuple[Tensor, Tensor], e0_Q6d: Tensor, context: Context, keys: Keys
) -> list[Tensor]:
    """What each of the first layers of LongVie 2 gets added."""
    assert context[1] is not None
    joined = control.linear("control_text_linear", torch.cat((context[1], context[0])))  # image tokens come first
    own = joined[len(context[1]) :], joined[: len(context[1])]
    e0 = control.linear("control_t_mod", e0_Q6d)
    streams = {
        name: control.linear(f"control_initial_combine_linear_{name}", wan.patches(x[0]))
        for name, x in zip(("dense", "sparse"), maps, strict=True)
    }
    sums = []
    num_layers = 1 + max(int(k.split(".")[1]) for k in control.state if k.startswith("control_combine_linears."))
    for i in range(num_layers):
        for name, x in streams.items():
            streams[name] = control.layer(f"control_blocks_{name}.{i}", i, x, e0, own, keys)
        sums.append(control.linear(f"control_combine_linears.{i}", streams["dense"] + streams["sparse"]))
    return sums


@dataclass
class Clip:
    """One clip of LongVie 2: what stays the same in all of its calls."""

    wan: Wan
    control: Wan
    tensors: State
    """Inputs by their names behind `clip.{j}.`."""

    @property
    def history(self) -> Tensor:
        noise = self.tensors["noise"]
        return self.tensors.get("history", noise[:, :0])[0]

    def start(self) -> Tensor:
        x = self.tensors["noise"][0].clone()
        if len(self.history):
            x[0] = (1 - 0.925926) * self.history[-1] + 0.925926 * x[0]
        return x

    def flow(self, x: Tensor, t: float, context: Context) -> Tensor:
        """History tokens first, at the clip's timestep; control for the clip's own alone."""
        num_frames, num_history = len(x), len(self.history)
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        first = num_history * rows * columns
        ones = torch.ones(num_history, 20, *x.shape[2:])
        inputs = torch.cat((torch.cat((ones, self.history), 1), torch.cat((x, self.tensors["condition"][0]), 1)))
        sums: list[Tensor] = []

        def add(index: int, h: Tensor, e0: Tensor) -> Tensor:
            if index == 0:
                maps, keys = (self.tensors["dense"], self.tensors["sparse"]), Keys(rows, columns, range(num_frames))
                sums.extend(control_sums(self.wan, self.control, maps, e0[first:], context, keys))
            return torch.cat((h[:first], h[first:] + sums[index])) if index < len(sums) else h

        keys = Keys(rows, columns, range(num_history + num_frames))
        return self.wan.forward(inputs, torch.full((len(inputs),), t), context, keys, add, num_history)


def longvie(wan: Wan, control: Wan, tensors: State, num_clips: int, num_steps: int, guidance: float) -> State:
    """Clip by clip with Euler steps, under the prompt and the negative prompt."""
    record = Record()
    u = [1 - i / num_steps for i in range(num_steps)] + [0.0]
    sigmas = [5 * v / (1 + 4 * v) for v in u]
    for j in range(num_clips):
        first = f"clip.{j}."
        clip = Clip(wan, control, {key.removeprefix(first): x for key, x in tensors.items() if key.startswith(first)})
        x = clip.start()
        contexts = [wan.read(clip.tensors[name], clip.tensors["image"]) for name in ("text", "negative")]
        for step in range(num_steps):
            t = 1000 * sigmas[step]
            flows = [clip.flow(x, t, context) for context in contexts]
            for branch, flow in enumerate(flows):
                record.call(f"{j}.{step}.{branch}", x, torch.full((len(x),), t), flow)
            x = x + (sigmas[step + 1] - sigmas[step]) * (flows[1] + guidance * (flows[0] - flows[1]))
        record.tensors[f"chunk.{j}"] = x[None]
    return record.tensors

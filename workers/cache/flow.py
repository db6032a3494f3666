"""FlowCache's compressed cache: a fixed number of keys per head, chosen by importance and against redundancy.

Source: Ma et al., "Flow Caching for Autoregressive Video Generation" (arXiv 2602.10825), with the score of R-KV: a key
is important if the newest latent frame's queries attend to it (softmax over the keys to choose from, averaged over the
queries, largest of a few neighbours), and redundant if its mean cosine with the others is high (softmax over them). The
score is lambda * importance - (1 - lambda) * redundancy with lambda = 0.07, and each head keeps its best keys. What is
dropped is gone. The mean cosine is found from the sum of all unit keys, in linear time, as in the paper.

Adapted: the sink and the newest keys stay (the paper never compresses chunks still in work; models with a sink need
it). Keys are compared before RoPE, as they are kept here; importance is measured after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.contracts import Attending, KeyValues, Moment

_NEIGHBOURS = 7
"""Tokens over which importance takes its maximum, as published."""


@dataclass(frozen=True)
class FlowSettings:
    """What is kept, in tokens."""

    sink_tokens: int
    recent_tokens: int
    """Newest keys, at least 1."""
    history_tokens: int
    """Keys per head between them: the hard limit."""
    frame_tokens: int
    """Queries that judge importance: those of the newest latent frame."""
    importance: float = 0.07
    """Lambda, in [0, 1]."""


@dataclass
class _Layer:
    sink: KeyValues | None = None
    history: KeyValues | None = None
    recent: KeyValues | None = None
    view: KeyValues | None = None
    logit_BNQK: Tensor | None = None
    """Between the newest frame's queries and all keys after the sink, oldest first; None where none was seen."""


class FlowCache:
    """Sink, chosen keys and newest keys of every layer; looks on in clean passes to learn what matters.

    Where nobody lets it look on, redundancy alone decides.

    Args:
        num_layers: Layers of the model.
        settings: What is kept.
        dtype: Storage; None keeps that of the keys.
    """

    def __init__(self, num_layers: int, settings: FlowSettings, dtype: torch.dtype | None = None) -> None:
        self._settings, self._dtype = settings, dtype
        self._layers = [_Layer() for _ in range(num_layers)]

    def wants(self, layer_index: int, moment: Moment) -> bool:
        """Shown each clean pass, right before its keys come."""
        return moment.is_clean_pass

    def observe(self, attending: Attending) -> None:
        """Note how the newest frame looks at the keys that the coming append may have to choose from."""
        if attending.cached is None:
            return
        settings, own = self._settings, attending.own
        keys = torch.cat((attending.cached.k_BKND, own.k_BKND.to(attending.cached.k_BKND.dtype)), 1)
        if keys.shape[1] - settings.sink_tokens - settings.recent_tokens <= settings.history_tokens:
            return
        q_BQND = attending.q_BQND[:, -settings.frame_tokens :].float() / math.sqrt(attending.q_BQND.shape[-1])
        logit_BNQK = torch.einsum("bqnd,bknd->bnqk", q_BQND, keys[:, settings.sink_tokens :].float())
        self._layers[attending.layer_index].logit_BNQK = logit_BNQK

    def append(self, layer_index: int, chunk: KeyValues) -> None:
        assert chunk.log_mass_BNK is None, "every key stands for itself"
        layer = self._layers[layer_index]
        chunk = self._own(chunk)
        held = 0 if layer.sink is None else layer.sink.num_tokens
        to_sink = max(0, min(chunk.num_tokens, self._settings.sink_tokens - held))
        if to_sink:
            layer.sink = _join(layer.sink, chunk.narrow(0, to_sink))
            chunk = chunk.narrow(to_sink, chunk.num_tokens)
        if chunk.num_tokens:
            recent = _join(layer.recent, chunk)
            leaving = max(0, recent.num_tokens - self._settings.recent_tokens)
            if leaving:
                layer.history = self._choose(layer, recent.narrow(0, leaving))
            layer.recent = self._own(recent.narrow(leaving, recent.num_tokens))  # lets go of the longer memory
        layer.logit_BNQK = None
        layer.view = _assemble(layer)

    def read(self, layer_index: int) -> KeyValues | None:
        return self._layers[layer_index].view

    @property
    def num_tokens(self) -> int:
        view = self._layers[0].view
        return 0 if view is None else view.num_tokens

    @property
    def num_bytes(self) -> int:
        return sum(layer.view.num_bytes for layer in self._layers if layer.view is not None)

    def state(self) -> Mapping[str, Tensor]:
        return {
            f"{index}.{name}.{key}": tensor
            for index, layer in enumerate(self._layers)
            for name, part in (("sink", layer.sink), ("history", layer.history), ("recent", layer.recent))
            if part is not None
            for key, tensor in (("k", part.k_BKND), ("v", part.v_BKND), ("position", part.position_K3))
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for index in range(len(self._layers)):
            sink, history, recent = (_read_part(state, f"{index}.{name}") for name in ("sink", "history", "recent"))
            layer = self._layers[index] = _Layer(sink, history, recent)
            layer.view = _assemble(layer)

    def _own(self, part: KeyValues) -> KeyValues:
        dtype = self._dtype or part.k_BKND.dtype
        k, v = (x.to(dtype, copy=True, memory_format=torch.contiguous_format) for x in (part.k_BKND, part.v_BKND))
        return KeyValues(k, v, part.position_K3.clone())

    def _choose(self, layer: _Layer, leaving: KeyValues) -> KeyValues:
        """The best of the history and of what leaves the newest keys, in the order of their coming."""
        batch, _, heads, _ = leaving.k_BKND.shape
        position = leaving.position_K3[None, :, None].expand(batch, -1, heads, -1)
        candidates = _join(layer.history, KeyValues(leaving.k_BKND, leaving.v_BKND, position))
        limit = self._settings.history_tokens
        if candidates.num_tokens <= limit:
            return candidates
        score_BNK = -(1 - self._settings.importance) * measure_redundancy(candidates.k_BKND)
        if layer.logit_BNQK is not None:
            seen = measure_importance(layer.logit_BNQK[..., : candidates.num_tokens])
            score_BNK = score_BNK + self._settings.importance * seen
        kept_BKN1 = score_BNK.topk(limit, -1).indices.sort(-1).values.transpose(1, 2)[..., None]
        return KeyValues(
            *(_gather(x, kept_BKN1) for x in (candidates.k_BKND, candidates.v_BKND, candidates.position_K3))
        )


def measure_importance(logit_BNQK: Tensor) -> Tensor:
    """Mean attention that each key gets from the queries, and from it the largest of its neighbours: BNK."""
    return F.max_pool1d(logit_BNQK.softmax(-1).mean(2), _NEIGHBOURS, stride=1, padding=_NEIGHBOURS // 2)


def measure_redundancy(k_BKND: Tensor) -> Tensor:
    """Softmax over the keys of each one's mean cosine with the others, float32 BNK."""
    unit_BNKD = F.normalize(k_BKND.float(), dim=-1).transpose(1, 2)
    total = torch.einsum("bnkd,bnd->bnk", unit_BNKD, unit_BNKD.sum(2))
    return ((total - 1.0) / k_BKND.shape[1]).softmax(-1)  # its cosine with itself does not count


def _gather(x_BKND: Tensor, index_BKN1: Tensor) -> Tensor:
    return x_BKND.gather(1, index_BKN1.expand(-1, -1, -1, x_BKND.shape[-1]))


def _join(a: KeyValues | None, b: KeyValues) -> KeyValues:
    """Keys of both, whose positions have the same form."""
    if a is None:
        return b
    dim = b.position_K3.dim() // 4  # [K, 3] or [B, K, N, 3]
    k, v = (torch.cat(pair, 1) for pair in ((a.k_BKND, b.k_BKND), (a.v_BKND, b.v_BKND)))
    return KeyValues(k, v, torch.cat((a.position_K3, b.position_K3), dim))


def _assemble(layer: _Layer) -> KeyValues | None:
    """One view in the order sink, history, recent; positions are per head once heads have chosen."""
    parts = [part for part in (layer.sink, layer.history, layer.recent) if part is not None]
    if not parts:
        return None
    position = [part.position_K3 for part in parts]
    if layer.history is not None:
        batch, _, heads, _ = layer.history.position_K3.shape
        position = [p if p.dim() > 2 else p[None, :, None].expand(batch, -1, heads, -1) for p in position]
    k, v = (torch.cat(pieces, 1) for pieces in ([p.k_BKND for p in parts], [p.v_BKND for p in parts]))
    return KeyValues(k, v, torch.cat(position, position[0].dim() // 4))


def _read_part(state: Mapping[str, Tensor], prefix: str) -> KeyValues | None:
    if f"{prefix}.k" not in state:
        return None
    k, v, position = (state[f"{prefix}.{name}"].clone() for name in ("k", "v", "position"))
    return KeyValues(k, v, position)

"""The bundled text encoder: any prompt to rows of numbers, without a vocabulary file.

A word is the mean of table rows chosen by hashing the word and its letter triples, so that every string has a meaning,
related words ("island", "islands") share rows, and a word never seen in training adds rows that are still near zero.
Two small attention layers put words into relation ("red houses", "then north"). Trained jointly with the DiT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.model.backbones import Backbone

NUM_FEATURES = 12  # the word itself and its first eleven letter triples: enough for words of thirteen letters
_WORD = re.compile(r"\w+|[^\w\s]")


class EncodedText(NamedTuple):
    """Prompts as rows; rows at and beyond `num_tokens_B` are zero."""

    text_BPE: Tensor
    num_tokens_B: Tensor


class FoldedText(NamedTuple):
    """Prompts with their padding folded into one row, and what each row counts for in a softmax (log m)."""

    text_BPE: Tensor
    log_mass_BP: Tensor


class PromptEncoder(Protocol):
    """What a rollout asks of a text encoder."""

    def encode(self, texts: Sequence[str]) -> EncodedText:
        """Prompts as they are written, to rows on the device of the model."""
        ...

    def read_ahead(self, texts: Sequence[str]) -> None:
        """Do what `encode` of these takes long for, while another thread computes on the device; returns when done.

        It may do nothing: then `encode` does it.
        """
        ...


@lru_cache(maxsize=65536)
def _word_features(word: str, num_rows: int) -> tuple[int, ...]:
    """Rows of the table for one word, padded with row 0, which means nothing."""
    marked = f"<{word}>"
    pieces = [marked, *(marked[i : i + 3] for i in range(len(marked) - 2))] if len(word) > 1 else [marked]
    hashes = (
        int.from_bytes(blake2b(p.encode("utf-8", "replace"), digest_size=8).digest()) for p in pieces[:NUM_FEATURES]
    )
    rows = [1 + h % (num_rows - 1) for h in hashes]
    return tuple(rows + [0] * (NUM_FEATURES - len(rows)))


def tokenize(texts: Sequence[str], backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Rows of the table for each word of each text, and the number of words.

    Returns:
        rows_BPF (int64, P = the longest text, at least 1) and num_tokens_B (int64). Words past the model's text length
        are dropped; an empty text has no tokens, which is how a model is asked without a prompt.
    """
    assert backbone.text is not None
    num_rows = backbone.text.num_rows
    words = [_WORD.findall(text.lower())[: backbone.text_tokens] for text in texts]
    longest = max(1, *(len(w) for w in words))
    padding = (0,) * NUM_FEATURES
    rows = [[_word_features(word, num_rows) for word in w] + [padding] * (longest - len(w)) for w in words]
    return torch.tensor(rows, dtype=torch.int64), torch.tensor([len(w) for w in words], dtype=torch.int64)


def fold_padding(encoded: EncodedText, text_tokens: int) -> FoldedText:
    """Let one zero row stand for all padding up to `text_tokens`: cross-attention stays exactly the same, but shorter.

    Row n of a prompt of n tokens gets log(text_tokens - n); rows after it get -inf. A prompt that fills all rows has
    no padding and its extra row counts for nothing.
    """
    text = F.pad(encoded.text_BPE, (0, 0, 0, 1))
    index = torch.arange(text.shape[1], device=text.device)[None]
    num_tokens = encoded.num_tokens_B[:, None]
    padding = (text_tokens - num_tokens).to(torch.float32).log()
    nothing = torch.tensor(-math.inf, device=text.device)
    mass = torch.where(index < num_tokens, 0.0, torch.where(index == num_tokens, padding, nothing))
    return FoldedText(text, mass)


class _Layer(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.o = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x_BPE: Tensor, is_visible_BP: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BPE)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_visible_BP[:, None, None, :])
        x_BPE = x_BPE + self.o(out.transpose(1, 2).flatten(-2))
        return x_BPE + cast(Tensor, self.ffn(self.norm2(x_BPE)))


class TextEncoder(nn.Module):
    """Words to rows of width `text_dim`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        assert backbone.text is not None, f"{backbone.name} brings its own text encoder"
        self.backbone = backbone
        self.table = nn.Embedding(backbone.text.num_rows, backbone.text_dim, padding_idx=0)
        self.layers = nn.ModuleList(
            _Layer(backbone.text_dim, backbone.text.num_heads) for _ in range(backbone.text.num_layers)
        )
        self.norm = nn.LayerNorm(backbone.text_dim)
        nn.init.normal_(self.table.weight, std=0.1)
        with torch.no_grad():
            self.table.weight[0].zero_()

    def forward(self, rows_BPF: Tensor, num_tokens_B: Tensor) -> EncodedText:
        """Encode what `tokenize` returned (on the device of the weights)."""
        num_features = (rows_BPF > 0).sum(-1, keepdim=True).clamp(min=1)
        x = self.table(rows_BPF).sum(-2) / num_features.sqrt()
        index = torch.arange(x.shape[1], device=x.device)
        is_token_BP = index[None] < num_tokens_B[:, None]
        x = x + _sinusoid(x.shape[1], x.shape[2], x.device).to(x.dtype) * 0.1
        is_visible_BP = is_token_BP | (index == 0)[None]  # an empty prompt still needs one key; its rows become zero
        for layer in self.layers:
            x = layer(x, is_visible_BP)
        return EncodedText(self.norm(x) * is_token_BP[..., None], num_tokens_B)

    def encode(self, texts: Sequence[str]) -> EncodedText:
        """Encode prompts as they are written."""
        rows_BPF, num_tokens_B = tokenize(texts, self.backbone)
        device = self.table.weight.device
        return cast(EncodedText, self(rows_BPF.to(device), num_tokens_B.to(device)))

    def read_ahead(self, texts: Sequence[str]) -> None:
        """Nothing takes long here."""


def _sinusoid(length: int, dim: int, device: torch.device) -> Tensor:
    index = torch.arange(dim // 2, dtype=torch.float32, device=device)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * 1000.0 ** (-2 * index / dim)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)

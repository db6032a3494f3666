"""Wan's text encoder: umT5, encoder only, through transformers, which is loaded when it is needed.

A prompt is encoded once, so the weights (11 GB in bfloat16 for the true model) need not stay on the GPU: they rest on
the CPU and visit the GPU layer by layer, also while a rollout fills it. A GPU that waits for them is idle, so the
prompts of the next take are read ahead, beside the take that computes.
"""

from __future__ import annotations

import html
import json
import logging
import re
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from workers.errors import CheckpointMismatch, ConfigUnsupported
from workers.model.backbones import Backbone
from workers.model.text_encoder import EncodedText
from workers.streams import stream_for

logger = logging.getLogger(__name__)

_SPACE = re.compile(r"\s+")
REMEMBERED_PROMPTS = 64
"""Newest prompts whose rows are kept in host memory, at most 4 MB each for the true model in bfloat16."""
READ_AHEAD = 16
"""Prompts of a take that are read ahead; more of them would drive out those of the take that computes."""
ROOM_BYTES = 2 << 30
"""Of a GPU that must be free for reading ahead: a visiting layer of the true model is 0.4 GB, in float32 twice that."""


def clean_prompt(text: str) -> str:
    """A prompt as Wan's encoder was trained to read it: repaired text, entities resolved (twice), single spaces."""
    text = cast(str, import_library("ftfy").fix_text(text))
    text = html.unescape(html.unescape(text)).strip()
    return _SPACE.sub(" ", text).strip()


def import_library(name: str) -> Any:
    """A package of the extra `wan`.

    Raises:
        ConfigUnsupported: It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigUnsupported(
            f"backbone.name: Wan models need the package {error.name}: pip install 'longtake[wan]'"
        ) from error


def make_umt5(backbone: Backbone) -> nn.Module:
    """The encoder without weights of its own; build it on the meta device."""
    assert backbone.umt5 is not None, f"{backbone.name} has another text encoder"
    sizes = backbone.umt5
    library = import_library("transformers.models.umt5.modeling_umt5")
    config = import_library("transformers.models.umt5.configuration_umt5").UMT5Config(
        vocab_size=sizes.num_words,
        d_model=backbone.text_dim,
        d_kv=sizes.head_dim,
        d_ff=sizes.ffn_dim,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
    )
    return cast(nn.Module, library.UMT5EncoderModel(config))


def open_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` that a folder's tokenizer.json describes.

    It is read as it is: transformers would build another one by the class that tokenizer_config.json names (T5's), and
    lose the file's normaliser and its bytes for unknown letters on the way.

    Raises:
        CheckpointMismatch: The folder holds none.
    """
    path = folder / "tokenizer.json"
    try:
        text = path.read_text("utf-8")
        if "model" not in json.loads(text):  # the library tells damage by a bare Exception
            raise ValueError("it has no model")
        tokenizer = import_library("tokenizers").Tokenizer.from_str(text)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointMismatch(
            f"{folder}: no tokenizer ({str(error).splitlines()[0]}); expected tokenizer.json of google/umt5-xxl, "
            "published with the base model"
        ) from error
    tokenizer.no_padding()
    return tokenizer


class Umt5Encoder:
    """Prompts to rows for the transformer.

    Args:
        module: `make_umt5` with weights, in evaluation mode, all on one device.
        tokenizer: `open_tokenizer`.
        text_tokens: Longest prompt in tokens, the end mark included.
        device: Where it computes.
        is_resting: The weights stay where they are and visit the device layer by layer, while a layer runs.
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any, text_tokens: int, device: torch.device, *, is_resting: bool = False
    ) -> None:
        self.module, self.text_tokens, self.device = module, text_tokens, device
        self._tokenizer = tokenizer
        tokenizer.enable_truncation(text_tokens)
        encoder = cast(Any, module).encoder
        self._embed: nn.Embedding = encoder.embed_tokens
        self._encoder = encoder
        self._remembered: dict[str, Tensor] = {}  # the longest unused first
        self._remembering, self._visiting = threading.Lock(), threading.Lock()
        self._beside = stream_for("prompts read ahead", device) if device.type == "cuda" else None
        if is_resting:
            for part in (*encoder.block, encoder.final_layer_norm):
                _visit(part, device)

    def tokenize(self, text: str) -> Tensor:
        """Rows of the vocabulary, ids_P, with the end mark; a longer text is cut before it."""
        return torch.tensor(self._tokenizer.encode(clean_prompt(text)).ids, dtype=torch.int64)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> EncodedText:
        """Encode prompts as they are written; rows behind a prompt are zero, and attended as such.

        Each prompt is encoded by itself, so its rows do not depend on others, and only once while it is remembered.
        """
        rows = [self._recall(text) for text in texts]
        num_tokens_B = torch.tensor([len(row_PE) for row_PE in rows], device=self.device)
        text_BPE = nn.utils.rnn.pad_sequence([row_PE.to(self.device) for row_PE in rows], batch_first=True)
        return EncodedText(text_BPE, num_tokens_B)

    def read_ahead(self, texts: Sequence[str]) -> None:
        """Encode the first of these prompts on a stream of its own and remember them, if there is room on the GPU."""
        if self._beside is not None and torch.cuda.mem_get_info(self.device)[0] < ROOM_BYTES:
            return
        try:
            with torch.inference_mode(), torch.cuda.stream(self._beside):  # None changes nothing
                for text in texts[:READ_AHEAD]:
                    self._recall(text)
        except torch.OutOfMemoryError:
            logger.info("no memory to read prompts ahead: they are read when their take has the GPU")

    def _recall(self, text: str) -> Tensor:
        """Rows of one prompt without padding, [P, E] on the CPU; threads that ask for remembered ones never wait."""
        rows_PE = self._look_up(text)
        if rows_PE is not None:
            return rows_PE
        with self._visiting:
            rows_PE = self._look_up(text)  # which another thread may have encoded meanwhile
            if rows_PE is None:
                rows_PE = self._encode(text)
                with self._remembering:
                    if len(self._remembered) == REMEMBERED_PROMPTS:
                        self._remembered.pop(next(iter(self._remembered)))
                    self._remembered[text] = rows_PE
        return rows_PE

    def _look_up(self, text: str) -> Tensor | None:
        with self._remembering:
            rows_PE = self._remembered.pop(text, None)
            if rows_PE is not None:
                self._remembered[text] = rows_PE
            return rows_PE

    def _encode(self, text: str) -> Tensor:
        ids_BP = self.tokenize(text)[None]
        embedded = self._embed(ids_BP.to(self._embed.weight.device)).to(self.device)
        mask_BP = torch.ones(ids_BP.shape, dtype=torch.int64, device=self.device)
        rows: Tensor = self._encoder(inputs_embeds=embedded, attention_mask=mask_BP).last_hidden_state
        return rows[0].cpu()


def _visit(part: nn.Module, device: torch.device) -> None:
    """Let the weights of a part be on a device while it runs, and only then; they rest where they are."""
    resting = [
        (owner, name, tensor)
        for owner in part.modules()
        for name, tensor in owner._parameters.items()
        if tensor is not None
    ]

    def come(*_: object) -> None:
        for owner, name, tensor in resting:
            visitor = tensor.detach().to(device, copy=True, non_blocking=True)
            owner._parameters[name] = cast(nn.Parameter, visitor)  # a plain tensor: it lives for one call

    def go(*_: object) -> None:
        for owner, name, tensor in resting:
            owner._parameters[name] = tensor

    part.register_forward_pre_hook(come)
    part.register_forward_hook(go, always_call=True)

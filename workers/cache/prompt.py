"""Cross-attention keys of the prompts in use: projected once per prompt, dropped when the prompt changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from workers.contracts import PromptKeys

PromptLayers = Sequence[PromptKeys]


class PromptCache:
    """Keys of the prompt that holds now and of the negative prompt.

    Args:
        project: Prompt text to the keys of all layers; it does not depend on the timestep.
    """

    def __init__(self, project: Callable[[str], PromptLayers]) -> None:
        self._project = project
        self._held: dict[str, PromptLayers] = {}

    def read(self, *prompts: str) -> list[PromptLayers]:
        """Keys of these prompts; all others are forgotten."""
        self._held = {text: self._held[text] if text in self._held else self._project(text) for text in prompts}
        return [self._held[text] for text in prompts]

    @property
    def num_bytes(self) -> int:
        layers = [keys for prompt in self._held.values() for keys in prompt]
        return sum(tensor.nbytes for keys in layers for tensor in keys if tensor is not None)

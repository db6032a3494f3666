"""The gate: which calls reach a sparse policy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workers.attention.gate import Gate, GatedAttention, GatedPromptAttention
from workers.attention.history import DenseRegion
from workers.attention.streaming import StreamingAttention
from workers.contracts import AttentionPlan, KeyValues, Moment, PromptKeys


def sparse_steps(num_steps: int, share: float) -> list[int]:
    gate = GatedAttention(StreamingAttention(DenseRegion(1, 1)), dense_step_share=share)
    return [step for step in range(num_steps) if not gate.is_dense(0, Moment(3, step, num_steps))]


@pytest.mark.parametrize(
    ("num_steps", "share", "first"), [(4, 0.3, 1), (5, 0.3, 1), (10, 0.3, 3), (50, 0.3, 15), (4, 0.0, 0), (4, 1.0, 4)]
)
def test_the_first_share_of_the_steps_is_dense_rounded_down(num_steps: int, share: float, first: int) -> None:
    assert sparse_steps(num_steps, share) == list(range(first, num_steps))


@pytest.mark.parametrize(("share", "is_dense"), [(0.3, False), (0.99, False), (1.0, True)])
def test_the_clean_pass_counts_as_the_last_step(share: float, is_dense: bool) -> None:
    gate = GatedAttention(StreamingAttention(DenseRegion(1, 1)), dense_step_share=share)
    assert gate.is_dense(0, Moment(3, num_steps=4, noise_level=0.0, is_clean_pass=True)) is is_dense


def test_layers_outside_of_the_sparse_set_see_everything() -> None:
    gate = GatedAttention(StreamingAttention(DenseRegion(1, 1)), dense_step_share=0.0, sparse_layers=[1, 4])
    x = torch.zeros(1, 6, 2, 8)
    keys = KeyValues(x, x, torch.zeros(6, 3))

    def plan(layer: int) -> AttentionPlan:
        return gate.plan(layer, Moment(3), x, keys, keys)

    seen = {layer: sum(part.stop - part.start for part in plan(layer).parts) for layer in range(6)}
    assert seen == {0: 12, 1: 8, 2: 12, 3: 12, 4: 8, 5: 12}


def test_prompt_rows_are_left_out_behind_the_same_gate_only() -> None:
    asked: list[tuple[str, int, int]] = []
    now = Moment(0)

    def named(name: str) -> Callable[[int, Tensor, PromptKeys], Tensor]:
        def attend(layer_index: int, q_BQND: Tensor, keys: PromptKeys) -> Tensor:
            asked.append((name, layer_index, now.step_index))
            return q_BQND

        return attend

    gated = GatedPromptAttention(named("chosen"), named("dense"), Gate(0.3, frozenset((0, 2))))
    x = torch.zeros(1, 6, 2, 8)
    with pytest.raises(AssertionError, match="announces each call first"):
        gated(0, x, PromptKeys(x, x))
    for step in range(4):
        now = Moment(7, step, 4)
        gated.follow(now)
        for layer in range(3):
            gated(layer, x, PromptKeys(x, x))
    assert {(layer, step) for name, layer, step in asked if name == "chosen"} == {
        (layer, step) for layer in (0, 2) for step in (1, 2, 3)
    }
    assert len(asked) == 12

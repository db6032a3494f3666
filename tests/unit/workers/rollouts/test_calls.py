"""Prompts side by side in one call, and guidance."""

import torch
from torch import Tensor

from workers.contracts import PromptKeys
from workers.model.dit import attend_prompt_dense
from workers.rollouts.calls import guide, join_prompts


def draw_layers(num_rows: int) -> list[PromptKeys]:
    return [PromptKeys(*torch.randn(2, 1, num_rows, 2, 8, dtype=torch.float64).unbind(0)) for _ in range(3)]


def test_each_chunk_of_a_call_attends_to_its_own_prompt_in_every_layer() -> None:
    torch.manual_seed(0)
    first, second = draw_layers(5), draw_layers(9)
    q_BQND = torch.randn(1, 12, 2, 8, dtype=torch.float64)
    attend = join_prompts([first, second, second], attend_prompt_dense)
    for layer in range(3):
        out = attend(layer, q_BQND, first[layer])
        for chunk, prompt in enumerate((first, second, second)):
            part = slice(4 * chunk, 4 * chunk + 4)
            alone = attend_prompt_dense(layer, q_BQND[:, part], prompt[layer])
            torch.testing.assert_close(out[:, part], alone, atol=1e-12, rtol=0)


def test_one_prompt_for_all_chunks_is_attended_to_at_once() -> None:
    prompt = draw_layers(5)
    assert join_prompts([prompt, prompt], attend_prompt_dense) is attend_prompt_dense


def test_guidance_goes_from_the_negative_prompt_through_the_prompt() -> None:
    with_prompt, negative = torch.randn(2, 4, 4).unbind(0)
    expected: Tensor = negative + 5.0 * (with_prompt - negative)
    torch.testing.assert_close(guide([with_prompt, negative], 5.0), expected, atol=1e-5, rtol=0)
    assert guide([with_prompt], 5.0) is with_prompt

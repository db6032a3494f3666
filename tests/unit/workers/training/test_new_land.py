"""New land in the memory stage: contexts fade but never begin faded; the critic's blame leads towards the truth."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.training.new_land import CriticRecipe, LandJudge, fade

CPU = torch.device("cpu")


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 12), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_context_fades_from_some_chunk_on_more_and_more(seed: int, chunks: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(16, 3 * chunks, 4, 8, 8, generator=generator)
    change = (fade(context, 3, share, generator) - context).abs().mean((2, 3, 4)).unflatten(1, (-1, 3)).mean(2)
    assert not change[:, 0].any()
    faded = change[:, -1] > 0
    if share == 0.0:
        assert not change.any()
    for clip in change[faded]:
        begun = int((clip > 0).int().argmax())
        assert (clip[begun:] > 0).all()
        assert clip[-1] > 0.8 * clip[begun]
    assert faded.all() or share < 1.0


def test_the_critic_learns_what_is_true_and_blames_what_is_not_only_where_nothing_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    judge = LandJudge(CriticRecipe(width=16, lr=3e-3), 3, 4, 8, CPU)
    text, unknown = torch.randn(4, 8, generator=generator), torch.ones(4, 6, 16, 16, dtype=torch.bool)
    unknown[..., :8] = False

    def draw(mean: float) -> torch.Tensor:
        return 0.3 * torch.randn(4, 6, 4, 16, 16, generator=generator) + mean

    assert not judge.blame(draw(0.0), text, unknown, generator).any()  # it has learnt nothing yet
    for _ in range(40):
        judge.learn(draw(0.5), draw(-0.5), text, generator)
    assert judge.skill > 0.3
    push = judge.blame(draw(-0.5), text, unknown, generator)
    assert not push[..., :8].any()
    size = push[..., 8:].square().mean().sqrt()
    torch.testing.assert_close(size, judge.skill, rtol=1e-2, atol=0.0)
    assert push[..., 8:].mean() < 0  # to go against the blame is to go up, to where the truth lies

    other = LandJudge(CriticRecipe(width=16, lr=3e-3), 3, 4, 8, CPU)
    other.restore(judge.state())
    for one, same in zip(judge.critic.parameters(), other.critic.parameters(), strict=True):
        assert torch.equal(one, same)
    assert other.skill == judge.skill

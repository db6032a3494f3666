"""FlowCache's cache: its scores against their definitions, its hard limit, and that it looks on in a rollout."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from workers.cache.flow import FlowCache, FlowSettings, measure_importance, measure_redundancy
from workers.contracts import Attending, AttentionPlan, AttentionProbe, KeyValues, Moment

HEADS, DIM, FRAME = 2, 4, 5
CLEAN = Moment(0, noise_level=0.0, is_clean_pass=True)


def make_chunk(index: int, k: Tensor | None = None, batch: int = 1) -> KeyValues:
    generator = torch.Generator().manual_seed(index)
    time = torch.arange(3 * FRAME) // FRAME + 3 * index
    position = torch.stack((time, torch.zeros_like(time), torch.arange(3 * FRAME) % FRAME), 1).float()
    drawn = torch.randn(2, batch, 3 * FRAME, HEADS, DIM, generator=generator)
    return KeyValues(drawn[0] if k is None else k, drawn[1], position)


def look_on(cache: FlowCache, chunk: KeyValues, q_BQND: Tensor) -> None:
    assert cache.wants(0, CLEAN)
    assert not cache.wants(0, Moment(0))
    cache.observe(Attending(0, CLEAN, AttentionPlan(()), q_BQND, cache.read(0), chunk, chunk.k_BKND, lambda keys: keys))


@given(num=st.integers(1, 30), seed=st.integers(0, 99))
def test_redundancy_equals_the_mean_of_all_cosines(num: int, seed: int) -> None:
    k = torch.randn(2, num, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    cosine = F.cosine_similarity(k[:, :, None], k[:, None], dim=-1).permute(0, 3, 1, 2)
    without_itself = cosine.masked_fill(torch.eye(num, dtype=torch.bool), 0.0)
    torch.testing.assert_close(measure_redundancy(k), without_itself.mean(-1).softmax(-1), atol=1e-5, rtol=0)


def test_importance_is_the_largest_mean_attention_of_seven_neighbours() -> None:
    logit = torch.randn(2, HEADS, 3, 20, generator=torch.Generator().manual_seed(0))
    mean = logit.softmax(-1).mean(2)
    expected = torch.stack([mean[..., max(0, i - 3) : i + 4].amax(-1) for i in range(20)], -1)
    torch.testing.assert_close(measure_importance(logit), expected)


@given(
    sink=st.integers(0, 8),
    recent=st.integers(1, 40),
    limit=st.integers(1, 40),
    seen=st.booleans(),
    batch=st.sampled_from((1, 2)),
)
def test_the_limit_is_hard_and_ends_are_kept(sink: int, recent: int, limit: int, seen: bool, batch: int) -> None:
    cache = FlowCache(1, FlowSettings(sink, recent, limit, FRAME))
    chunks = [make_chunk(i, batch=batch) for i in range(6)]
    for count, chunk in enumerate(chunks, 1):
        if seen:
            look_on(cache, chunk, torch.randn(batch, 3 * FRAME, HEADS, DIM))
        cache.append(0, chunk)
        total = 3 * FRAME * count
        assert cache.num_tokens == min(total, sink + min(recent, max(0, total - sink)) + limit)
    kept = cache.read(0)
    assert kept is not None
    keys = torch.cat([c.k_BKND for c in chunks], 1)
    assert torch.equal(kept.k_BKND[:, :sink], keys[:, :sink])
    assert torch.equal(kept.k_BKND[:, -recent:], keys[:, -recent:])


def test_of_equal_keys_and_one_that_stands_out_the_equal_ones_go_first() -> None:
    k = torch.ones(1, 3 * FRAME, HEADS, DIM)
    k[:, 4] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    cache = FlowCache(1, FlowSettings(0, 3 * FRAME, 2, FRAME))
    for chunk in (make_chunk(0, k), make_chunk(1)):
        cache.append(0, chunk)
    assert 4 in places_of_history(cache, 2)


def test_what_queries_look_at_is_kept_although_it_is_redundant() -> None:
    """Keys 6 to 8 are copies of each other, but all queries look there."""
    k = torch.randn(1, 3 * FRAME, HEADS, DIM, generator=torch.Generator().manual_seed(7))
    k[:, 6:9] = torch.tensor([9.0, 9.0, 9.0, 9.0])
    settings = FlowSettings(0, 3 * FRAME, 3, FRAME, importance=0.9)
    cache, blind = FlowCache(1, settings), FlowCache(1, settings)
    chunks = make_chunk(0, k), make_chunk(1)
    for chunk in chunks:
        look_on(cache, chunk, torch.full((1, 3 * FRAME, HEADS, DIM), 3.0))
        cache.append(0, chunk)
        blind.append(0, chunk)
    # Importance takes its maximum over seven neighbours, so these are kept for its sake too.
    assert all(3 <= place <= 11 for place in places_of_history(cache, 3))
    assert not all(3 <= place <= 11 for place in places_of_history(blind, 3))


def places_of_history(cache: FlowCache, num: int) -> list[int]:
    """Which tokens of the first chunk head 0 still has, of a history of `num` keys and no sink."""
    kept = cache.read(0)
    assert kept is not None
    position = kept.position_K3[0, :num, 0]
    return (position[:, 0] * FRAME + position[:, 2]).int().tolist()


def test_a_rollout_lets_it_look_on() -> None:
    assert isinstance(FlowCache(1, FlowSettings(0, 1, 1, 1)), AttentionProbe)

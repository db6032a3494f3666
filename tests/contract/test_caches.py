"""One class of tests for every KVCache: what the protocol promises, whatever is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from workers.cache.dense import DenseCache
from workers.cache.flow import FlowCache, FlowSettings
from workers.cache.temporal_merge import MergeSettings, TemporalCache
from workers.cache.window import WindowCache
from workers.contracts import KeyValues, KVCache
from workers.search.exact import ExactSearch

LAYERS, TOKENS = 3, 6  # tokens per latent frame


def temporal(**settings: Any) -> TemporalCache:
    return TemporalCache(LAYERS, MergeSettings(2 * TOKENS, 4 * TOKENS + 1, **settings), ExactSearch().top1)


CACHES: dict[str, Callable[[], KVCache]] = {
    "dense": lambda: DenseCache(LAYERS),
    "window": lambda: WindowCache(LAYERS, sink_tokens=2 * TOKENS, recent_tokens=5 * TOKENS),
    "window-without-sink": lambda: WindowCache(LAYERS, sink_tokens=0, recent_tokens=2 * TOKENS),
    "window-smaller-than-a-chunk": lambda: WindowCache(LAYERS, sink_tokens=1, recent_tokens=4),
    "flow": lambda: FlowCache(LAYERS, FlowSettings(2 * TOKENS, 3 * TOKENS + 1, 4 * TOKENS + 2, TOKENS)),
    "temporal-not-full": lambda: temporal(num_groups=200, min_cosine=1.1, storage="model"),
    "flow-without-sink": lambda: FlowCache(LAYERS, FlowSettings(0, 1, 2 * TOKENS, TOKENS)),
}


def make_chunk(index: int, layer: int, num_frames: int = 3) -> KeyValues:
    generator = torch.Generator().manual_seed(1000 * index + layer)
    k, v = torch.randn(2, 1, num_frames * TOKENS, 2, 8, generator=generator).unbind(0)
    time = torch.arange(num_frames * TOKENS) // TOKENS + index * num_frames
    return KeyValues(k, v, torch.stack((time, torch.zeros_like(time), torch.zeros_like(time)), 1).float())


def fill(cache: KVCache, chunks: range) -> None:
    for index in chunks:
        for layer in range(LAYERS):
            cache.append(layer, make_chunk(index, layer))


def positions_of_head(kept: KeyValues, head: int) -> torch.Tensor:
    return kept.position_K3 if kept.position_K3.dim() == 2 else kept.position_K3[0, :, head]


def assert_same(a: KVCache, b: KVCache) -> None:
    for layer in range(LAYERS):
        x, y = a.read(layer), b.read(layer)
        assert x is not None
        assert y is not None
        assert torch.equal(x.k_BKND, y.k_BKND)
        assert torch.equal(x.v_BKND, y.v_BKND)
        assert torch.equal(x.position_K3, y.position_K3)


@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES.keys())
class TestEveryCache:
    def test_is_empty_at_first(self, make: Callable[[], KVCache]) -> None:
        cache = make()
        assert cache.read(0) is None
        assert cache.num_tokens == cache.num_bytes == 0

    def test_copies_what_it_is_given(self, make: Callable[[], KVCache]) -> None:
        cache, chunk = make(), make_chunk(0, 0)
        cache.append(0, chunk)
        kept = cache.read(0)
        assert kept is not None
        before = kept.k_BKND.clone()
        chunk.k_BKND.zero_()
        assert torch.equal(kept.k_BKND, before)

    def test_returns_the_same_object_until_the_next_append(self, make: Callable[[], KVCache]) -> None:
        cache = make()
        fill(cache, range(1))
        first = cache.read(1)
        assert cache.read(1) is first
        fill(cache, range(1, 2))
        assert cache.read(1) is not first

    def test_keys_values_and_positions_stay_together(self, make: Callable[[], KVCache]) -> None:
        cache = make()
        fill(cache, range(7))
        for layer in range(LAYERS):
            kept = cache.read(layer)
            assert kept is not None
            source = [make_chunk(i, layer) for i in range(7)]
            keys = torch.cat([c.k_BKND for c in source], 1)
            values = torch.cat([c.v_BKND for c in source], 1)
            times = torch.cat([c.position_K3 for c in source])
            for head in range(kept.k_BKND.shape[2]):
                where = [int((keys[0, :, head, 0] == key).nonzero()) for key in kept.k_BKND[0, :, head, 0]]
                assert where == sorted(where)
                assert torch.equal(keys[0, where, head], kept.k_BKND[0, :, head])
                assert torch.equal(values[0, where, head], kept.v_BKND[0, :, head])
                assert torch.equal(times[where], positions_of_head(kept, head))

    def test_counts_tokens_and_bytes(self, make: Callable[[], KVCache]) -> None:
        cache = make()
        fill(cache, range(4))
        kept = cache.read(0)
        assert kept is not None
        assert cache.num_tokens == kept.num_tokens == len(positions_of_head(kept, 0))
        in_use = LAYERS * 2 * kept.num_tokens * 2 * 8 * 4
        # A cache that merges reserves its table at once: tests/unit/workers/cache/test_reserved.py.
        assert cache.num_bytes == in_use if kept.log_mass_BNK is None else cache.num_bytes > in_use

    def test_restored_state_goes_on_like_the_unbroken_one(self, make: Callable[[], KVCache]) -> None:
        unbroken, resumed = make(), make()
        fill(unbroken, range(5))
        state = {name: tensor.clone() for name, tensor in unbroken.state().items()}
        fill(resumed, range(2))
        resumed.restore(state)
        assert_same(unbroken, resumed)
        for cache in (unbroken, resumed):
            fill(cache, range(5, 9))
        assert_same(unbroken, resumed)

    def test_layers_may_be_read_while_the_clean_pass_goes_through_them(self, make: Callable[[], KVCache]) -> None:
        cache, reference = make(), make()
        fill(cache, range(4))
        fill(reference, range(4))
        cache.append(0, make_chunk(4, 0))
        assert_same_layer(cache, reference, 1)
        assert_same_layer(cache, reference, 2)


def assert_same_layer(a: KVCache, b: KVCache, layer: int) -> None:
    x, y = a.read(layer), b.read(layer)
    assert x is not None
    assert y is not None
    assert torch.equal(x.k_BKND, y.k_BKND)
    assert torch.equal(x.position_K3, y.position_K3)


def times_kept(cache: KVCache) -> list[int]:
    kept = cache.read(0)
    assert kept is not None
    return kept.position_K3[::TOKENS, 0].int().tolist()


def test_dense_keeps_everything_in_order() -> None:
    cache = DenseCache(LAYERS)
    fill(cache, range(40))
    assert times_kept(cache) == list(range(120))


def test_dense_grows_without_copying_at_each_append() -> None:
    cache, buffers = DenseCache(LAYERS), set()
    for index in range(60):
        fill(cache, range(index, index + 1))
        kept = cache.read(0)
        assert kept is not None
        buffers.add(kept.k_BKND.data_ptr())
    assert len(buffers) <= 7


def test_dense_may_store_narrower_than_it_is_given() -> None:
    cache = DenseCache(LAYERS, torch.bfloat16)
    fill(cache, range(2))
    kept = cache.read(2)
    assert kept is not None
    assert kept.k_BKND.dtype == torch.bfloat16
    assert torch.equal(kept.k_BKND[:, 18:], make_chunk(1, 2).k_BKND.bfloat16())


def test_window_keeps_the_sink_and_the_newest_frames() -> None:
    cache = WindowCache(LAYERS, sink_tokens=2 * TOKENS, recent_tokens=5 * TOKENS)
    seen = []
    for index in range(4):
        fill(cache, range(index, index + 1))
        seen.append(times_kept(cache))
    assert seen == [[0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 4, 5, 6, 7, 8], [0, 1, 7, 8, 9, 10, 11]]


def test_window_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="recent_tokens 0"):
        WindowCache(LAYERS, sink_tokens=3, recent_tokens=0)

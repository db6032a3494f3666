"""Every search back end: true cosines, honest codes, one answer for one question, and near neighbours found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import workers.search.faiss_index as faiss_index
import workers.search.protocol as protocol
from workers.errors import KernelUnavailable
from workers.search.exact import ExactSearch
from workers.search.protocol import Search, bucketer
from workers.search.quant import multiply, quantise, round_to_codes
from workers.search.select import check_search, make_search

NAMES = ("exact", "lsh", "quant", "faiss-lsh", "faiss-flat", "faiss-sq8")
SEARCHES: dict[str, Search] = {name: make_search(name) for name in NAMES}  # type: ignore[arg-type]

sizes = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 90), st.sampled_from([8, 40])
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_clusters(seed: int, num_keys: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys around a tenth as many centres, and queries near some of the keys."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, 2, num_keys // 10, head_dim, generator=generator)
    key = centre.repeat(1, 1, 10, 1) + 0.4 * torch.randn(1, 2, num_keys, head_dim, generator=generator)
    chosen = torch.randint(num_keys, (150,), generator=generator)
    return key[:, :, chosen] + 0.2 * torch.randn(1, 2, 150, head_dim, generator=generator), key


@pytest.mark.parametrize("name", NAMES)
class TestEverySearch:
    @given(sizes, st.integers(0, 10_000))
    def test_the_cosine_is_that_of_the_key_it_names(self, name: str, size: tuple[int, ...], seed: int) -> None:
        batch, heads, queries, keys, head_dim = size
        query, key = draw(seed, batch, heads, queries, head_dim), draw(seed + 1, batch, heads, keys, head_dim)
        index, cosine = SEARCHES[name].top1(query, key)
        assert index.dtype == torch.int64
        assert index.shape == cosine.shape == (batch, heads, queries)
        named = key.gather(2, index[..., None].expand(-1, -1, -1, head_dim))
        expected = torch.nn.functional.cosine_similarity(query.double(), named.double(), dim=-1)
        torch.testing.assert_close(cosine.double(), expected, atol=1e-5, rtol=0)

    @given(sizes, st.integers(0, 10_000))
    def test_heads_do_not_see_one_another_and_the_answer_is_always_the_same(
        self, name: str, size: tuple[int, ...], seed: int
    ) -> None:
        batch, heads, queries, keys, head_dim = size
        query, key = draw(seed, batch, heads, queries, head_dim), draw(seed + 1, batch, heads, keys, head_dim)
        torch.manual_seed(seed)
        forward = SEARCHES[name].top1(query, key).index_BNQ
        backward = SEARCHES[name].top1(query.flip(1), key.flip(1)).index_BNQ.flip(1)
        assert torch.equal(forward, backward)
        code = SEARCHES[name].buckets(query, 4, key)
        assert torch.equal(code, SEARCHES[name].buckets(query.flip(1), 4, key.flip(1)).flip(1))
        assert code.dtype == torch.int64
        assert 0 <= int(code.min()) <= int(code.max()) < 4

    def test_equal_vectors_share_a_bucket_whether_query_or_key(self, name: str) -> None:
        x = draw(1, 1, 2, 30, 16)
        both = SEARCHES[name].buckets(torch.cat((x, x), 2), 8, x)
        assert torch.equal(both[..., :30], both[..., 30:])
        assert torch.equal(both[..., :30], SEARCHES[name].buckets(x, 8, x))
        assert len(both.unique()) > 4

    @given(sizes, st.integers(0, 10_000))
    def test_buckets_that_are_prepared_are_the_same(self, name: str, size: tuple[int, ...], seed: int) -> None:
        batch, heads, queries, keys, head_dim = size
        query, key = draw(seed, batch, heads, queries, head_dim), draw(seed + 1, batch, heads, keys, head_dim)
        bucket_of = bucketer(SEARCHES[name], 8, key)
        for x in (query, key):
            assert torch.equal(bucket_of(x), SEARCHES[name].buckets(x, 8, key))

    def test_near_neighbours_are_found(self, name: str) -> None:
        query, key = draw_clusters(3, 1000, 64)
        truth, found = ExactSearch().top1(query, key), SEARCHES[name].top1(query, key)
        assert (truth.index_BNQ == found.index_BNQ).float().mean() > (0.75 if "lsh" in name else 0.98)
        assert (truth.cosine_BNQ - found.cosine_BNQ).mean() < 0.02

    def test_inner_products_are_close(self, name: str) -> None:
        query, key = draw_clusters(4, 500, 64)
        truth, told = query @ key.mT, SEARCHES[name].similarity(query, key)
        tolerance = 0.7 if "lsh" in name else 0.02  # most pairs are nearly orthogonal, where bits tell least
        assert (told - truth).std() < tolerance * truth.std() + 1e-6

    def test_nothing_depends_on_the_bound_of_scores(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        query, key = draw(5, 1, 2, 50, 16), draw(6, 1, 2, 333, 16)
        whole = SEARCHES[name].top1(query, key).cosine_BNQ
        monkeypatch.setattr(protocol, "MAX_SCORES", 200)
        # More pieces bring more candidates, so an approximate search may find a nearer one.
        assert bool((SEARCHES[name].top1(query, key).cosine_BNQ >= whole - 1e-6).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_back_end_that_cannot_search_on_a_gpu_is_refused_at_load(name: str) -> None:
    check_search(name, torch.device("cpu"))  # type: ignore[arg-type]
    if name == "faiss-lsh":
        with pytest.raises(KernelUnavailable, match=r"search: 'faiss-lsh' runs on the CPU only.*take 'lsh'"):
            check_search(name, torch.device("cuda"))  # type: ignore[arg-type]
    elif not name.startswith("faiss"):
        check_search(name, torch.device("cuda"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("faiss")])
def test_a_missing_package_is_one_line_that_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "faiss", None)
    monkeypatch.setattr(faiss_index, "_why_not", "No module named 'faiss'", raising=False)
    with pytest.raises(KernelUnavailable, match=rf"search: '{name}' needs the package faiss \(pip install .*No module"):
        check_search(name, torch.device("cpu"))  # type: ignore[arg-type]


@given(st.integers(1, 20), st.integers(1, 300), st.integers(0, 1000))
def test_exact_search_is_exact(num_queries: int, num_keys: int, seed: int) -> None:
    query, key = draw(seed, 1, 2, num_queries, 12).double(), draw(seed + 1, 1, 2, num_keys, 12).double()
    index, cosine = ExactSearch().top1(query, key)
    all_cosines = torch.nn.functional.cosine_similarity(query[:, :, :, None], key[:, :, None], dim=-1)
    torch.testing.assert_close(cosine, all_cosines.amax(-1), atol=1e-12, rtol=0)
    assert torch.equal(index, all_cosines.argmax(-1))


@given(sizes, st.integers(0, 10_000))
def test_what_codes_stand_for_needs_no_integers_between(size: tuple[int, ...], seed: int) -> None:
    batch, heads, queries, keys, head_dim = size
    query, key = draw(seed, batch, heads, queries, head_dim), draw(seed + 1, batch, heads, keys, head_dim)
    query[0, 0, 0] = 0
    codes = quantise(query)
    assert torch.equal(round_to_codes(query), codes.decode())
    assert int(codes.code_BNXD.abs().max()) <= 127
    assert torch.equal(SEARCHES["quant"].similarity(query, key), multiply(codes, quantise(key)))

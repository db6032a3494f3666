"""IdSet behaves as a set of names, and a million of them stay small."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.id_set import IdSet


@given(st.lists(st.text(max_size=8)), st.lists(st.text(max_size=8)))
def test_it_agrees_with_a_set(added: list[str], asked: list[str]) -> None:
    ids, model = IdSet(), set[str]()
    for name in added:
        assert ids.add(name) == (name not in model)
        model.add(name)
    assert len(ids) == len(model)
    assert all((name in ids) == (name in model) for name in added + asked)


@pytest.mark.slow
def test_a_million_ids_stay_below_25_megabytes_at_any_moment() -> None:
    tracemalloc.start()
    try:
        ids = IdSet(f"{n:020x}-0" for n in range(1_000_000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(ids) == 1_000_000
    assert peak < 25_000_000
    assert f"{999_999:020x}-0" in ids
    assert f"{1_000_000:020x}-0" not in ids


def test_an_id_costs_less_than_25_bytes() -> None:
    ids = IdSet()
    for n in range(1, 50_001):
        ids.add(f"{n:020x}-0")
        assert n < 20_000 or ids.num_bytes < 25 * n

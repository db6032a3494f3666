"""The nearest row: what is not there is never found, and of equal ones the first is."""

import torch

from workers.search.nearest_rows import nearest_rows


def test_finds_the_nearest_that_exists() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.nn.functional.normalize(torch.randn(3, n, 16, generator=generator), dim=-1) for n in (7, 11))
    there = torch.rand(3, 11, generator=generator) > 0.4
    there[1] = False
    index, cosine = nearest_rows(x, y, there)
    for s in range(3):
        for q in range(7):
            products = [float(x[s, q] @ y[s, k]) if there[s, k] else -torch.inf for k in range(11)]
            assert float(cosine[s, q]) == max(products) or abs(float(cosine[s, q]) - max(products)) < 1e-6
            assert not bool(there[s].any()) or products[int(index[s, q])] == max(products)


def test_of_equal_ones_the_first_is_found() -> None:
    y = torch.ones(1, 5, 4)
    index, _ = nearest_rows(y[:, :2], y, torch.tensor([[False, True, True, True, True]]))
    assert index.tolist() == [[1, 1]]

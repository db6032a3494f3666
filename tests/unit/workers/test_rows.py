"""Rows as words of 16 bytes: the same memory, or the tensor itself where rows do not allow it."""

import pytest
import torch

from workers.rows import as_words


@pytest.mark.parametrize(("width", "dtype"), [(144, torch.bfloat16), (28, torch.float32)])
def test_words_are_the_same_memory(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 10, width).to(dtype)
    x[0, 0, 0] = torch.nan
    expected = x.clone()
    expected[1:, 6:9] = expected[1:, 2:5]
    part = as_words(x[1:])
    assert part.dtype == torch.complex128
    part[:, 6:9] = part[:, 2:5]
    assert torch.equal(x.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("width", [6, 13])
def test_rows_that_end_between_words_stay_as_they_are(width: int) -> None:
    x = torch.randn(2, 4, width)
    assert as_words(x) is x
    x = torch.randn(2, 4, 16)
    assert as_words(x[..., 2:14]).dtype == torch.float32

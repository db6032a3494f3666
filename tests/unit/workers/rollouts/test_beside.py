"""What is done to finished chunks: every one, in order, and what goes wrong is not lost."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from workers.rollouts.beside import work_beside

CPU = torch.device("cpu")


def test_each_item_comes_with_its_result_in_order_and_its_time_is_counted() -> None:
    entered: list[str] = []

    @contextmanager
    def waits() -> Iterator[None]:
        entered.append("wait")
        yield

    pairs = list(work_beside(iter(range(5)), lambda x: x * x, CPU, waits))
    assert pairs == [(x, x * x) for x in range(5)]
    assert len(entered) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_works_on_one_item_while_it_makes_the_next_one() -> None:
    device = torch.device("cuda")
    made: list[int] = []

    def items() -> Iterator[torch.Tensor]:
        for index in range(6):
            made.append(index)
            yield torch.full((1000, 1000), float(index), device=device)

    @contextmanager
    def waits() -> Iterator[None]:
        yield

    seen = []
    for item, total in work_beside(items(), lambda x: float(x.sum()), device, waits):
        assert total == 1e6 * float(item[0, 0])
        seen.append((len(made), total))
    assert [total for _, total in seen] == [1e6 * index for index in range(6)]
    assert [num for num, _ in seen] == [2, 3, 4, 5, 6, 6]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_next_take_works_in_the_memory_of_the_one_before() -> None:
    device = torch.device("cuda")

    @contextmanager
    def waits() -> Iterator[None]:
        yield

    def take() -> None:
        for _ in work_beside(iter(range(2)), lambda _: torch.ones(1 << 26, device=device).sum().item(), device, waits):
            pass

    take()
    reserved = torch.cuda.memory_reserved()
    take()
    assert torch.cuda.memory_reserved() == reserved


def test_an_error_in_the_work_reaches_whoever_asks() -> None:
    def work(item: int) -> int:
        return 1 // (2 - item)

    @contextmanager
    def waits() -> Iterator[None]:
        yield

    pairs = work_beside(iter(range(4)), work, CPU, waits)
    assert [next(pairs)[0], next(pairs)[0]] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(pairs)

"""Finished chunks are worked on while the next one is being made: on a GPU, on a stream and a thread of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from workers.streams import stream_for

T = TypeVar("T")
R = TypeVar("R")


def work_beside(
    items: Iterator[T], work: Callable[[T], R], device: torch.device, waits: Callable[[], AbstractContextManager[None]]
) -> Iterator[tuple[T, R]]:
    """Each item with what `work` makes of it, in order. On a GPU it comes one item late; elsewhere one after the other.

    Args:
        items: Made by whoever asks for the next pair; tensors in them are not changed afterwards.
        work: Called in a thread, where a stream of its own is current; what it returns must not be under way still.
        device: Where both compute.
        waits: Entered while nothing but this work is waited for.
    """
    if device.type != "cuda":
        for item in items:
            with waits():
                result = work(item)
            yield item, result
        return
    stream = stream_for("beside the rollout", device)
    waiting: tuple[T, Future[R]] | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="beside-the-rollout") as pool:
        for item in items:
            made = torch.cuda.current_stream(device).record_event()
            begun = item, pool.submit(_work_on, stream, made, work, item)
            if waiting is not None:
                with waits():
                    result = waiting[1].result()
                yield waiting[0], result
            waiting = begun
        if waiting is not None:
            with waits():
                result = waiting[1].result()
            yield waiting[0], result


@torch.inference_mode()
def _work_on(stream: torch.cuda.Stream, made: torch.cuda.Event, work: Callable[[T], R], item: T) -> R:
    """Body of the thread. The item lives until its result was taken, so its memory is not given away meanwhile."""
    with torch.cuda.stream(stream):
        stream.wait_event(made)
        result = work(item)
        stream.synchronize()
    return result

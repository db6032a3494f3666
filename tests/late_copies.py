"""A side stream on a GPU that is late, for tests that something waits for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.cache.side_work import OnStream, Wait


class Late(OnStream):
    """Every job begins some milliseconds late: without a wait what it reads would have changed by then."""

    def run(self, job: Callable[[], None]) -> Wait:
        def late() -> None:
            torch.cuda._sleep(20_000_000)
            job()

        return super().run(late)

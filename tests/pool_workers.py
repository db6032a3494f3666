"""Workers that behave as told, for the tests of the pool: the payload says what happens."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

logger = logging.getLogger("workers.obedient")


class ObedientWorker:
    """`setup` is a folder for traces; a payload is a tuple (what, argument)."""

    def __init__(self, setup: Path) -> None:
        self.folder = setup
        self.tick = 0
        self.is_draining = False

    def load(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}

    def run(self, payload: tuple[str, Any]) -> Any:
        what, argument = payload
        self.tick += 1
        logger.info("told to %s", what)
        return getattr(self, what)(argument)

    def echo(self, value: Any) -> Any:
        return value

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def wait_for(self, name: str) -> str:
        """Until somebody makes a file of that name."""
        while not (self.folder / name).exists():
            time.sleep(0.02)
        return name

    def exit(self, code: int) -> None:
        os._exit(code)

    def fail(self, text: str) -> None:
        raise ValueError(text)

    def mimic(self, _: Any) -> None:
        from ray.exceptions import ActorDiedError

        raise ActorDiedError  # a worker that passes on what happened to somebody else

    def write_for_ever(self, name: str) -> None:
        while True:
            (self.folder / name).write_text(str(time.time()))
            time.sleep(0.05)

    def stop_process(self, _: Any) -> NoReturn:
        """Nobody in this process answers any more; this thread may run on until the signal has reached it."""
        os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            time.sleep(600)

    def was_drained(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self.is_draining and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.is_draining

    def progress(self) -> int:
        return self.tick

    def withdraw(self, name: str) -> None:
        (self.folder / name).touch()  # what `wait_for` waits for

    def drain(self) -> None:
        self.is_draining = True

    def close(self) -> None:
        (self.folder / f"closed-{os.getpid()}").write_text("")


class UnloadableWorker(ObedientWorker):
    def load(self) -> dict[str, Any]:
        raise RuntimeError("weights are missing")


class DyingWorker(ObedientWorker):
    def load(self) -> dict[str, Any]:
        os._exit(9)


class EndlessLoader(ObedientWorker):
    def load(self) -> dict[str, Any]:
        time.sleep(600)
        return {}

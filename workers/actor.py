"""RenderActor: loads a model once, renders shards of tasks, drains, closes. A plain class; the pool makes it an actor.

Loads without torch: all that needs it is imported in `load`, on the machine that renders. Two calls of `run` may be
open at once: the GPU belongs to one take at a time, while the other one is being encoded and uploaded.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

from cluster.log_lines import log_facts
from cluster.object_store import ObjectStore, open_store, retries_of
from workers.errors import Preempted, RenderError
from workers.task import ActorInfo, Progress, RenderFailure, RenderOutcome, RenderResult, RenderSetup, RenderTask

if TYPE_CHECKING:
    from workers.assemble import LoadedModel

logger = logging.getLogger(__name__)

_MAX_MESSAGE = 2048  # of RenderFailure.message
AttemptName = tuple[str, str]
"""Task id and attempt."""


class RenderActor:
    """Renders tasks with one model on one device.

    Args:
        setup: What does not change while the actor lives.
    """

    def __init__(self, setup: RenderSetup) -> None:
        self.setup = setup
        self.desk = _Desk()
        self._pipeline: ModuleType | None = None
        self._model: LoadedModel | None = None
        self._store: ObjectStore | None = None
        self._telling = threading.Lock()
        self._told_retries: Counter[str] = Counter()

    def load(self) -> ActorInfo:
        """Import torch, load weights, open the store, pay for what only a first take would pay; slow.

        Raises:
            RenderError: The configuration, weights or kernel cannot work here.
        """
        started = time.perf_counter()
        torch = importlib.import_module("torch")
        torch.set_num_threads(self.setup.num_threads)
        assemble = importlib.import_module("workers.assemble")
        self._pipeline = importlib.import_module("workers.pipeline")
        self._store = open_store(self.setup.store_url)
        self._model = model = assemble.load_model(self.setup.config)
        warming = importlib.import_module("workers.warm_up")
        if warming.needs_warm_up(model):
            warming.warm_up(model)
        on_gpu = model.device.type == "cuda"
        return ActorInfo(
            pid=os.getpid(),
            hostname=socket.gethostname(),
            device=str(model.device),
            gpu_name=torch.cuda.get_device_name(model.device) if on_gpu else "",
            gpu_id=str(getattr(torch.cuda.get_device_properties(model.device), "uuid", "")) if on_gpu else "",
            backend=model.backend,
            model_id=model.backbone.name,
            model_revision=model.revision,
            torch_version=torch.__version__,
            cuda_version=torch.version.cuda or "",
            load_s=time.perf_counter() - started,
        )

    def run(self, tasks: Sequence[RenderTask]) -> list[RenderOutcome]:
        """Render a shard, task by task; a task's own failure is a value, never an exception.

        After an error that leaves the process unfit (`fresh_process`), and after `drain`, tasks that have not begun
        fail as preempted: they are to be tried elsewhere.
        """
        self.desk.take_in(tasks)
        outcomes = []
        for task in tasks:
            with log_facts(item=task.item_id, task=task.task_id, shard=task.shard, attempt=task.attempt):
                outcomes.append(self._render(task))
            self.desk.put_away(task)
        return outcomes

    def progress(self) -> Progress:
        """Where the actor is now; answered at once, from any thread."""
        rss_bytes = 0 if self._pipeline is None else int(self._pipeline.rss_bytes())
        return self.desk.progress(rss_bytes)

    def withdraw(self, attempts: Sequence[AttemptName]) -> None:
        """Give these back if they have not begun: they fail as preempted, at once. Others can make them sooner."""
        self.desk.withdraw(attempts)

    def drain(self) -> None:
        """Finish the chunk in hand and the videos that are already generated; take nothing new."""
        self.desk.stop("this actor was told to end")

    def close(self) -> None:
        """Let go of the model, after the take that holds the GPU has reached the end of its chunk."""
        self.drain()
        self.desk.wait_until_free()
        self._model = self._store = None

    def _render(self, task: RenderTask) -> RenderOutcome:
        """One task to its end, whatever that is."""
        assert self._pipeline is not None, "load() comes first"
        started_at = self._pipeline.utc_now()
        turn = _Turn(self.desk, task)
        try:
            outcome: RenderResult = self._pipeline.render_take(task, self._model, self._store, turn, turn.on_chunk)
        except Exception as error:  # the outermost call: whatever happened becomes a row
            meaning: RenderError = self._pipeline.as_render_error(error)
            if meaning.fresh_process:
                self.desk.stop(f"this process is unfit after an error in {task.task_id}")
            if not isinstance(meaning, Preempted):
                logger.exception("take failed", extra={"kind": meaning.kind})
            return RenderFailure(
                task_id=task.task_id,
                attempt=task.attempt,
                kind=meaning.kind,
                message=str(meaning)[:_MAX_MESSAGE],
                retryable=meaning.retryable,
                fresh_process=meaning.fresh_process,
                gpu_s=turn.held_s,
                started_at=started_at,
                finished_at=self._pipeline.utc_now(),
            )
        logger.info("video finished", extra={"frames": outcome.num_frames, "wall_s": outcome.wall_s})
        return outcome.model_copy(update={"store_retries": self._new_retries()})

    def _new_retries(self) -> dict[str, int]:
        """Since the last take that told of them; two takes may be uploading at once."""
        assert self._store is not None
        with self._telling:
            now = retries_of(self._store)
            new, self._told_retries = now - self._told_retries, now
        return dict(new)


class _Desk:
    """What lies on the actor's desk: the GPU, tasks in hand, counters. Shared by the threads of `run`, `progress`."""

    def __init__(self) -> None:
        self._guard = threading.Condition()
        self._stop_reason: str | None = None
        self._withdrawn: set[AttemptName] = set()
        self._waiting: list[_Turn] = []
        self._holder: _Turn | None = None
        self._tasks: list[RenderTask] = []
        self._turn: _Turn | None = None
        self._ticks = 0
        self._busy_s = self._upload_wait_s = 0.0

    def take_in(self, tasks: Sequence[RenderTask]) -> None:
        with self._guard:
            self._tasks.extend(tasks)

    def put_away(self, task: RenderTask) -> None:
        with self._guard:
            self._tasks = [t for t in self._tasks if t is not task]
            self._withdrawn.discard((task.task_id, task.attempt))

    def stop(self, reason: str) -> None:
        """Nothing new is begun from now on; the first reason stands."""
        with self._guard:
            self._stop_reason = self._stop_reason or reason
            self._guard.notify_all()

    def withdraw(self, attempts: Sequence[AttemptName]) -> None:
        with self._guard:
            in_hand = {(task.task_id, task.attempt) for task in self._tasks}
            self._withdrawn |= in_hand.intersection(attempts)
            self._guard.notify_all()

    def refuse(self, task: RenderTask, *, has_begun: bool) -> None:
        """Raises Preempted if the take must not begin, or not go on."""
        if self._stop_reason is not None:
            raise Preempted(self._stop_reason)
        if not has_begun and (task.task_id, task.attempt) in self._withdrawn:
            raise Preempted("taken back before it had begun")

    def begin(self, turn: _Turn) -> None:
        """Wait for the GPU, in order of arrival; raises Preempted as soon as the take shall not begin."""
        with self._guard:
            self._waiting.append(turn)
            try:
                while True:
                    self.refuse(turn.task, has_begun=False)
                    if self._holder is None and self._waiting[0] is turn:
                        self._holder = self._turn = turn
                        return
                    self._guard.wait()
            finally:
                self._waiting.remove(turn)
                self._guard.notify_all()

    def wait_until_free(self) -> None:
        """Until nobody holds the GPU."""
        with self._guard:
            self._guard.wait_for(lambda: self._holder is None)

    def tick(self) -> None:
        with self._guard:
            self._ticks += 1

    def end(self, turn: _Turn) -> None:
        with self._guard:
            self._holder = self._turn = None
            self._busy_s += turn.held_s
            self._upload_wait_s += turn.upload_wait_s
            self._guard.notify_all()

    def progress(self, rss_bytes: int) -> Progress:
        with self._guard:
            turn = self._turn
            waiting = [t.task_id for t in self._tasks if turn is None or t is not turn.task]
            return Progress(
                task_ids=tuple(waiting if turn is None else [turn.task.task_id, *waiting]),
                running_task_id=None if turn is None else turn.task.task_id,
                attempt=None if turn is None else turn.task.attempt,
                frames_done=0 if turn is None else turn.frames_done,
                num_frames=0 if turn is None else turn.task.num_frames,
                ticks=self._ticks,
                busy_s=self._busy_s + (0.0 if turn is None else turn.held_s),
                upload_wait_s=self._upload_wait_s + (0.0 if turn is None else turn.upload_wait_s),
                rss_bytes=rss_bytes,
            )


class _Turn:
    """One take's time with the GPU: waits for it, counts the seconds for which it is held, hears of every chunk."""

    def __init__(self, desk: _Desk, task: RenderTask) -> None:
        self.task = task
        self.frames_done = 0
        self.upload_wait_s = 0.0
        self._desk = desk
        self._entered: float | None = None
        self._held_s = 0.0

    @property
    def held_s(self) -> float:
        """Seconds held so far; final once left."""
        entered = self._entered
        return self._held_s if entered is None else time.perf_counter() - entered

    def on_chunk(self, frames_done: int, upload_wait_s: float) -> None:
        """A chunk is finished; ends the take if the actor must stop and more would have to be generated."""
        self.frames_done, self.upload_wait_s = frames_done, upload_wait_s
        self._desk.tick()
        if frames_done < self.task.num_frames:
            self._desk.refuse(self.task, has_begun=True)

    def __enter__(self) -> None:
        self._desk.begin(self)
        self._entered = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held_s, self._entered = self.held_s, None
        self._desk.end(self)
        # Says when whose GPU was busy: the line is written as it is given away, held_s after it was taken.
        logger.info("take left the GPU", extra={"held_s": round(self._held_s, 6)})

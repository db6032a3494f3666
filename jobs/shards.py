"""Rows x samples -> tasks, and the names of their objects: pure, the same ids from the same input on every machine.

A `PlannedTask` is all that is known of a video before anybody tries to make it; an attempt makes it a `RenderTask`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from jobs.prompt_row import Prompt, Rejected, Scalar
from workers.task import PromptSegment, RenderTask


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """One item with one sample index, and the row it came from."""

    task_id: str
    item_id: str
    sample_index: int
    segments: tuple[PromptSegment, ...]
    negative_prompt: str
    seed: int
    num_frames: int
    input_row: int
    prompt: str
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    control: str | None = None

    @property
    def prompt_sha256(self) -> str:
        """Hash of the prompt column, so that equal prompts can be joined without carrying the text."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()

    def attempt(self, name: str, *, shard: int = 0, ladder_rung: int = 0, full_precision: bool = False) -> RenderTask:
        """This task in one attempt; `name` is `e<epoch>a<number>`."""
        return RenderTask(
            task_id=self.task_id,
            item_id=self.item_id,
            sample_index=self.sample_index,
            attempt=name,
            segments=self.segments,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            num_frames=self.num_frames,
            control=self.control,
            shard=shard,
            ladder_rung=ladder_rung,
            full_precision=full_precision,
        )


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """What a row that does not say otherwise gets."""

    seed: int
    samples: int
    num_frames: int


def task_id_at(item_id: str, sample_index: int) -> str:
    """Id of a task. Ids hold no dots or slashes, and the last dash divides: no two pairs give the same."""
    return f"{item_id}-{sample_index}"


def task_seed(job_seed: int, item_id: str, sample_index: int) -> int:
    """First 63 bits of SHA-256 over (job seed, item, sample): depends on identity alone, never on place or order."""
    text = f"longtake-seed\0{job_seed}\0{item_id}\0{sample_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def tasks_of(prompt: Prompt, defaults: TaskDefaults) -> Iterator[PlannedTask]:
    """The tasks of one row, in order of sample index.

    A row's own seed is used as it stands by sample 0 and replaces the job's seed for the others, so that asking for
    more samples later changes none of the earlier ones.
    """
    text = prompt.text
    for index in range(prompt.samples or defaults.samples):
        if prompt.seed is None:
            seed = task_seed(defaults.seed, prompt.item_id, index)
        else:
            seed = prompt.seed if index == 0 else task_seed(prompt.seed, prompt.item_id, index)
        yield PlannedTask(
            task_id=task_id_at(prompt.item_id, index),
            item_id=prompt.item_id,
            sample_index=index,
            segments=prompt.segments,
            negative_prompt=prompt.negative_prompt,
            seed=seed,
            num_frames=prompt.num_frames or defaults.num_frames,
            input_row=prompt.line,
            prompt=text,
            extra=prompt.extra,
            control=prompt.control,
        )


def plan_tasks(rows: Iterable[Prompt | Rejected], defaults: TaskDefaults) -> Iterator[PlannedTask | Rejected]:
    """All tasks of a list, lazily; rejected rows pass through at their place."""
    for row in rows:
        if isinstance(row, Rejected):
            yield row
        else:
            yield from tasks_of(row, defaults)


def video_key(task_id: str, render_fingerprint: str, attempt: str) -> str:
    """Object key of a finished video: unique to the attempt for ever; two hex digits spread the prefix."""
    spread = hashlib.sha256(task_id.encode()).hexdigest()[:2]
    return f"videos/{spread}/{task_id}-{render_fingerprint[:8]}-{attempt}.mp4"


def segment_prefix(task_id: str, attempt: str) -> str:
    """Where the closed-GOP segments of an attempt lie until the video is complete; ends with a slash."""
    return f"_state/segments/{task_id}-{attempt}/"

"""What may repeat, how often, how long and how much at once, for one driver. None of it changes pixels."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Limits of a running job; names shared with the spec's parts `limits` and `actors` mean the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_actors: int = Field(1, ge=1, description="Actors wanted.")
    in_flight: int = Field(2, ge=1, le=8, description="Calls in hand per actor: one renders, the next one waits.")
    lookahead: int = Field(4096, ge=1, description="Tasks read ahead of the actors; longest first holds within these.")
    shard_target_s: float = Field(2.0, gt=0, description="Predicted work of one call; a longer task goes alone.")
    shard_tasks: int = Field(64, ge=1, description="Most tasks of one call.")
    max_uncommitted: int = Field(2000, ge=1, description="Nothing new is given out while so many rows wait to commit.")

    attempts: int = Field(3, ge=1, description="Tries of a task that fails by its own fault.")
    preemptions: int = Field(50, ge=0, description="Tries lost to vanishing machines; counted apart from attempts.")
    kills: int = Field(2, ge=1, description="Actors lost with a task before it runs alone; then one more ends it.")
    ladder_rungs: int = Field(3, ge=0, description="Steps down after out-of-memory before a task is given up.")
    backoff_s: float = Field(2.0, ge=0, description="Wait before the second try; doubles with each further one.")
    max_backoff_s: float = Field(120.0, ge=0, description="Longest wait between two tries.")

    chunk_timeout_s: float = Field(600.0, gt=0, description="A chunk without a heartbeat for so long is a hang.")
    task_timeout_s: float = Field(86_400.0, gt=0, description="Longest life of one attempt.")
    load_timeout_s: float = Field(1_800.0, gt=0, description="Longest time an actor may take to load.")
    load_failures: int = Field(3, ge=1, description="Actors in a row that may fail to come up before the job stops.")
    node_failures: int = Field(3, ge=1, description="Different items failed in a row at one node: it is avoided.")
    first_failures: int = Field(8, ge=2, description="Stop when the first so many items fail in the same way.")
    same_failures: int = Field(20, ge=2, description="Stop when so many items in a row fail in the same way.")
    max_failures: int | None = Field(None, ge=1, description="Stop when so many items have failed; empty: never.")

    max_rows_per_entry: int = Field(500, ge=1, description="Rows that one journal entry may commit.")
    flush_interval_s: float = Field(600.0, gt=0, description="How often committed rows become a manifest part.")
    part_rows: int = Field(10_000, ge=1, description="Rows after which a manifest part is written at once.")
    store_patience_s: float = Field(600.0, ge=0, description="How long the store may be away before the job stops.")
    lease_ttl_s: float = Field(60.0, ge=1.0, description="Silence after which another driver may take the job over.")
    stop_grace_s: float = Field(30.0, ge=0, description="Time for takes in hand to finish after a stop request.")

"""JobSpec: everything a job was asked to do, as one frozen record with two fingerprints.

The render fingerprint covers the look, the job fingerprint the rest. Reading text from outside (YAML, flags,
`--set`) is in `spec_text.py`; the flags themselves are made from the fields below in `flags.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jobs.prompt_row import RowLimits
from jobs.prompts import PromptSource
from jobs.shards import TaskDefaults
from workers.config import RenderConfig

RENDER_CODE_MAJOR = 1
"""Grows when a change of the code changes the pixels of an unchanged spec; a job keeps to one."""

SPLIT_WORDS = frozenset(
    {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
)


class SpecPart(BaseModel):
    """Base of the spec's parts: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PromptsPart(SpecPart):
    """The prompt list."""

    url: str = Field(min_length=1, description="Prompt list: a local path or s3://bucket/key.")
    format: Literal["auto", "txt", "jsonl", "csv", "parquet"] = Field(
        "auto", description="Format; auto asks the suffix."
    )
    max_prompt_chars: int = Field(20_000, ge=1, le=1_000_000, description="A longer prompt is quarantined.")
    max_frames: int = Field(1_000_000, ge=1, description="A row that asks for more video frames is quarantined.")
    max_samples: int = Field(10_000, ge=1, description="A row that asks for more samples is quarantined.")


class LimitsPart(SpecPart):
    """What may repeat, how often and how long; none of it changes pixels."""

    attempts: int = Field(3, ge=1, le=100, description="Tries of a task that fails by its own fault.")
    preemptions: int = Field(50, ge=0, description="Tries lost to vanishing machines; counted apart from attempts.")
    kills: int = Field(2, ge=1, description="Actors that a task may take down before it is isolated and given up.")
    chunk_timeout_s: float = Field(600.0, gt=0, description="A chunk without a heartbeat for so long is a hang.")
    task_timeout_s: float = Field(86_400.0, gt=0, description="Longest life of one attempt.")
    load_timeout_s: float = Field(1_800.0, gt=0, description="Longest time an actor may take to load.")
    max_failures: int | None = Field(
        None, ge=1, description="Stop the job when so many items have failed; empty: never."
    )
    same_failures: int = Field(20, ge=2, description="Stop when so many items in a row fail in the same way.")
    flush_interval_s: float = Field(600.0, gt=0, description="How often committed rows become a manifest part.")
    part_rows: int = Field(10_000, ge=1, description="Rows after which a manifest part is written at once.")
    lease_ttl_s: float = Field(60.0, ge=1.0, description="Silence after which another driver may take the job over.")
    stop_grace_s: float = Field(30.0, ge=0, description="Time for takes in hand to finish after a stop request.")


class ActorsPart(SpecPart):
    """How many renderers and what each of them reserves."""

    count: int | Literal["auto"] = Field("auto", description="Actors; auto takes what the cluster has.")
    gpus_per_actor: float | None = Field(None, ge=0, description="GPUs of an actor; empty: 1 if there are any, else 0.")
    cpus_per_actor: float = Field(1.0, gt=0, description="CPU cores that an actor reserves.")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of torch in an actor.")
    in_flight: int = Field(2, ge=1, le=8, description="Takes in hand per actor: one renders, the next one waits.")

    @field_validator("count")
    @classmethod
    def _positive(cls, count: int | str) -> int | str:
        if isinstance(count, int) and count < 1:
            raise ValueError("must be at least 1, or auto")
        return count


class ClusterPart(SpecPart):
    """Where Ray is."""

    address: str | None = Field(None, description="Ray address; empty: RAY_ADDRESS, else a local Ray is started.")


class PricingPart(SpecPart):
    """What the hardware costs."""

    usd_per_gpu_hour: float | None = Field(None, ge=0, description="Price of a GPU hour; empty: costs are not known.")


class JobSpec(SpecPart):
    """One job: a prompt list in, finished videos and a manifest out."""

    schema_version: Literal[1] = Field(1, description="Version of this form.")
    job_id: str = Field("", description="Name of the job's folder below `out`; empty: made from the input's name.")
    prompts: PromptsPart
    out: str = Field(min_length=1, description="Where the job's folder goes: a local path or s3://bucket/prefix.")
    samples: int = Field(1, ge=1, le=10_000, description="Videos per prompt unless the row says otherwise.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the job; every video's own seed follows from it.")
    render: RenderConfig = Field(RenderConfig(), description="Everything that decides the pixels.")
    limits: LimitsPart = Field(LimitsPart(), description="Retries, time limits and intervals.")
    actors: ActorsPart = Field(ActorsPart(), description="Renderers.")
    cluster: ClusterPart = Field(ClusterPart(), description="Ray cluster.")
    pricing: PricingPart = Field(PricingPart(), description="Prices.")
    exit_zero_on_item_failures: bool = Field(False, description="Exit 0 instead of 3 when some items failed for good.")
    allowed_failures: int = Field(0, ge=0, description="So many failed or rejected items still count as success.")

    @field_validator("job_id")
    @classmethod
    def _slug(cls, job_id: str) -> str:
        if job_id and (not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,62}", job_id) or job_id.endswith("-")):
            raise ValueError("must be 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or digit")
        return job_id

    @model_validator(mode="after")
    def _name_the_job(self) -> JobSpec:
        if not self.job_id:
            object.__setattr__(self, "job_id", default_job_id(self.prompts.url, _sha256(self.pixel_fields())))
        return self

    @property
    def render_fingerprint(self) -> str:
        """SHA-256 (hex) over all that decides the pixels of a take, given its prompt, seed and length.

        The job's seed is not in it: every row names its own seed, so that takes of two jobs can be compared.
        """
        return self.render.fingerprint

    @property
    def job_fingerprint(self) -> str:
        """SHA-256 (hex) over the rest; may differ between two runs of one job."""
        rest = self.model_dump(mode="json", exclude={"render", "seed"})
        return _sha256(rest)

    def pixel_fields(self) -> dict[str, Any]:
        """What may not change within a job: the look, and the seed that every video's own follows from."""
        return {"render": self.render.model_dump(mode="json"), "seed": self.seed, "code_major": RENDER_CODE_MAJOR}

    @property
    def source(self) -> PromptSource:
        """The prompt list as its reader wants it."""
        part = self.prompts
        limits = RowLimits(part.max_prompt_chars, part.max_frames, part.max_samples)
        return PromptSource(part.url, part.format, limits)

    @property
    def task_defaults(self) -> TaskDefaults:
        """What a row gets that does not say otherwise."""
        return TaskDefaults(seed=self.seed, samples=self.samples, num_frames=self.render.video.num_frames)

    @property
    def job_url(self) -> str:
        """Root of everything this job writes."""
        return f"{self.out.rstrip('/')}/{self.job_id}"

    def with_absolute_paths(self) -> JobSpec:
        """The same job, named so that it is found from any working directory."""
        prompts = self.prompts.model_copy(update={"url": _absolute(self.prompts.url)})
        return self.model_copy(update={"prompts": prompts, "out": _absolute(self.out)})

    def warnings(self) -> list[str]:
        """What works but will surprise somebody."""
        return [
            f"job id {self.job_id!r} holds {word!r}: readers that guess splits from paths may take it for one"
            for word in self.job_id.split("-")
            if word in SPLIT_WORDS
        ]


def default_job_id(prompts_url: str, pixels: str) -> str:
    """The input's name and a hash of what changes pixels: the same command again finds its own job."""
    stem = PurePosixPath(prompts_url.replace("\\", "/")).stem
    slug = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-") or "job"
    return f"{slug}-{pixels[:8]}"


def changed_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two records, one readable line per leaf: `render.video.fps: 16 -> 24`."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    missing = object()
    lines = []
    for path in sorted(before.keys() | after.keys()):
        a, b = before.get(path, missing), after.get(path, missing)
        if a != b:
            lines.append(f"{path}: {_shown(a, missing)} -> {_shown(b, missing)}")
    return lines


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).expanduser().absolute())


def _leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(path, value)]
    return [leaf for name, part in value.items() for leaf in _leaves(part, f"{path}.{name}" if path else name)]


def _shown(value: Any, missing: object) -> str:
    return "(absent)" if value is missing else json.dumps(value, ensure_ascii=False)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

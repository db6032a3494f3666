"""What can be known to fail before an actor starts: the model, the store, an older job in the way, the list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster.errors import AccessDenied, NotFound, StoreUnsuitable
from cluster.object_store import ObjectStore, open_store, probe_conditional_writes
from jobs.commit import read_json
from jobs.errors import SpecError
from jobs.job_record import JOB_KEY, check_same_pixels
from jobs.plan import JobPlan, check_model, make_plan
from jobs.prompts import PromptScan, scan_prompts
from jobs.replay import Replay
from jobs.spec import JobSpec
from jobs.weights import identify_weights

T = TypeVar("T")


@dataclass(frozen=True)
class Preflight:
    """What was found on the way."""

    store: ObjectStore
    scan: PromptScan
    replay: Replay
    weights: dict[str, str]
    """What names each weight file (`identify_weights`); empty for a model without files."""


def check_before_start(spec: JobSpec, *, is_ray_job: bool) -> Preflight:
    """Refuse what cannot work, cheapest first; the store is written to only when all else is well.

    Args:
        spec: The job.
        is_ray_job: Does this driver run under `ray job submit`, in a copied folder that will be thrown away?
    Raises:
        SpecError, PromptsError, SpecChanged: Names the field and the fix.
        StoreUnavailable: The store does not answer; try again.
    """
    if is_ray_job:
        _refuse_relative("out", spec.out)
        _refuse_relative("prompts.url", spec.prompts.url)
    bundled = check_model(spec)
    weights = _usable("render.backbone.checkpoint", lambda: identify_weights(spec.render.backbone, bundled))
    store = _usable("out", lambda: open_store(spec.job_url))
    record = _usable("out", lambda: read_json(store, JOB_KEY))
    if record is not None:
        check_same_pixels(record, spec, weights, store.url)
    replay = Replay(store, spec.job_id)
    scan = scan_prompts(spec.source, spec.task_defaults, is_settled=replay.ledger.is_settled)
    _usable("out", lambda: probe_conditional_writes(store))
    return Preflight(store, scan, replay, weights)


def plan_job(spec: JobSpec, *, gpu_s_per_frame: float | None = None, like: str | None = None) -> JobPlan:
    """Everything that `render` would refuse is refused, the rest is sized; nothing is started, nothing stays written.

    Raises:
        As `check_before_start`.
    """
    found = check_before_start(spec, is_ray_job=False)
    return make_plan(spec, found.scan, gpu_s_per_frame=gpu_s_per_frame, like=like)


def _refuse_relative(field: str, url: str) -> None:
    if "://" not in url and not Path(url).expanduser().is_absolute():
        raise SpecError(
            f"{field}: {url!r} is relative: under a Ray job it would be in the copy of the working directory that Ray "
            "throws away. Give s3://bucket/key, or an absolute path that all nodes share"
        )


def _usable(field: str, act: Callable[[], T]) -> T:
    """What a store refuses for good becomes the user's field; what may pass stays a store error."""
    try:
        return act()
    except ValueError as error:
        raise SpecError(f"{field}: {error}") from error
    except NotFound as error:
        raise SpecError(f"{field}: no such bucket or folder, and it cannot be made ({error})") from error
    except (AccessDenied, StoreUnsuitable) as error:
        raise SpecError(f"{field}: {error}; check the address and the credentials") from error

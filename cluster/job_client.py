"""Submit to, ask and stop a cluster through Ray's job API (the HTTP address of the head's dashboard, port 8265).

What Ray says of a job is not what became of its videos (a stopped job even exits with 0): for that, read the job's
`_SUCCESS` or `_result.json` in the store.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from tenacity import (
    Retrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_fixed,
)

from cluster.errors import ClusterUnreachable, NotFound
from cluster.start import AUTH_HINT

T = TypeVar("T")

AGENT_TIMEOUT_S = 90.0
"""A head that has just come up answers 500 "No available agent" until its agent has."""

ANSWER_TIMEOUT_S = 60.0
"""Ray itself waits for ever where a head takes a question and never answers it, as one that has just come up may."""

ClusterJobStatus = Literal["pending", "running", "stopped", "succeeded", "failed"]


@dataclass(frozen=True)
class Submission:
    """What to run on the head. `working_folder` is sent along (without what .gitignore names), None sends nothing."""

    entrypoint: str
    working_folder: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    submission_id: str | None = None


@dataclass(frozen=True)
class ClusterJob:
    """A job as Ray's own book-keeping has it."""

    submission_id: str
    status: ClusterJobStatus
    message: str

    @property
    def is_over(self) -> bool:
        return self.status in ("stopped", "succeeded", "failed")


class _Asking(JobSubmissionClient):
    """Ray's client, which asks once more where no answer comes; what changes something is sent once, as before."""

    def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
        if method != "GET":
            return super()._do_request(method, endpoint, **more)
        asking = Retrying(stop=stop_after_attempt(2), retry=retry_if_exception_type(OSError), reraise=True)
        return asking(super()._do_request, method, endpoint, **{"timeout": ANSWER_TIMEOUT_S, **more})


class JobClient:
    """Raises ClusterUnreachable (every method) when nobody answers at the address, or not to our token."""

    def __init__(self, address: str | None = None) -> None:
        """`address`: http://HOST:8265; None takes RAY_ADDRESS or the local default, as `ray job` does."""
        self._client = _translated(lambda: _Asking(address))

    def submit(self, submission: Submission) -> str:
        """Start the job; returns its submission id. Trying again cannot start it twice: the id is chosen first."""
        submission_id = submission.submission_id or f"longtake-{secrets.token_hex(6)}"
        runtime_env: dict[str, Any] = {}
        if submission.working_folder is not None:
            runtime_env["working_dir"] = submission.working_folder
        if submission.env:
            runtime_env["env_vars"] = dict(submission.env)

        def send() -> str:
            return self._client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=submission_id,
                runtime_env=runtime_env,
                metadata=dict(submission.metadata),
            )

        retrying = Retrying(
            stop=stop_after_delay(AGENT_TIMEOUT_S),
            wait=wait_fixed(1.0),
            retry=retry_if_exception(_is_too_early),
            reraise=True,
        )
        return _translated(lambda: retrying(send))

    def status(self, submission_id: str) -> ClusterJob:
        """Raises NotFound: the cluster knows no such job (it forgets them when its head is replaced)."""
        info = _translated(lambda: self._client.get_job_info(submission_id))
        status = cast(ClusterJobStatus, str(info.status.value).lower())
        return ClusterJob(submission_id, status, info.message or "")

    def stop(self, submission_id: str) -> bool:
        """Ask it to stop (SIGTERM, then SIGKILL after Ray's grace); False when it was over already."""
        return _translated(lambda: self._client.stop_job(submission_id))

    def logs(self, submission_id: str) -> str:
        """Everything the driver has printed so far."""
        return _translated(lambda: self._client.get_job_logs(submission_id))


def _is_too_early(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "No available agent" in str(error)


def _translated(call: Callable[[], T]) -> T:
    """The one map from the job API's errors to ours."""
    try:
        return call()
    except AuthenticationError as error:
        raise ClusterUnreachable(f"the cluster's job API refuses our token. {AUTH_HINT}") from error
    except OSError as error:  # what the requests package raises is one, too
        raise ClusterUnreachable(
            f"no job API there ({error}); give the dashboard's address, http://HOST:8265"
        ) from error
    except RuntimeError as error:
        if "status code 404" in str(error):
            raise NotFound(str(error)) from error
        raise ClusterUnreachable(f"the job API failed: {error}") from error

"""`job.json`: what a job was begun with, written once; and the check that a later run asks for the same pixels."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cluster.errors import OutcomeUnknown
from cluster.object_store import ObjectStore
from jobs.commit import read_json
from jobs.errors import SpecChanged, SpecError
from jobs.prompts import PromptScan
from jobs.spec import JobSpec, changed_fields

JOB_KEY = "job.json"
RUN_KEY = "_state/run.json"
"""What the latest run was asked to do; the job may have got more prompts since it was begun."""


def code_version() -> str:
    """Version of the installed package."""
    try:
        return version("longtake")
    except PackageNotFoundError:  # run from a copied folder, as Ray's working_dir does
        return "source"


def begin_record(store: ObjectStore, spec: JobSpec, scan: PromptScan, weights: Mapping[str, str]) -> dict[str, Any]:
    """The record of the job: ours if it is new, else the one that is there.

    Args:
        weights: SHA-256 of each weight file that will render.
    Raises:
        SpecChanged: It was begun with a spec that gives other pixels.
    """
    record = read_json(store, JOB_KEY)
    if record is None:
        record = _new_record(spec, scan, weights)
        data = (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
        if not _put_once(store, data):
            record = read_json(store, JOB_KEY)
            assert record is not None
    check_same_pixels(record, spec, weights, store.url)
    return record


def note_run(store: ObjectStore, spec: JobSpec, scan: PromptScan, resume_command: str) -> None:
    """Leave behind, before any work, what `status` needs: how much there is to do and how to go on."""
    body = {**_input(spec, scan), "resume_command": resume_command, "at": datetime.now(UTC).isoformat()}
    store.put(RUN_KEY, json.dumps(body, ensure_ascii=False).encode())


def check_same_pixels(record: dict[str, Any], spec: JobSpec, weights: Mapping[str, str], url: str) -> None:
    """Refuse to mix videos of two looks in one manifest.

    Raises:
        SpecChanged: Names every field that differs.
    """
    changes = changed_fields(record["pixels"], _pixels(spec, weights))
    if changes:
        lines = "\n".join(f"  {line}" for line in changes)
        raise SpecChanged(
            f"{url}: this job was begun with another look; what changes pixels cannot change within a job:\n{lines}\n"
            "Go back to the old values, or give the new look its own --job-id"
        )


def read_spec(store: ObjectStore) -> JobSpec:
    """The spec that a job was begun with.

    Raises:
        SpecError: There is no job here.
    """
    record = read_json(store, JOB_KEY)
    if record is None:
        raise SpecError(f"{store.url}: no {JOB_KEY} here; name the job's own folder, <out>/<job_id>")
    return JobSpec.model_validate_json(json.dumps(record["spec"]))


def _pixels(spec: JobSpec, weights: Mapping[str, str]) -> dict[str, Any]:
    return {**spec.pixel_fields(), "weights": dict(weights)}


def _new_record(spec: JobSpec, scan: PromptScan, weights: Mapping[str, str]) -> dict[str, Any]:
    return {
        "job_id": spec.job_id,
        "created_at": datetime.now(UTC).isoformat(),
        "nonce": secrets.token_hex(8),
        "code_version": code_version(),
        "render_fingerprint": spec.render_fingerprint,
        "job_fingerprint": spec.job_fingerprint,
        "input": _input(spec, scan),
        "pixels": _pixels(spec, weights),
        "spec": spec.model_dump(mode="json"),
    }


def _input(spec: JobSpec, scan: PromptScan) -> dict[str, Any]:
    return {
        "url": spec.prompts.url,
        "sha256": scan.sha256,
        "rows": scan.num_rows,
        "items": scan.num_items,
        "tasks": scan.num_tasks,
        "frames": scan.num_frames,
        "rejected": scan.num_rejected,
        "columns": dict(scan.columns),
    }


def _put_once(store: ObjectStore, data: bytes) -> bool:
    for _ in range(3):
        try:
            return store.put_if_absent(JOB_KEY, data)
        except OutcomeUnknown:  # the bytes carry a nonce: asking again finds our own
            continue
    return store.put_if_absent(JOB_KEY, data)

"""Images are pinned and complete; bucket rules protect what a reader relies on and expire only what nobody names."""

import fnmatch
import json
import re
import shlex
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.object_store import probe_conditional_writes
from jobs.driver import Driver, JobInputs, Limits
from tests.fake_pool import FakePool, World
from tests.fakes import ManualClock, MemoryStore
from tests.render_rows import FACTS, planned

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
RAY_JOB = yaml.safe_load((INFRA / "kuberay/rayjob.yaml").read_text())
DOCKERFILES = sorted((INFRA / "docker").glob("Dockerfile.???"))


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_pinned_staged_and_without_root(path):
    lines = instructions(path)
    bases = dict(value.split("=", 1) for kind, value in lines if kind == "ARG" and "IMAGE" in value)
    stages = [value.split()[0] for kind, value in lines if kind == "FROM"]
    assert len(stages) == 2
    for stage in stages:
        base = bases[stage.strip("${}")]
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", base), "a tag with a version"
        assert "latest" not in base
    final = lines[max(index for index, (kind, _) in enumerate(lines) if kind == "FROM") :]
    users = [value for kind, value in final if kind == "USER"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", users[-1]), "a number, so that runAsNonRoot can be checked"
    pod = RAY_JOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert int(users[-1].split(":")[0]) == pod["securityContext"]["runAsUser"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_is_built_from_all_that_the_wheel_needs(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel) == {"only-include"}, "another option may let in more: this test must know of it"
    needed = {*wheel["only-include"], project["project"]["readme"], "pyproject.toml"}
    homes = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert {*homes, *(path.name for path in ROOT.glob("*.py"))} == set(wheel["only-include"])
    copied = set()
    for kind, value in instructions(path):
        if kind == "COPY" and not value.startswith("--from"):
            copied.update(word.rstrip("/") for word in value.split()[:-1])
    assert needed <= copied
    assert all((ROOT / name).exists() for name in copied)
    let_in = {line[1:] for line in path.with_name(f"{path.name}.dockerignore").read_text().split() if line[0] == "!"}
    assert let_in == copied


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_image_has_what_kuberay_and_the_hooks_call_and_an_entry_point_that_exists(path):
    text = path.read_text()
    assert {"bash", "procps", "tini", "wget"} <= set(text.split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (entry,) = [json.loads(value) for kind, value in instructions(path) if kind == "ENTRYPOINT"]
    assert entry[-1] in project["project"]["scripts"]


def policy(name: str) -> Any:
    return json.loads((INFRA / "s3" / name).read_text())


def allowed(action: str, key: str) -> bool:
    resource = f"arn:aws:s3:::amzn-s3-demo-bucket/{key}"
    for statement in policy("iam-policy.json")["Statement"]:
        actions, resources = statement["Action"], statement["Resource"]
        actions = [actions] if isinstance(actions, str) else actions
        resources = [resources] if isinstance(resources, str) else resources
        if action in actions and any(fnmatch.fnmatchcase(resource, pattern) for pattern in resources):
            return True
    return False


def test_workers_may_do_what_they_must_and_can_never_remove_what_a_reader_relies_on():
    job = "renders/night"
    for key in ("_state/journal/0000000001.json", "manifest/part-00000.parquet", "videos/ab/x.mp4", "_SUCCESS"):
        assert allowed("s3:PutObject", f"{job}/{key}")
        assert allowed("s3:GetObject", f"{job}/{key}")
    assert allowed("s3:DeleteObject", f"{job}/_state/segments/x/00000.mp4")
    assert allowed("s3:DeleteObject", f"{job}/videos/ab/litter.mp4")
    for key in ("manifest/part-00000.parquet", "job.json", "_result.json", "quarantine/part-00000.parquet"):
        assert not allowed("s3:DeleteObject", f"{job}/{key}")
    assert not allowed("s3:PutObject", "prompts/night.jsonl")
    text = (INFRA / "s3/iam-policy.json").read_text()
    assert "s3:*" not in text
    assert '"*"' not in text


class GuardedStore(MemoryStore):
    """A bucket under the policy: whatever is asked of it must be allowed."""

    def put(self, key: str, data: bytes) -> None:
        assert allowed("s3:PutObject", f"renders/night/{key}"), key
        super().put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        assert allowed("s3:PutObject", f"renders/night/{key}"), key
        return super().put_if_absent(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        assert all(allowed("s3:DeleteObject", f"renders/night/{key}") for key in keys), keys
        super().delete(keys)


def test_driver_needs_no_more_than_the_policy_allows():
    store, clock = GuardedStore(), ManualClock()
    probe_conditional_writes(store)
    for names in ("a", "ab"):
        inputs = JobInputs(FACTS, [planned(name) for name in names])
        pool = FakePool(clock, World())
        limits = Limits(num_actors=1, lease_ttl_s=1.0)
        outcome = Driver(inputs, store, lambda pool=pool: pool, limits, clock=clock).run()
        assert outcome.exit_code == 0


def test_conditional_writes_are_enforced_for_decisions_and_for_nothing_that_is_overwritten():
    (statement,) = [entry for entry in policy("bucket-policy.json")["Statement"] if "once" in entry["Sid"].lower()]

    def enforced(key: str) -> bool:
        return any(fnmatch.fnmatchcase(f"arn:aws:s3:::amzn-s3-demo-bucket/{key}", r) for r in statement["Resource"])

    assert statement["Effect"] == "Deny"
    assert statement["Condition"]["Null"] == {"s3:if-none-match": "true"}
    job = "renders/night"
    for key in ("_state/journal/0000000001.json", "_state/leases/000001.json", "manifest/part-00003.parquet"):
        assert enforced(f"{job}/{key}")
    for key in ("_state/leases/000001.beat", "_result.json", "README.md", "videos/ab/x.mp4", "_state/segments/x/0.mp4"):
        assert not enforced(f"{job}/{key}")


def test_lifecycle_spares_leases_manifests_and_videos():
    words = shlex.split(RAY_JOB["spec"]["entrypoint"])
    job = f"renders/{words[words.index('--job-id') + 1]}"
    expiring = [rule for rule in policy("lifecycle.json")["Rules"] if "Expiration" in rule]
    prefixes = {rule["Filter"]["Prefix"]: rule["Expiration"]["Days"] for rule in expiring}
    assert all(days >= 14 for days in prefixes.values())
    for key in ("_state/segments/x/0.mp4", "_state/journal/0000000001.json"):
        assert any(f"{job}/{key}".startswith(prefix) for prefix in prefixes)
    for key in ("_state/leases/000001.json", "manifest/part-00000.parquet", "videos/ab/x.mp4", "job.json"):
        assert not any(f"{job}/{key}".startswith(prefix) for prefix in prefixes)

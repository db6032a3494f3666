"""What infra/ holds, applied: bucket rules on a real S3 server, kustomize by kubectl, the night's starter run."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import boto3.session
import pytest
import yaml

from tests.servers import path_style, shared_moto

INFRA = Path(__file__).parents[2] / "infra"
STARTER = INFRA / "kuberay/start-night.sh"


@pytest.fixture
def bucket():
    server = shared_moto()
    client = boto3.session.Session().client("s3", endpoint_url=server.url, config=path_style())
    yield client, server.new_bucket()
    client.close()


def test_lifecycle_rules_are_accepted_and_read_back(bucket):
    client, name = bucket
    wanted = json.loads((INFRA / "s3/lifecycle.json").read_text())
    client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration=wanted)
    found = client.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    assert {rule["ID"]: rule for rule in found} == {rule["ID"]: rule for rule in wanted["Rules"]}


def test_bucket_policy_is_accepted_and_read_back(bucket):
    client, name = bucket
    wanted = (INFRA / "s3/bucket-policy.json").read_text().replace("amzn-s3-demo-bucket", name)
    client.put_bucket_policy(Bucket=name, Policy=wanted)
    assert json.loads(client.get_bucket_policy(Bucket=name)["Policy"]) == json.loads(wanted)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomization_builds_and_the_cronjob_finds_its_files():
    built = subprocess.run(["kubectl", "kustomize", INFRA / "kuberay"], check=True, capture_output=True, text=True)
    objects = {document["kind"]: document for document in yaml.safe_load_all(built.stdout)}
    config = objects["ConfigMap"]
    assert yaml.safe_load(config["data"]["rayjob.yaml"])["kind"] == "RayJob"
    pod = objects["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert config["metadata"]["name"] in {volume.get("configMap", {}).get("name") for volume in pod["volumes"]}


# A cluster of one RayJob: its status is a file; each look at a running one moves it on through the statuses of a plan.
KUBECTL = """#!/bin/sh
cd {folder}
echo "$*" >> calls
case $1 in
  create) [ ! -e status ] || {{ echo AlreadyExists >&2; exit 1; }}; : > status ;;
  delete) rm status ;;
  get)
    [ -e flaky ] && {{ rm flaky; echo "no answer" >&2; exit 1; }}
    [ -e status ] && cat status
    [ -s plan ] && [ -e status ] && {{ head -n 1 plan > status; sed -i 1d plan; }}
    exit 0 ;;
esac
"""


def start_night(folder: Path, plan: str, status: str | None = None, *, flaky: bool = False) -> tuple[int, list[str]]:
    """Exit code of the starter and the kubectl verbs that changed something."""
    (folder / "kubectl").write_text(KUBECTL.format(folder=folder))
    (folder / "kubectl").chmod(0o755)
    (folder / "plan").write_text("".join(f"{word}\n" for word in plan.split()))
    if status is not None:
        (folder / "status").write_text(status)
    if flaky:
        (folder / "flaky").touch()
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", STARTER, "m.yaml", "night", "0.01"], env=environment, check=False, timeout=240, capture_output=True
    )
    verbs = [line.split()[0] for line in (folder / "calls").read_text().splitlines()]
    return done.returncode, [verb for verb in verbs if verb != "get"]


def test_night_is_created_and_waited_for(tmp_path):
    assert start_night(tmp_path, "Initializing Running Running Complete") == (0, ["create"])


def test_failed_night_fails(tmp_path):
    assert start_night(tmp_path, "Initializing Running Failed") == (1, ["create"])


@pytest.mark.parametrize("yesterday", ["Complete", "Failed"])
def test_yesterdays_night_makes_room(tmp_path, yesterday):
    assert start_night(tmp_path, "Running Complete", yesterday) == (0, ["delete", "create"])


def test_running_night_is_not_disturbed(tmp_path):
    assert start_night(tmp_path, "Running Running Complete", "Running") == (0, ["create"])


def test_api_server_that_does_not_answer_at_first_does_not_hide_yesterdays_night(tmp_path):
    assert start_night(tmp_path, "Running Complete", "Complete", flaky=True) == (0, ["delete", "create"])

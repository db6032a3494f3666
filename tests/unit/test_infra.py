"""The files of infra/kuberay are valid, agree with one another, and keep the rules that a night depends on."""

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from jobs.cli import app

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
SCHEMA = json.loads((ROOT / "tests/data/kuberay-v1.7.0.schema.json").read_text())


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((INFRA / "kuberay" / name).read_text()))


RAY_JOB = documents("rayjob.yaml")[0]
RAY_CRON_JOB = documents("raycronjob.yaml")[0]
CRON_JOB = documents("cronjob.yaml")[0]
CLUSTER = RAY_JOB["spec"]["rayClusterSpec"]
POD_SPECS = [group["template"]["spec"] for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"])]


def check_kuberay(document: Any) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(document)


def check_kubernetes(document: Any) -> None:
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_schema_of_kuberay_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("document", [RAY_JOB, RAY_CRON_JOB], ids=["RayJob", "RayCronJob"])
def test_rayjob_and_raycronjob_fit_kuberays_schema(document):
    check_kuberay(document)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (("spec",), {"activeDeadlineSecond": 1}),
        (("spec",), {"submissionMode": "HttpMode"}),
        (("spec",), {"shutdownAfterJobFinishes": "yes"}),
        (("spec", "rayClusterSpec"), {"enableInTreeAutoscaler": True}),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), {"maxReplica": 4}),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"), {"num-cpus": 0}),
    ],
)
def test_schema_names_what_is_misspelt(place, wrong):
    document = copy.deepcopy(RAY_JOB)
    part = document
    for step in place:
        part = part[step]
    part.update(wrong)
    with pytest.raises(jsonschema.ValidationError):
        check_kuberay(document)


@pytest.mark.parametrize("spec", POD_SPECS, ids=["head", "worker"])
def test_pods_of_the_cluster_fit_kubernetes_schema(spec):
    check_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec})


def test_nightly_raycronjob_runs_exactly_the_rayjob():
    assert RAY_CRON_JOB["spec"]["jobTemplate"] == RAY_JOB["spec"]


def test_night_begins_at_22_in_a_named_time_zone_and_cannot_overlap_the_next():
    for spec in (RAY_CRON_JOB["spec"], CRON_JOB["spec"]):
        assert spec["schedule"] == "0 22 * * *"
        assert re.fullmatch(r"[A-Z][a-z]+/[A-Z][A-Za-z_]+", spec["timeZone"])
    assert RAY_JOB["spec"]["activeDeadlineSeconds"] < 12 * 3600
    assert CRON_JOB["spec"]["concurrencyPolicy"] == "Forbid"
    assert CRON_JOB["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] > RAY_JOB["spec"]["activeDeadlineSeconds"]


def test_clusters_do_not_outlive_their_job_and_item_failures_do_not_buy_new_ones():
    spec = RAY_JOB["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] > 0
    assert "--exit-zero-on-item-failures" in shlex.split(spec["entrypoint"])
    assert spec["submissionMode"] == "HTTPMode"  # kuberay#4921


def test_ray_in_the_yaml_and_in_the_images_is_one_version():
    versions = {
        re.search(r"^ARG RAY_VERSION=(\S+)$", path.read_text(), re.M)[1]
        for path in (INFRA / "docker").glob("Dockerfile.???")
    }
    assert versions == {CLUSTER["rayVersion"]}


def test_ray_asks_for_its_token():
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_driver_stays_on_the_head_and_no_renderer_does():
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "entrypointNumCpus" not in RAY_JOB["spec"]  # it would put the driver on a spot machine
    assert POD_SPECS[0]["nodeSelector"] != POD_SPECS[1]["nodeSelector"]


def environment(spec: Any) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in spec["containers"][0]["env"]}


def test_pods_have_two_minutes_and_use_them():
    head, worker = POD_SPECS
    stop_grace_s = float(option("--limits-stop-grace-s"))
    assert head["terminationGracePeriodSeconds"] == worker["terminationGracePeriodSeconds"] == 120
    assert stop_grace_s < float(environment(head)["RAY_JOB_STOP_WAIT_TIME_S"]) < 120
    assert float(environment(worker)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < 120


def option(name: str) -> str:
    words = shlex.split(RAY_JOB["spec"]["entrypoint"])
    return words[words.index(name) + 1]


@pytest.mark.parametrize(
    ("spec", "hit", "missed"),
    [
        (
            POD_SPECS[0],
            "/opt/longtake/bin/python -m jobs.render s3://b/p.jsonl --out s3://b/renders",
            ["/bin/sh -c python -m jobs.render s3://b/p.jsonl", "ray::JobSupervisor.run"],
        ),
        (
            POD_SPECS[1],
            "/opt/longtake/bin/python3.12 /opt/longtake/bin/ray start --address=head:6379 --block",
            ["/bin/bash -c -- ulimit -n 65536; ray start --address=head:6379 --block", "ray::RenderActor"],
        ),
    ],
    ids=["head", "worker"],
)
def test_prestop_hook_signals_the_one_process_it_means(spec, hit, missed):
    command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    (pattern,) = re.findall(r"'(\^.*?)'", command[2])
    assert re.search(pattern, hit)
    assert not any(re.search(pattern, line) for line in [*missed, " ".join(command)])


@pytest.mark.parametrize("spec", POD_SPECS, ids=["head", "worker"])
def test_shared_memory_is_a_memory_volume_that_fits_the_limit(spec):
    volume = next(volume for volume in spec["volumes"] if volume["name"] == "shared-memory")
    mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    assert volume["emptyDir"]["medium"] == "Memory"
    assert mounts["shared-memory"] == "/dev/shm"
    gib = [int(text.removesuffix("Gi")) for text in (volume["emptyDir"]["sizeLimit"], limits(spec)["memory"])]
    assert gib[0] * 2 < gib[1]


def limits(spec: Any) -> dict[str, str]:
    return spec["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize(
    "spec", [*POD_SPECS, CRON_JOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]], ids=["head", "worker", "night"]
)
def test_containers_run_without_root_and_without_privileges(spec):
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert re.search(r":[\w.-]*\d", container["image"])
        assert not container["image"].endswith(":latest")


def test_as_many_actors_as_gpus():
    (group,) = CLUSTER["workerGroupSpecs"]
    assert int(option("--actors")) == group["maxReplicas"] * int(limits(group["template"]["spec"])["nvidia.com/gpu"])


@pytest.mark.parametrize("document", [CRON_JOB, *documents("access.yaml")], ids=lambda document: document["kind"])
def test_plain_kubernetes_objects_fit_their_schema(document):
    check_kubernetes(document)


def test_kustomization_carries_what_the_cronjob_mounts():
    kustomization = documents("kustomization.yaml")[0]
    (generator,) = kustomization["configMapGenerator"]
    pod = CRON_JOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    mounted = [word.removeprefix("/longtake/") for word in pod["containers"][0]["command"] if "/longtake/" in word]
    assert sorted(mounted) == sorted(generator["files"])
    assert generator["name"] in {volume.get("configMap", {}).get("name") for volume in pod["volumes"]}
    for name in (*kustomization["resources"], *generator["files"]):
        assert (INFRA / "kuberay" / name).is_file()


def test_cronjob_starts_the_rayjob_of_that_name_with_rights_that_suffice_and_no_more():
    pod = CRON_JOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][-1] == RAY_JOB["metadata"]["name"]
    objects = {(entry["kind"], entry["metadata"]["name"]): entry for entry in documents("access.yaml")}
    assert ("ServiceAccount", pod["serviceAccountName"]) in objects
    assert all(("ServiceAccount", spec["serviceAccountName"]) in objects for spec in POD_SPECS)
    (rule,) = objects["Role", pod["serviceAccountName"]]["rules"]
    assert rule["resources"] == ["rayjobs"]
    script = (INFRA / "kuberay/start-night.sh").read_text()
    assert set(rule["verbs"]) == set(re.findall(r"kubectl (\w+)", script))


def test_every_command_line_parses_with_the_real_command():
    words = shlex.split(RAY_JOB["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.render"]
    command = typer.main.get_command(app).commands["render"]
    with command.make_context("render", words[3:]) as context:  # parses, runs nothing
        given = context.params
    assert {"s3://amzn-s3-demo-bucket/prompts/night.jsonl", "s3://amzn-s3-demo-bucket/renders", "night"} <= {
        value for value in given.values() if isinstance(value, str)
    }
    with pytest.raises(Exception, match="No such option"):
        command.make_context("render", [*words[3:], "--no-such-flag"])

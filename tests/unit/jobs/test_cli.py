"""The command: verbs on a finished job, exit codes, `--json`; all without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.object_store import open_store
from jobs.cli import app
from jobs.commit import write_result
from jobs.job_record import begin_record
from jobs.prompts import PromptScan
from jobs.rows import AttemptFacts, failure_row
from tests.outputs import NOW, facts_of, finished_row, make_output, output_spec, planned, take

TINY = ["--model", "tiny-test", "--width", "64", "--height", "32"]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def run_json(*arguments: str) -> tuple[int, Any]:
    code, out, _ = run(*arguments, "--json")
    return code, json.loads(out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("out") / "night"
    write_result(make_output(root, 3), {"exit_code": 0, "is_resumable": False})
    return root


def test_read_verbs_speak_json_about_a_finished_job(finished: Path) -> None:
    job = str(finished)
    code, status = run_json("status", job)
    assert (code, status["state"], status["num_succeeded"], status["exit_code"]) == (0, "finished", 3, 0)
    code, waited = run_json("wait", job)
    assert (code, waited["state"]) == (0, "finished")
    code, report = run_json("report", job, "--no-sheet")
    assert (code, report["num_videos"], report["contact_sheet"]) == (0, 3, None)
    code, verified = run_json("verify", job)
    assert (code, verified["is_good"], verified["num_decoded"]) == (0, True, 3)
    code, cancelled = run_json("cancel", job)
    assert (code, cancelled) == (0, {"state": "finished", "requested": False})
    code, retried = run_json("retry", job)
    assert (code, retried) == (0, {"tasks": [], "reopened": 0})
    code, exported = run_json("export", job, str(finished.parent / "x"), "--dry-run")
    assert (code, exported["videos"]) == (0, 3)


def test_read_verbs_speak_text_too(finished: Path) -> None:
    job = str(finished)
    assert "3/3 done" in run("status", job)[1]
    assert "3 of 3 videos" in run("report", job, "--no-sheet")[1]
    assert "0 problems" in run("verify", job, "--quick")[1]


def test_verify_of_a_damaged_job_exits_3(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "night"
    shutil.copytree(finished, copy)
    next((copy / "videos").rglob("*.mp4")).unlink()
    code, out, _ = run("verify", str(copy))
    assert code == 3
    assert "missing: videos/" in out


def test_wait_exits_1_when_the_time_is_up_and_4_for_a_stopped_job(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    begin_record(store, output_spec("out"), PromptScan(1, 1, 1, 8, {}, ()), {})
    job = take(store)
    assert run("wait", str(tmp_path), "--timeout", "0.1")[0] == 1
    assert "stop within seconds" in run("cancel", str(tmp_path))[1]
    assert run_json("status", str(tmp_path))[1]["state"] == "stopping"
    job.close()
    write_result(store, {"exit_code": 4, "is_resumable": True})
    assert run("wait", str(tmp_path))[0] == 4


def test_retry_reopens_the_failures_that_were_chosen(tmp_path: Path) -> None:
    root = tmp_path / "night"
    store = open_store(root)
    begin_record(store, output_spec(tmp_path), PromptScan(3, 3, 3, 24, {}, ()), {})
    job = take(store)
    job.commit([finished_row(store, planned("a"))])
    for item_id, kind in (("b", "oom"), ("c", "nan")):
        attempt = AttemptFacts(epoch=1, number=3)
        job.commit([failure_row(facts_of(store), planned(item_id), kind, "why", attempt, NOW)])  # type: ignore[arg-type]
    job.close()
    assert run_json("retry", str(root), "--kind", "oom", "--dry-run")[1] == {"tasks": ["b-0"], "reopened": 0}
    assert run_json("retry", str(root), "--kind", "oom", "--no-render")[1] == {"tasks": ["b-0"], "reopened": 1}
    assert run_json("status", str(root))[1]["failures"] == {"nan": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "nowhere"], "no job.json"),
        (["render", "--out", "o"], "prompts: missing"),
        (["render", "p.txt"], "out: missing"),
        (["render", "p.txt", "--out", "o", "--set", "sed=1"], "did you mean 'seed'"),
        (["render", "p.txt", "--out", "o", *TINY], "p.txt: no such file"),
        (["render", "p.txt", "--out", "o", "--model", "longtake-wrld"], "unknown model 'longtake-wrld'"),
        (["render", "p.txt", "--out", "o", "--width", "40"], "render.video.width: input should be a multiple of 16"),
        (["render", "p.txt", "--out", "ftp://x/y", *TINY], "out: "),
        (["render", "p.txt", "--out", "o", "--model", "wan2.1-t2v-1.3b", "--width", "832"], "needs published weights"),
        (["render", "p.txt", "--out", "o", "--model", "tiny-wan-test", "--checkpoint", "no"], "models show tiny-wan"),
        (["render", "p.txt", "--out", "o", "--backbone-checkpoint", "/nowhere"], "no weights there"),
        (["render", "--config", "nope.yaml"], "nope.yaml: cannot be read"),
        (["verify", "nowhere", "--rerender", "many"], "give a share"),
        (["plan", "p.txt", "--out", "o", "--frames", "0"], "greater than or equal to 1"),
        (["plan", "p.txt", "--out", "o", "--kernel-name", "flashinfer"], "render.kernel.name: 'flashinfer' cannot run"),
        (["render", "p.txt", "--out", "o", "--kernel-name", "flex", *TINY], "head dimension of backbone.name is 40"),
        (
            ["render", "p.txt", "--out", "o", "--policy", "annsa", "--attention-layers", "[0, 9]", *TINY],
            "render.attention.layers: 9 is not a layer of this model: they go from 0 to 2",
        ),
        (
            ["render", "p.txt", "--out", "o", "--policy", "tempcache", "--cache-budget-latent-frames", "12", *TINY],
            "render.cache.budget_latent_frames: 12 is below 20",
        ),
        (["frobnicate"], "No such command"),
    ],
)
def test_what_cannot_work_exits_2_with_field_and_fix(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2
    assert words in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_render_dry_run_checks_everything_and_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a meadow\n\xff\n", encoding="latin-1")
    code, out, _ = run("render", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out"), "--dry-run", *TINY)
    assert code == 0
    assert "1 prompts, 1 videos" in out
    assert "line 2: bad_utf8" in out
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_take_exits_4_and_says_so(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.render.check_before_start", lambda *_, **__: os.kill(os.getpid(), number))
    code, _, err = run("render", "p.txt", "--out", str(tmp_path / "out"), *TINY)
    assert code == 4
    assert f"stopped by {number.name} before the first take" in err


def test_plan_refuses_what_render_would_refuse_and_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a meadow\n")
    (tmp_path / "file").write_text("")
    base = ["plan", str(tmp_path / "p.txt"), "--job-id", "night", "--set", "render.video.num_frames=8"]
    base += ["--set", "render.backbone.name=tiny-test", "--width", "32", "--height", "32", "--fps", "8"]
    code, _, err = run(*base, "--out", str(tmp_path / "file"))
    assert (code, "out: " in err) == (2, True)
    assert run(*base, "--out", str(tmp_path / "new"))[0] == 0
    assert not list((tmp_path / "new").iterdir())
    begin_record(open_store(tmp_path / "night"), output_spec(tmp_path), PromptScan(1, 1, 1, 8, {}, ()), {})
    code, _, err = run(*base, "--out", str(tmp_path))
    assert (code, "begun with another look" in err) == (2, True)


def test_plan_prints_what_is_known_and_what_is_not(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a meadow\na desert\n")
    base = ["plan", str(tmp_path / "p.txt"), "--out", str(tmp_path), "--samples", "3", *TINY]
    assert "GPU hours left: unknown" in run(*base)[1]
    price = ["--gpu-s-per-frame", "0.5", "--pricing-usd-per-gpu-hour", "2", "--actors", "2"]
    code, plan = run_json(*base, *price)
    hours = 6 * 96 * 0.5 / 3600
    assert (code, plan["num_tasks"], plan["gpu_hours"], plan["wall_hours"]) == (0, 6, hours, hours / 2)
    assert plan["usd"] == pytest.approx(2 * hours)


def test_doctor_probes_a_store_and_schema_prints_json(tmp_path: Path) -> None:
    _, out, _ = run("doctor", str(tmp_path / "out"))
    assert "ok   store:" in out
    assert run("doctor", "ftp://x")[0] == 2
    assert json.loads(run("schema")[1])["title"] == "Longtake job spec"

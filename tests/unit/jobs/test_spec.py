"""JobSpec: strict, explained, and the same from YAML, `--set` and flags."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

from jobs.cli import Assignments
from jobs.errors import SpecError
from jobs.flags import arguments_of, spec_flags, with_spec_flags
from jobs.spec import JobSpec, changed_fields
from jobs.spec_schema import SCHEMA_FILE, schema_text
from jobs.spec_text import build_spec, models_in
from workers.config import RenderConfig
from workers.named_policies import PolicyName

BASE = {("prompts", "url"): "lists/My prompts.txt", ("out",): "out"}


def refused(tmp_path: Path, text: str) -> str:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        build_spec(file=file)
    return str(caught.value).replace(str(tmp_path) + "/", "")


def test_unknown_fields_name_file_line_and_nearest_field(tmp_path: Path) -> None:
    cache = "render:\n  cache:\n    kind: window\n    recent_latent_fames: 3\n"
    text = f"prompts: {{url: a.txt}}\nout: o\n{cache}limits:\n  atempts: 2\n"
    message = refused(tmp_path, text)
    assert (
        "job.yaml:6: render.cache.recent_latent_fames: unknown field; did you mean 'recent_latent_frames'?" in message
    )
    assert "job.yaml:8: limits.atempts: unknown field; did you mean 'attempts'?" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("out: o\n", "prompts: missing"),
        ("prompts: {url: a}\nout: o\nseed: '7'\n", "job.yaml:3: seed: input should be a valid integer"),
        ("prompts: {url: a}\nout: o\nactors:\n  count: 0\n", "job.yaml:4: actors.count: must be at least 1"),
        ("prompts: {url: a}\nout: o\nout: p\n", "job.yaml:3: out: stands twice"),
        ("prompts: {url: a}\nout: o\njob_id: A/b\n", "job.yaml:3: job_id: must be"),
        ("prompts: {url: a}\nout: [o\n", "not YAML"),
        ("- a\n", "a spec is a mapping"),
        (
            "prompts: {url: a}\nout: o\nrender: {cache: {recent_latent_frames: 4}}\n",
            "render.cache.kind: missing beside render.cache, render.cache.recent_latent_frames; say which: dense, ",
        ),
        ("prompts: {url: a}\nout: o\nwhen: 2026-01-01\n", "not a spec"),
        ("a: !!python/object:os.system {}\n", "not YAML"),
        ("prompts: {url: a}\nout: o\nrender: {video: {width: 100}}\n", "job.yaml:3: render.video.width"),
        (
            "prompts: {url: a}\nout: o\nrender:\n  policy: tempcache\n  cache:\n    budget_latent_frames: 11\n",
            "job.yaml:6: render.cache.budget_latent_frames: 11 is below 12, the sum of sink_latent_frames 3, ",
        ),
        (
            "prompts: {url: a}\nout: o\nrender: {policy: tempcache, cache: {min_cosine: 1.5}}\n",
            "job.yaml:3: render.cache.min_cosine: 1.5 is outside of [-1, 1]",
        ),
        (
            "prompts: {url: a}\nout: o\nrender: {policy: annsa, attention: {density: 1.5}}\n",
            "render.attention.density: input should be greater than 0 and less than or equal to 1 (given: 1.5)",
        ),
        (
            "prompts: {url: a}\nout: o\nrender: {cache: {kind: hash}}\n",
            "job.yaml:3: render.cache.kind: 'hash' is none of dense, window, temporal, flow, native, tiles",
        ),
        (
            "prompts: {url: a}\nout: o\nrender: {policy: annsa, attention: {search: hnsw}}\n",
            "render.attention.search: input should be 'exact', 'lsh', 'quant', "
            "'faiss-lsh', 'faiss-flat' or 'faiss-sq8'",
        ),
        (
            "prompts: {url: a}\nout: o\nrender: {policy: fastar-quant, attention: {history_at: 0}}\n",
            "job.yaml:3: render.attention.history_at: input should be a list: [0] (given: 0)",
        ),
        (
            "prompts: {url: a}\nout: o\nrender: {policy: fastar-quant, attention: {history_at: [1]}}\n",
            "job.yaml:3: render.attention.history_at: [1] must begin with 0 and rise",
        ),
        (
            "prompts: {url: a}\nout: o\nrender: {policy: fastar-quant, attention: {history_at: [0, 4]}}\n",
            "job.yaml:3: render.attention.history_at: 4 is no denoising step: they go from 0 to 3",
        ),
        ("prompts: {url: a}\nout: o\nrender: {policy: best}\n", "render.policy: input should be 'dense', 'window', "),
        (
            "prompts: {url: a}\nout: o\nrender: {policy: fastar-tiles, guard: {enabled: true}}\n",
            "job.yaml:3: render.guard.enabled: true does not go with cache.kind: tiles",
        ),
    ],
)
def test_faults_say_where_and_what(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, text)


def test_flags_win_over_set_and_set_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("prompts: {url: a.txt}\nout: o\nseed: 1\nsamples: 1\nrender: {video: {fps: 8}}\n")
    spec = build_spec(file=file, assignments=["seed=2", "samples=2", "render.video.crf=20"], flags={("seed",): 3})
    assert (spec.seed, spec.samples, spec.render.video.crf, spec.render.video.fps) == (3, 2, 20, 8)


def test_each_fingerprint_covers_its_own_fields() -> None:
    spec = build_spec(flags=BASE)
    pixels = build_spec(flags=BASE | {("render", "video", "crf"): 20})
    reseeded = build_spec(flags=BASE | {("seed",): 1})  # every row names its own seed
    rest = build_spec(flags=BASE | {("limits", "attempts"): 9, ("job_id",): spec.job_id})
    assert spec.render_fingerprint == reseeded.render_fingerprint == rest.render_fingerprint
    assert spec.render_fingerprint != pixels.render_fingerprint
    assert changed_fields(spec.pixel_fields(), reseeded.pixel_fields()) == ["seed: 0 -> 1"]
    assert spec.job_fingerprint != rest.job_fingerprint


def test_default_job_id_is_the_input_name_and_what_changes_pixels() -> None:
    spec = build_spec(flags=BASE)
    same = build_spec(flags=BASE | {("out",): "out", ("limits", "attempts"): 9})
    others = [build_spec(flags=BASE | {("seed",): 1}), build_spec(flags=BASE | {("render", "video", "fps"): 8})]
    assert re.fullmatch(r"my-prompts-[0-9a-f]{8}", spec.job_id)
    assert same.job_id == spec.job_id
    assert len({spec.job_id, *(other.job_id for other in others)}) == 3
    assert spec.job_url == f"out/{spec.job_id}"


def test_split_words_in_a_job_id_are_warned_about() -> None:
    assert "'test'" in build_spec(flags=BASE | {("job_id",): "night-test"}).warnings()[0]
    assert not build_spec(flags=BASE | {("job_id",): "night-contest"}).warnings()


def test_changed_fields_reads_like_a_diff() -> None:
    old = build_spec(flags=BASE).pixel_fields()
    new = build_spec(flags=BASE | {("render", "video", "fps"): 24}).pixel_fields()
    assert changed_fields(old, new) == ["render.video.fps: 16 -> 24"]


def test_schema_file_is_current_and_accepts_a_dumped_spec() -> None:
    assert SCHEMA_FILE.read_text() == schema_text(), "run: python -m jobs.spec_schema"
    jsonschema.validate(build_spec(flags=BASE).model_dump(mode="json"), json.loads(schema_text()))


def parsed(arguments: list[str]) -> dict[tuple[str, ...], Any]:
    app, seen = typer.Typer(), {}

    def command(values: dict[tuple[str, ...], Any]) -> None:
        seen.update(values)

    app.command()(with_spec_flags(command))
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return seen


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for name, part in value.items() for k, v in leaves(part, (*path, name)).items()}


def test_every_field_has_its_flag_and_every_flag_its_field() -> None:
    paths = [flag.path for flag in spec_flags()]
    names = [name for flag in spec_flags() for name in flag.names]
    assert len(set(paths)) == len(paths)
    assert len(set(names)) == len(names)
    fields = leaves(build_spec(flags=BASE).model_dump(mode="json"))
    kind_of: dict[tuple[str, ...], dict[tuple[str, ...], str]] = {}
    for part, kind in every_kind():
        flag = flags_of(part, kind)
        of_kind = leaves(build_spec(flags=BASE | flag).model_dump(mode="json"))
        kind_of |= {path: flag for path in of_kind if path[:2] == ("render", part) and path[2] != "kind"}
        fields |= of_kind
    assert set(fields) <= set(paths)
    for path in paths:  # a flag without a field would be refused as unknown
        values: dict[tuple[str, ...], Any] = BASE | kind_of.get(path, {})
        build_spec(flags=values | {path: fields[path]} if path not in BASE else values)


def every_kind() -> Iterator[tuple[str, str]]:
    """Parts of a render that come in kinds, with each of their kinds."""
    for part, field in RenderConfig.model_fields.items():
        for kind in models_in(field.annotation):
            if "kind" in kind.model_fields:
                yield part, kind.model_fields["kind"].default


def flags_of(part: str, kind: str) -> dict[tuple[str, ...], str]:
    """What chooses a kind: itself, and the other half of a render over a tile table."""
    both = ("cache", "attention") if kind == "tiles" else (part,)
    return {("render", name, "kind"): kind for name in both}


def test_a_flag_fills_its_field() -> None:
    given = parsed(["p.txt", "--out", "x", "--width", "64", "--actors", "2", "--cache", "window", "--seed", "5"])
    spec = build_spec(flags=given)
    assert isinstance(spec, JobSpec)
    assert (spec.prompts.url, spec.out, spec.render.video.width, spec.actors.count) == ("p.txt", "x", 64, 2)
    assert (spec.render.cache.kind, spec.seed) == ("window", 5)
    assert build_spec(flags=parsed(["p.txt", "--out", "x", "--actors", "auto"])).actors.count == "auto"


def specs_of_all_kinds() -> Iterator[JobSpec]:
    """Every policy, every kind of every part, and for each field of a kind what is the default of another kind."""
    for policy in get_args(PolicyName):
        yield build_spec(flags=BASE | {("render", "policy"): policy})
    for part, kind in every_kind():
        chosen: dict[tuple[str, ...], Any] = {**flags_of(part, kind)}
        for path, value in leaves(build_spec(flags=BASE | chosen).model_dump(mode="json")).items():
            if path[:2] == ("render", part) and isinstance(value, int | float):
                for other in {3, 6, 21, 0.25, 0.3, 0.85} - {value}:
                    with contextlib.suppress(SpecError):
                        yield build_spec(flags=BASE | chosen | {path: other})
    yield build_spec(flags=BASE | {("render", "policy"): "annsa", ("render", "attention", "layers"): [0, 2]})
    yield build_spec(flags=BASE | {("render", "policy"): "svg"}, assignments=["render.attention.tile=null"])


def test_the_command_line_of_any_spec_gives_the_spec_again() -> None:
    app, seen = typer.Typer(), {}

    def command(values: dict[tuple[str, ...], Any], assignments: Assignments = None) -> None:
        seen["spec"] = build_spec(assignments=assignments or (), flags=values)

    app.command()(with_spec_flags(command))
    specs = list(specs_of_all_kinds())
    assert len(specs) > 100
    line = typer.main.get_command(app)  # as a call of the app does, each time
    for spec in specs:
        assert line.main(arguments_of(spec), "render", standalone_mode=False) in (None, 0), arguments_of(spec)
        assert seen.pop("spec") == spec, arguments_of(spec)


def test_the_command_line_of_a_spec_gives_the_spec_again() -> None:
    given = [
        "p x.txt",
        "--out",
        "o",
        "--width",
        "64",
        "--cache",
        "window",
        "--actors",
        "2",
        "--exit-zero-on-item-failures",
    ]
    spec = build_spec(flags=parsed(given))
    assert build_spec(flags=parsed(arguments_of(spec))) == spec
    assert arguments_of(spec)[:1] == ["p x.txt"]


def test_what_a_policy_stands_for_is_not_said_again() -> None:
    policy = ["p.txt", "--out", "o", "--policy", "fastar-tiles"]
    said = arguments_of(build_spec(flags=parsed([*policy, "--attention-density", "0.16", "--cache-storage", "model"])))
    assert not [word for word in said if word.startswith(("--cache-budget", "--cache-merging", "--attention-history"))]
    assert said[said.index("--attention-density") + 1] == "0.16"
    assert said[said.index("--cache-storage") + 1] == "model"
    assert arguments_of(build_spec(flags=parsed(policy)))[-2:] == ["--policy", "fastar-tiles"]

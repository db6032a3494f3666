"""Command-line options made from the fields of `JobSpec`: every flag has its field and every field its flag, because
nobody writes either list by hand.

The flag of `a.b.c_d` is `--a-b-c-d`, without a leading `render`; a few fields that everybody types have a short name
besides.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import yaml

from jobs.spec import JobSpec
from jobs.spec_text import FieldPath, build_spec, models_in

SHORT_NAMES: dict[FieldPath, str] = {
    ("render", "video", "width"): "--width",
    ("render", "video", "height"): "--height",
    ("render", "video", "num_frames"): "--frames",
    ("render", "video", "fps"): "--fps",
    ("render", "backbone", "name"): "--model",
    ("render", "backbone", "checkpoint"): "--checkpoint",
    ("render", "sampling", "num_steps"): "--steps",
    ("render", "cache", "kind"): "--cache",
    ("actors", "count"): "--actors",
    ("cluster", "address"): "--address",
}
DEPENDS = " Default: depends on the kind."
ARGUMENT: FieldPath = ("prompts", "url")
"""The one field that is a positional argument of the command."""
_OUT: FieldPath = ("out",)
_POLICY: FieldPath = ("render", "policy")


@dataclass(frozen=True)
class SpecFlag:
    """One leaf of the spec and how it is given on the command line."""

    path: FieldPath
    parameter: str
    names: tuple[str, ...]
    kind: Any
    choices: tuple[str, ...]
    help: str
    default: Any
    is_mixed: bool = False

    def read(self, value: Any) -> Any:
        """The given value; a field that takes a number or a word (`auto`), or a list, is read as YAML."""
        return yaml.safe_load(value) if self.is_mixed and isinstance(value, str) else value


def spec_flags() -> list[SpecFlag]:
    """A flag for each leaf field of `JobSpec`, in the order of the fields."""
    flags: list[SpecFlag] = []
    _collect(JobSpec, (), flags, {})
    return flags


def _collect(model: Any, path: FieldPath, flags: list[SpecFlag], seen: dict[FieldPath, int]) -> None:
    for name, field in model.model_fields.items():
        here = (*path, name)
        inner = models_in(field.annotation)
        if inner:
            for part in inner:
                _collect(part, here, flags, seen)
            continue
        flag = _flag(here, field.annotation, field.description or "", None if field.is_required() else field.default)
        if here in seen:  # variants of a union share a field, `kind` above all
            old = flags[seen[here]]
            flags[seen[here]] = _merged(old, flag)
        else:
            seen[here] = len(flags)
            flags.append(flag)


def _flag(path: FieldPath, annotation: Any, text: str, default: Any) -> SpecFlag:
    shown = path[1:] if path[0] == "render" else path
    names = ["--" + "-".join(shown).replace("_", "-")]
    if path in SHORT_NAMES:
        names.insert(0, SHORT_NAMES[path])
    kind, choices = _kind(annotation)
    mixed = kind is str and not choices and not _is_text(annotation)
    return SpecFlag(path, "_".join(path), tuple(names), kind, choices, text or "Which variant.", default, mixed)


def _merged(a: SpecFlag, b: SpecFlag) -> SpecFlag:
    choices = tuple(dict.fromkeys(a.choices + b.choices))
    if choices or a.default == b.default:
        return replace(a, choices=choices)
    return replace(a, help=a.help.removesuffix(DEPENDS) + DEPENDS, default=None)


def _is_text(annotation: Any) -> bool:
    """Can nothing but text stand there?"""
    return all(part in (str, type(None)) for part in get_args(annotation) or (annotation,))


def _kind(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """The Python type of an option, and its choices if it has some. A mixed type is given as text and read as YAML."""
    if get_origin(annotation) is Literal:
        values = get_args(annotation)
        return (int, ()) if all(isinstance(v, int) for v in values) else (str, tuple(str(v) for v in values))
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if not parts:
        return annotation, ()
    return _kind(parts[0]) if len(parts) == 1 else (str, ())


def with_spec_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a Typer command an option for each spec field.

    `command` must take a keyword `values: dict[FieldPath, Any]`; it receives what was given, and nothing that was not.
    """
    flags = spec_flags()

    def wrapper(**arguments: Any) -> Any:
        values = {flag.path: flag.read(arguments.pop(flag.parameter)) for flag in flags}
        given = {path: value for path, value in values.items() if value is not None}
        return command(values=given, **arguments)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "values"]
    made = [
        inspect.Parameter(flag.parameter, inspect.Parameter.KEYWORD_ONLY, annotation=_annotation(flag), default=None)
        for flag in flags
    ]
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    parameters = [p for p in made if p.name == "_".join(ARGUMENT)] + keyword
    parameters += [p for p in made if p.name != "_".join(ARGUMENT)]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__doc__ = command.__doc__
    wrapper.__name__ = command.__name__
    return wrapper


def arguments_of(spec: JobSpec) -> list[str]:
    """A short command line that gives this spec: PROMPTS, a flag for each value that no default and no policy gives.

    What flags cannot say, such as a null where a policy has set a value, stands behind `--set`.
    """
    dumped = spec.model_dump(mode="json")
    arguments = [spec.prompts.url]
    given: dict[FieldPath, Any] = {ARGUMENT: spec.prompts.url}
    of_policy = build_spec(flags=given | {path: _at(dumped, path) for path in (_OUT, _POLICY)}).model_dump(mode="json")
    for flag in spec_flags():
        value = _at(dumped, flag.path)
        usual = flag.default if flag.path in (_OUT, _POLICY) else _at(of_policy, flag.path)
        if flag.path == ARGUMENT or value is None or value == usual:
            continue
        given[flag.path] = value
        if flag.kind is bool:
            arguments.append(flag.names[0] if value else f"--no-{flag.names[0][2:]}")
        else:
            arguments += [flag.names[0], json.dumps(value) if isinstance(value, list) else str(value)]
    rebuilt = build_spec(flags=given).model_dump(mode="json")
    for flag in spec_flags():
        if flag.path not in given and _at(rebuilt, flag.path) != _at(dumped, flag.path):
            arguments += ["--set", f"{'.'.join(flag.path)}={json.dumps(_at(dumped, flag.path))}"]
    return arguments


def _at(dumped: Any, path: FieldPath) -> Any:
    for name in path:
        dumped = dumped.get(name) if isinstance(dumped, dict) else None
    return dumped


def _annotation(flag: SpecFlag) -> Any:
    if flag.path == ARGUMENT:
        return Annotated[str | None, typer.Argument(metavar="PROMPTS", help=flag.help, show_default=False)]
    group = "Job" if len(flag.path) == 1 else ": ".join(flag.path[:-1]).capitalize()
    shown = "" if flag.default is None or flag.default == "" else f" Default: {flag.default}."
    options: dict[str, Any] = {"help": flag.help + shown, "rich_help_panel": group, "show_default": False}
    kind = Literal[flag.choices] if flag.choices else flag.kind
    names = [f"{name}/--no-{name[2:]}" if flag.kind is bool else name for name in flag.names]
    return Annotated[kind | None, typer.Option(*names, **options)]

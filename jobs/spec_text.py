"""Text from outside -> `JobSpec`: a YAML file, `--set a.b=c` and flags, in rising order of precedence.

Every error says where the value came from (file and line, or the flag), which field it is, and how to mend it; an
unknown field names the nearest known one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from jobs.errors import SpecError
from jobs.spec import JobSpec

FieldPath = tuple[str, ...]

_BOUNDS = {"gt": "greater than", "ge": "greater than or equal to", "lt": "less than", "le": "less than or equal to"}
_BEYOND_A_BOUND = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
"""Faults of which pydantic names only the bound that was passed."""


def build_spec(
    *, file: Path | None = None, assignments: Sequence[str] = (), flags: Mapping[FieldPath, Any] | None = None
) -> JobSpec:
    """Resolve a spec.

    Args:
        file: YAML file, or None.
        assignments: Texts of `--set`, `path.to.field=value`; the value is read as YAML.
        flags: Values given on the command line by the path of their field.
    Raises:
        SpecError: With one line per fault.
    """
    origins: dict[FieldPath, str] = {}
    data = _read_yaml(file, origins) if file else {}
    for text in assignments:
        path, value = _assignment(text)
        _put(data, path, value, origins, f"--set {text}")
    for path, value in (flags or {}).items():
        _put(data, path, value, origins, "command line")
    try:
        return JobSpec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        lines = [_explain(fault, origins) for fault in error.errors()]
        raise SpecError("\n".join(dict.fromkeys(lines))) from None


def _read_yaml(file: Path, origins: dict[FieldPath, str]) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{file}: is not UTF-8 text") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _note_lines(root, (), file, origins)
        data = yaml.safe_load(text)
        json.dumps(data)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SpecError(f"{file}:{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"{file}: not a spec: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SpecError(f"{file}:1: a spec is a mapping of fields, not {type(data).__name__}")
    return data


def _note_lines(node: yaml.Node, path: FieldPath, file: Path, origins: dict[FieldPath, str]) -> None:
    """Remember where every field stands; a field that stands twice is refused (YAML would keep the last silently)."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        line = key.start_mark.line + 1
        if here in origins:
            raise SpecError(f"{file}:{line}: {'.'.join(here)}: stands twice (first: {origins[here]}); keep one")
        origins[here] = f"{file}:{line}"
        _note_lines(value, here, file, origins)


def _assignment(text: str) -> tuple[FieldPath, Any]:
    name, equals, value = text.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path):
        raise SpecError(f"--set {text}: write it as path.to.field=value")
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {text}: {value!r} is not a YAML value") from error


def _put(data: dict[str, Any], path: FieldPath, value: Any, origins: dict[FieldPath, str], origin: str) -> None:
    for depth, name in enumerate(path[:-1]):
        inner = data.setdefault(name, {})
        if not isinstance(inner, dict):
            raise SpecError(f"{origin}: {'.'.join(path[: depth + 1])}: is {inner!r}, a value, and has no fields")
        data = inner
    data[path[-1]] = value
    for known in [p for p in origins if p[: len(path)] == path]:
        del origins[known]
    origins[path] = origin


def _explain(fault: Any, origins: Mapping[FieldPath, str]) -> str:
    path, names, bounds = _field_path(JobSpec, tuple(str(part) for part in fault["loc"]))
    message, given = fault["msg"].removeprefix("Value error, "), fault.get("input")
    shown = "" if isinstance(given, dict) else f" (given: {json.dumps(given, default=str, ensure_ascii=False)[:80]})"
    if fault["type"] == "value_error" and (named := _named_in(message)):
        path, message, shown = *named, ""
    elif fault["type"] == "union_tag_invalid":
        path, message, shown = (*path, "kind"), f"{fault['ctx']['tag']!r} is none of {', '.join(_kinds_at(path))}", ""
    elif fault["type"] in ("tuple_type", "list_type"):
        message = f"input should be a list: [{json.dumps(given, default=str)}]"
    elif fault["type"] in _BEYOND_A_BOUND and bounds:
        message = f"input should be {bounds}"
    origin = next((origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in origins), None)
    where = f"{origin}: " if origin else ""
    field = ".".join(path)
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(path[-1], names, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(sorted(names))}"
        return f"{where}{field}: unknown field{hint}"
    if fault["type"] == "missing":
        return f"{where}{field}: missing; give it in the file or as a flag"
    if fault["type"] == "union_tag_not_found":
        beside = ", ".join(".".join(known) for known in origins if known[: len(path)] == path)
        return f"{field}.kind: missing beside {beside}; say which: {', '.join(_kinds_at(path))}"
    return f"{where}{field}: {message[0].lower() + message[1:]}{shown}"


def _named_in(message: str) -> tuple[FieldPath, str] | None:
    """A rule over several fields of a render says itself which one it is about: `cache.budget_latent_frames: ...`."""
    name, _, rest = message.partition(": ")
    path = ("render", *name.split("."))
    models: list[type[BaseModel]] = [JobSpec]
    for part in path:
        if not any(part in one.model_fields for one in models):
            return None
        models = [inner for one in models if part in one.model_fields for inner in _inner(one, part)]
    return path, rest


def _field_path(model: type[BaseModel], loc: tuple[str, ...]) -> tuple[FieldPath, list[str], str]:
    """The path as the user writes it (tags of unions taken out), the field names known at its last level, and its
    bounds in words, if it has some.
    """
    models: list[type[BaseModel]] = [model]
    path: list[str] = []
    names: list[str] = []
    bounds = ""
    for part in loc:
        known = {name: field for one in models for name, field in one.model_fields.items()}
        tagged = [one for one in models if part in _tags(one)]
        if part not in known and tagged and len(models) > 1:
            models = tagged
            continue
        if not models:
            continue  # a branch of a plain union, such as `int`
        names = list(known)
        path.append(part)
        bounds = _bounds(known[part].metadata) if part in known else ""
        models = models_in(known[part].annotation) if part in known else []
    return tuple(path), names, bounds


def _bounds(metadata: Sequence[Any]) -> str:
    """What a number must be, from the constraints of its field."""
    found = {name: getattr(one, name) for one in metadata for name in _BOUNDS if hasattr(one, name)}
    return " and ".join(f"{words} {_plain(found[name])}" for name, words in _BOUNDS.items() if name in found)


def _plain(number: float) -> str:
    return str(int(number) if number == int(number) else number)


def _kinds_at(path: FieldPath) -> list[str]:
    """Kinds that the part at a path comes in."""
    models: list[type[BaseModel]] = [JobSpec]
    for name in path:
        models = [inner for one in models if name in one.model_fields for inner in _inner(one, name)]
    return [str(tag) for one in models for tag in _tags(one)]


def _inner(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    return models_in(model.model_fields[name].annotation)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The record types that an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind is not None else ()
